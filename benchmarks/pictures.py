"""Draws what was measured: bars with their spread, lines over ranks, and phases of whole steps."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.bench.simulation import Link, Recording, world_sizes
from smorms3_dist.bench.summary import (
    OURS,
    PLACEMENTS,
    TITLES,
    Row,
    Spread,
    placements_of,
    three_digits,
)

import matplotlib
import matplotlib.pyplot as plt

COLOURS = {
    OURS: "#0072b2",
    "chainermn": "#d55e00",
    "chainer": "#999999",
    "ddp_zero": "#009e73",
    "ddp_zero_amsgrad": "#56b4e9",
    "torch": "#009e73",
    "c": "#666666",
}
PHASES = {
    "forward": "#cccccc",
    "backward": "#999999",
    "reduce and update": "#0072b2",
    "gather": "#56b4e9",
    "rest of the update": "#003f63",
    "update": "#d55e00",
}
SHORT = TITLES | {"ddp_zero": "DDP + ZeRO, Adam", "ddp_zero_amsgrad": "DDP + ZeRO, AMSGrad"}
SHORT |= {"chainermn": "ChainerMN"}

LINK = Link(ranks_per_host=2, latency=50e-6, bandwidth=10e9 / 8)
"""What the picture of the model has between hosts: 10 Gbit/s."""

Groups = Mapping[str, Mapping[str, Spread]]
"""Spreads by what a group of bars is about, and by system."""


def _figure(title: str, wide: float = 8, high: float = 3.6) -> Any:
    matplotlib.use("agg")
    matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    _, axes = plt.subplots(figsize=(wide, high), layout="constrained")
    axes.set_title(title, loc="left", fontsize=10)
    return axes


def _save(axes: Any, path: Path) -> None:
    axes.figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(axes.figure)


def bars(path: Path, title: str, groups: Groups, logarithmic: bool = True) -> None:
    """Groups of bars in milliseconds: medians, and lines over eight tenths of all values.

    Args:
        path: The file to write.
        title: What is shown.
        groups: The bars.
        logarithmic: Whether the axis is, rather than begin with zero.
    """
    axes = _figure(title)
    systems = list(dict.fromkeys(itertools.chain.from_iterable(groups.values())))
    positions: list[float] = []
    start, seen = 0.0, set()
    for group in groups.values():
        there = [system for system in systems if system in group]
        for offset, system in enumerate(there):
            low, middle, high = (1e3 * seconds for seconds in group[system])
            axes.bar(
                *(start + offset, middle, 0.9),
                color=COLOURS[system],
                label=None if system in seen else SHORT[system],
                yerr=[[middle - low], [high - middle]],
                error_kw={"elinewidth": 1, "capsize": 2},
            )
            axes.annotate(
                three_digits(middle),
                (start + offset, high),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
            seen.add(system)
        positions.append(start + (len(there) - 1) / 2)
        start += len(there) + 0.8
    if logarithmic:
        _make_logarithmic(axes)
    axes.margins(y=0.12)
    axes.set_ylabel("ms, logarithmic" if logarithmic else "ms")
    axes.set_xticks(positions, ["\n".join(textwrap.wrap(name, 14)) for name in groups])
    _legend_below(axes)
    _save(axes, path)


def _make_logarithmic(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _legend_below(axes: Any) -> None:
    axes.figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)


def grouped(found: Iterable[Row], phase: str = "step") -> dict[str, dict[str, Spread]]:
    """The spreads of a phase by name and system."""
    groups: dict[str, dict[str, Spread]] = {}
    for row in found:
        groups.setdefault(row.name, {})[row.system] = row.seconds[phase]
    return groups


def over_ranks(path: Path, found: Sequence[Row], recording: Recording | None) -> None:
    """Steps over the number of ranks, and what the model says of them."""
    axes = _figure("Optimizer and communication, 19M parameters, ranks of one host")
    for system in dict.fromkeys(row.system for row in found):
        of_system = sorted(
            (row.ranks, row.seconds["step"]) for row in found if row.system == system
        )
        ranks = [count for count, _ in of_system]
        low, middle, high = zip(*(spread for _, spread in of_system), strict=True)
        axes.plot(
            ranks, [1e3 * s for s in middle], "o-", color=COLOURS[system], label=SHORT[system]
        )
        axes.fill_between(
            ranks, [1e3 * s for s in low], [1e3 * s for s in high], color=COLOURS[system], alpha=0.2
        )
    if recording is not None:
        known = list(recording.checks())
        axes.plot(
            [ranks for ranks, _, _ in known],
            [1e3 * modelled for *_, modelled in known],
            *("x--",),
            color="black",
            label="the model of ours",
        )
        axes.axvline(recording.cores + 0.5, color="#bbbbbb", linestyle=":")
        axes.annotate(
            " ranks share cores",
            (recording.cores + 0.5, 0.95),
            xycoords=("data", "axes fraction"),
            color="#777777",
        )
    _make_logarithmic(axes)
    axes.set_xlabel("ranks")
    axes.set_ylabel("ms, logarithmic")
    axes.legend(frameon=False)
    _save(axes, path)


def whole_steps(path: Path, found: Sequence[Row]) -> None:
    """Whole steps as bars of phases."""
    axes = _figure("Whole steps by phase", high=0.5 + 0.45 * len(found))
    seen = set()
    for position, row in enumerate(reversed(found)):
        left = 0.0
        for phase, seconds in phases_of(row).items():
            axes.barh(
                *(position, 1e3 * seconds, 0.7, 1e3 * left),
                color=PHASES[phase],
                label=None if phase in seen else phase,
            )
            left += seconds
            seen.add(phase)
        axes.annotate(f" {1e3 * left:.0f} ms", (1e3 * left, position), va="center", fontsize=8)
    names = [
        f"{row.name}, {SHORT[row.system]}, {row.ranks} rank{'s' * (row.ranks > 1)}"
        for row in reversed(found)
    ]
    axes.set_yticks(range(len(found)), names)
    axes.set_xlabel("ms")
    axes.margins(x=0.1)
    _legend_below(axes)
    _save(axes, path)


def phases_of(row: Row) -> dict[str, float]:
    """The phases that a whole step is made of, in seconds."""
    seconds = {phase: spread.median for phase, spread in row.seconds.items()}
    if "gather" not in seconds:
        return {phase: seconds[phase] for phase in ("forward", "backward", "update")}
    parts = {phase: seconds[phase] for phase in PHASES if phase in seconds and phase != "update"}
    inside = parts["reduce and update"] + parts["gather"]
    return parts | {"rest of the update": max(seconds["update"] - inside, 0.0)}


def kernels(path: Path, row: Row) -> None:
    """The kernels of all rules by placement, a byte."""
    axes = _figure(f"The compiled update, {row.rest['elements'] >> 20}M elements, one process")
    rules = list(row.rest["bytes_an_element"])
    colours = {"staggered": "#0072b2", "meeting": "#009e73", "equal": "#d55e00"}
    placements = placements_of(row)
    width = 0.8 / len(placements)
    for shift, placement in enumerate(placements):
        values = []
        for rule in rules:
            nbytes = row.rest["elements"] * row.rest["bytes_an_element"][rule]
            values.append([1e9 * s / nbytes for s in row.seconds[f"{rule}, {placement}"]])
        low, middle, high = zip(*values, strict=True)
        below, above = (
            [abs(a - b) for a, b in zip(middle, end, strict=True)] for end in (low, high)
        )
        axes.bar(
            [index + width * (shift + 0.5) for index in range(len(rules))],
            middle,
            width,
            color=colours[placement],
            label=PLACEMENTS[placement],
            yerr=[below, above],
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    axes.set_xticks([index + 0.4 for index in range(len(rules))], rules, rotation=35, ha="right")
    axes.set_ylabel("ns a byte read or written")
    _legend_below(axes)
    _save(axes, path)


def model(path: Path, recording: Recording, most: int) -> None:
    """Whole steps of up to so many ranks, as the model foretells them."""
    axes = _figure("A MODEL, not a measurement: 2 ranks a host, 50 us and 10 Gbit/s between hosts")
    sizes = world_sizes(most)
    styles: list[tuple[str, Callable[[Any], float], str]] = [
        ("step", lambda step: step.total, "-"),
        ("forward and backward", lambda step: step.compute, ":"),
    ]
    for name, colour in zip(recording.models, ("#0072b2", "#d55e00"), strict=False):
        compute, parameters = recording.models[name]
        steps = [recording.foretell(ranks, parameters, compute, LINK) for ranks in sizes]
        for what, value, style in styles:
            values = [1e3 * value(step) for step in steps]
            label = f"{name}, {parameters / 1e6:.1f}M: {what}"
            axes.plot(sizes, values, style, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks, each with a batch of its own")
    axes.set_ylabel("ms")
    axes.legend(frameon=False, fontsize=8)
    _save(axes, path)
