"""One picture of all that records have: a row of panels for what is learned, and so on."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from smorms3_dist.plot import series
from smorms3_dist.plot.records import Events, Log, Records
from smorms3_dist.plot.series import PREFIX, Series

# A palette that people with any colour vision can tell apart, by Okabe and Ito.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#f0e442")
_DASHES = ("-", "--", ":", "-.")
_PHASE_COLOURS = {
    "compute": "#999999",
    "agree": "#f0e442",
    "layout": "#000000",
    "reduce": "#0072b2",
    "hooks": "#cc79a7",
    "update": "#009e73",
    "gather": "#56b4e9",
    "checkpoint": "#d55e00",
}
_MARKS = {
    "first step": ("^", "#009e73"),
    "checkpoint": ("o", "#0072b2"),
    "stall": ("D", "#e69f00"),
    "failure": ("X", "#d55e00"),
    "restart": (">", "#000000"),
    "end": ("s", "#000000"),
}
"""The marker and the colour of each event that is drawn."""

_WIDTH, _HEIGHT, _DPI = 5.0, 3.0, 120
"""Of a panel, in inches; and dots an inch."""

_SMALL = 8
_OUTLIER = 2.5
"""From so many medians on, a time is cut off, and written above."""

_MANY = 24
"""From so many points on, a line has no markers."""

Draw = Callable[[Any], None]
"""Draws into axes."""


class Picture(NamedTuple):
    """A picture, and what it lacks.

    Attributes:
        figure: matplotlib's figure.
        panels: The names of its panels, in order.
        missing: What could not be drawn, and what it takes, in words.
    """

    figure: Any
    panels: list[str]
    missing: list[str]


def draw(records: Records) -> Picture:
    """Draws whatever there is.

    Raises:
        ImportError: If there is no matplotlib.
    """
    from matplotlib.figure import Figure

    missing: list[str] = []
    starts = max((len(series.attempts(events)) for events in records.events), default=0)
    heights = {
        _learned: _HEIGHT,
        _step_times: _HEIGHT,
        _ranks: _HEIGHT,
        _lives: min(1.1 + 0.4 * starts, 2 * _HEIGHT),
    }
    rows = [(found, high) for row, high in heights.items() if (found := row(records, missing))]
    widest = max((len(row) for row, _ in rows), default=1)
    size = (_WIDTH * max(widest, 2), sum(height for _, height in rows) or _HEIGHT)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    names = []
    if rows:
        ratios = [height for _, height in rows]
        parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for part, (row, _) in zip(parts, rows, strict=True):
            axes = part.subplots(1, len(row), squeeze=False)[0]
            for ax, (name, drawn) in zip(axes, row.items(), strict=True):
                ax.set_title(name, fontsize=_SMALL + 2)
                ax.tick_params(labelsize=_SMALL)
                ax.spines[["top", "right"]].set_visible(False)
                ax.set_axisbelow(True)
                drawn(ax)
                names.append(name)
    return Picture(figure, names, missing)


# What is learned


def _learned(records: Records, missing: list[str]) -> dict[str, Draw]:
    found: dict[str, Draw] = {}
    for word in ("loss", "accuracy"):
        lines = [(log, each) for log in records.logs for each in series.named(log, word)]
        if lines:
            found[word] = _curves(lines, len(records.logs))
        else:
            why = f"no log has a key that ends in {word}" if records.logs else "there is no log"
            missing.append(f"{word}: {why}; LogReport writes what is reported")
        for log, each in lines:
            count = sum(map(math.isnan, each.values))
            if count:
                missing.append(f"{each.key} is not finite in {count} of the reports of {log.name}")
    return found


def _curves(lines: Sequence[tuple[Log, Series]], logs: int) -> Draw:
    def drawn(ax: Any) -> None:
        keys = list(dict.fromkeys(each.key for _, each in lines))
        names = list(dict.fromkeys(log.name for log, _ in lines))
        for log, each in lines:
            # Colours tell logs apart, if there are several, and dashes the keys.
            key, name = keys.index(each.key), names.index(log.name)
            colour = _COLOURS[(name if logs > 1 else key) % len(_COLOURS)]
            ax.plot(
                each.iterations,
                each.values,
                color=colour,
                linestyle=_DASHES[key % len(_DASHES)] if logs > 1 else "-",
                marker="o" if len(each.values) < _MANY else "",
                markersize=3,
                linewidth=1.4,
                label=f"{log.name}: {each.key}" if logs > 1 else each.key,
            )
        values = [v for _, each in lines for v in each.values if not math.isnan(v)]
        if values and min(values) > 0 and max(values) > 50 * min(values):
            ax.set_yscale("log")
        _finish(ax, legend=True)

    return drawn


# Where the time of a step goes


def _step_times(records: Records, missing: list[str]) -> dict[str, Draw]:
    found: dict[str, Draw] = {}
    for log in records.logs:
        phases = series.phases(log)
        if phases:
            name = "time of a step, by phase"
            found[name if len(records.logs) == 1 else f"{name}: {log.name}"] = _stacked(phases)
        else:
            missing.append(f"time of a step: {log.name} has no {PREFIX}step_s; {_STEP_REPORT}")
    return found


_STEP_REPORT = "extend the trainer with smorms3_dist.extensions.StepReport"


def _stacked(phases: Sequence[Series]) -> Draw:
    def drawn(ax: Any) -> None:
        totals = [sum(values) for values in zip(*(each.values for each in phases), strict=True)]
        unit, size = _time_unit(max(totals))
        iterations = phases[0].iterations
        # Each report is of the steps since the one before.
        first = 2 * iterations[0] - iterations[1] if len(iterations) > 1 else 0.0
        edges = [max(first, 0.0), *iterations]
        base = [0.0] * len(iterations)
        spare = iter(_COLOURS)
        for each in phases:
            name = each.key.removeprefix(PREFIX).removesuffix("_s")
            top = [low + value / size for low, value in zip(base, each.values, strict=True)]
            colour = _PHASE_COLOURS.get(name) or next(spare)
            ax.stairs(top, edges, baseline=base, fill=True, color=colour, label=name, linewidth=0)
            base = top
        ax.set_ylabel(unit, fontsize=_SMALL)
        # The first steps take much longer than all others: these are what is to be seen.
        limit = _OUTLIER * statistics.median(base)
        highest = max((value for value in base if value <= limit), default=max(base))
        for left, right, value in zip(edges, edges[1:], base, strict=False):
            if value > limit:
                middle, above = (left + right) / 2, 1.15 * highest
                ax.text(middle, above, f" {value:.3g}", fontsize=_SMALL, ha="center", va="bottom")
        ax.set_ylim(0, 1.15 * highest)
        ax.set_xlim(edges[0], edges[-1])
        _finish(ax)
        handles, labels = ax.get_legend_handles_labels()
        # In the order in which they are stacked.
        ax.legend(
            handles[::-1],
            labels[::-1],
            loc="upper left",
            bbox_to_anchor=(1, 1),
            fontsize=_SMALL,
            frameon=False,
        )

    return drawn


def _time_unit(seconds: float) -> tuple[str, float]:
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
    return next(((n, u) for n, u in units.items() if seconds >= u), ("us", 1e-6))


# How ranks differ


def _ranks(records: Records, missing: list[str]) -> dict[str, Draw]:
    found: dict[str, Draw] = {}
    lines = [(log, series.series_of(log, f"{PREFIX}imbalance")) for log in records.logs]
    lines = [(log, each) for log, each in lines if each.values]
    if lines:
        found["imbalance of the ranks"] = _imbalance(lines)
    else:
        missing.append(f"imbalance: no log has {PREFIX}imbalance; {_STEP_REPORT}")
    on_gpu = any(series.by_rank(log, "gpu_bytes") for log in records.logs)
    planned = [
        (plan.name, plan.memory.get("states", 0) + plan.memory.get("masters", 0))
        for plan in records.plans
    ]
    wholes = [(p.name, p.memory.get("total", 0)) for p in records.plans if p.on_host != on_gpu]
    for key, title, plans in (
        ("state_bytes", "optimizer states of a rank", planned),
        ("gpu_bytes", "GPU memory of a rank", wholes if on_gpu else []),
        ("rss_bytes", "process memory of a rank, with Python", [] if on_gpu else wholes),
    ):
        bars = [
            (log.name, numbers) for log in records.logs if (numbers := series.by_rank(log, key))
        ]
        if bars:
            found[title] = _memory(bars, plans)
    if "optimizer states of a rank" not in found:
        missing.append(f"memory: no log has {PREFIX}state_bytes; {_STEP_REPORT}")
    elif not records.plans:
        missing.append(
            "memory as predicted: there is no plan; write one by smorms3-dist plan ... --json > "
            "plan.json, and give that as well"
        )
    return found


def _imbalance(lines: Sequence[tuple[Log, Series]]) -> Draw:
    def drawn(ax: Any) -> None:
        for number, (log, each) in enumerate(lines):
            slowest = series.series_of(log, f"{PREFIX}slowest_rank").values
            often = ""
            if slowest:
                rank, count = Counter(slowest).most_common(1)[0]
                often = f"slowest: rank {rank:g} in {count} of {len(slowest)}"
            ax.plot(
                each.iterations,
                each.values,
                color=_COLOURS[number % len(_COLOURS)],
                marker="o" if len(each.values) < _MANY else "",
                markersize=3,
                linewidth=1.4,
                label=": ".join(filter(None, (log.name if len(lines) > 1 else "", often))),
            )
        ax.axhline(1, color="#999999", linewidth=0.8)
        # Room for the legend.
        highest = max(value for _, each in lines for value in each.values)
        ax.set_ylim(top=1 + 1.25 * max(highest - 1, 0.01))
        ax.set_ylabel("slowest over mean", fontsize=_SMALL)
        _finish(ax, legend=True)

    return drawn


def _memory(bars: Sequence[tuple[str, dict[str, float]]], plans: Sequence[tuple[str, int]]) -> Draw:
    def drawn(ax: Any) -> None:
        highest = max([*(v for _, each in bars for v in each.values()), *(n for _, n in plans)])
        unit, size = _byte_unit(highest)
        ranks = list(dict.fromkeys(rank for _, each in bars for rank in each))
        width = 0.8 / len(bars)
        for number, (name, numbers) in enumerate(bars):
            places = [ranks.index(rank) + (number + 0.5) * width - 0.4 for rank in numbers]
            ax.bar(
                places,
                [value / size for value in numbers.values()],
                width * 0.95,
                color=_COLOURS[number % len(_COLOURS)],
                label=name if len(bars) > 1 else "measured",
            )
        for number, (name, nbytes) in enumerate(plans):
            ax.axhline(
                nbytes / size,
                color="#000000",
                linestyle=_DASHES[(number + 1) % len(_DASHES)],
                linewidth=1.2,
                label=f"plan: {name}" if len(plans) > 1 else "plan",
            )
        ax.set_ylim(0, 1.25 * highest / size)
        if len(ranks) <= 16:
            ax.set_xticks(range(len(ranks)), ranks)
        ax.set_xlabel("largest of all ranks" if ranks == ["most"] else "rank", fontsize=_SMALL)
        if ranks == ["most"]:
            ax.set_xticks([])
            ax.set_xlim(-1.5, 1.5)
        ax.set_ylabel(unit, fontsize=_SMALL)
        ax.grid(axis="y", alpha=0.25)
        ax.legend(fontsize=_SMALL, frameon=False, ncols=2, loc="upper left")

    return drawn


def _byte_unit(nbytes: float) -> tuple[str, float]:
    units = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10}
    return next(((n, u) for n, u in units.items() if nbytes >= u), ("B", 1.0))


# The life of a job


def _lives(records: Records, missing: list[str]) -> dict[str, Draw]:
    if not records.events:
        missing.append(
            "the life of the job: there are no events; smorms3-dist run --events FILE writes them"
        )
    many = len(records.events) > 1
    title = "life of the job"
    return {f"{title}: {e.name}" if many else title: _life(e) for e in records.events}


def _life(events: Events) -> Draw:
    def drawn(ax: Any) -> None:
        found = series.attempts(events)
        last = max(attempt.stop for attempt in found)
        unit, size = next(
            ((n, u) for n, u in (("hours", 3600.0), ("minutes", 60.0)) if last >= 2 * u),
            ("seconds", 1.0),
        )
        seen = set()
        for number, attempt in enumerate(found):
            length = (attempt.stop - attempt.start) / size
            ax.barh(number, length, 0.5, attempt.start / size, color="#0072b2", alpha=0.2)
            failed = any(kind == "failure" for kind, _ in attempt.marks)
            for kind, time in attempt.marks:
                if kind not in _MARKS or (kind == "end" and failed):
                    continue
                marker, colour = _MARKS[kind]
                ax.plot(
                    [time / size],
                    [number],
                    linestyle="",
                    marker=marker,
                    color=colour,
                    markersize=6,
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                    label="" if kind in seen else kind,
                    clip_on=False,
                    zorder=3,
                )
                seen.add(kind)
        ax.set_yticks(range(len(found)), [f"start {n}" for n in range(1, len(found) + 1)])
        ax.set_ylim(len(found) - 0.4, -0.6)
        ax.set_xlabel(f"{unit} since the start", fontsize=_SMALL)
        ax.grid(axis="x", alpha=0.25)
        if seen:
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=_SMALL, frameon=False)

    return drawn


def _finish(ax: Any, legend: bool = False) -> None:
    ax.set_xlabel("iteration", fontsize=_SMALL)
    ax.grid(alpha=0.25)
    if legend and any(label for label in _labels(ax)):
        ax.legend(fontsize=_SMALL, frameon=False)


def _labels(ax: Any) -> Iterable[str]:
    return ax.get_legend_handles_labels()[1]
