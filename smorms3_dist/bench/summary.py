"""What was measured as numbers and tables: medians with their spread, and who is faster."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

OURS, CHAINERMN, CHAINER = "smorms3_dist", "chainermn", "chainer"

OVER_TCP = "over TCP"
"""How the name of the exchange ends that tells what processors do for TCP."""

OVER_LINK = "over a link of"
"""What the names of exchanges have before the rate of a link between hosts, in Gbit/s."""

PARTS = {
    "kernel": "The compiled update of each rule, in one process",
    "step": "Optimizer and communication of a step",
    "hooks": "The same with hooks",
    "rules": "The same with other rules",
    "checks": "What comparing ranks, looking for what is not finite, and recording cost",
    "ranks": "The same on 1 to 8 ranks of this host",
    "whole": "Whole steps, by phase",
    "exchange": "What ranks exchange, from plain MPI calls",
    "start": "Starting",
}
"""The parts, and what they are about."""

TITLES = {
    OURS: OURS,
    CHAINERMN: "ChainerMN, communicator naive",
    CHAINER: "plain Chainer",
    "ddp_zero": "PyTorch DDP + ZeroRedundancyOptimizer, Adam (2 states)",
    "ddp_zero_amsgrad": "DDP + ZeroRedundancyOptimizer, AMSGrad (3 states, as SMORMS3)",
    "torch": "torch.distributed.checkpoint",
    "c": "a loop in C",
}
"""What the systems are called."""

_BY_PHASE = ("whole", "exchange", "start", "checkpoint")


class Spread(NamedTuple):
    """The median of what was timed, and what a tenth of it stays below and above.

    Attributes:
        low: The tenth percentile.
        median: The median.
        high: The ninetieth percentile.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(tenths[0], statistics.median(values), tenths[-1])


class Row(NamedTuple):
    """All rounds of a case.

    Attributes:
        part: As in `smorms3_dist.bench.suite.Case`.
        name: As there.
        system: As there.
        ranks: As there.
        seconds: The spread of every phase, over all rounds.
        rest: What else the last round has told.
    """

    part: str
    name: str
    system: str
    ranks: int
    seconds: dict[str, Spread]
    rest: dict[str, Any]

    @property
    def step(self) -> float:
        """The median of a step, in seconds."""
        return self.seconds["step"].median

    @property
    def in_memcpys(self) -> float | None:
        """A step in units of a memcpy of the gradients, where that was timed beside it."""
        memcpy = self.seconds.get("memcpy")
        return None if memcpy is None else self.step / memcpy.median

    @property
    def beside_itself(self) -> str:
        """What was timed of ours beside the step, in the same processes; in words."""
        return self.in_steps_as_one or self.with_shared_parameters

    @property
    def with_shared_parameters(self) -> str:
        """How long a step takes where the ranks share parameters, if that was timed; in words."""
        shared = self.seconds.get("shared")
        if shared is None:
            return ""
        compared = against(self.step, shared.median)
        return f"share_parameters: {in_words(shared.median)}, {compared}"

    @property
    def in_steps_as_one(self) -> str:
        """How long a step takes beside one of a single array, where that was timed; in words."""
        as_one = self.seconds.get("as one")
        return "" if as_one is None else f"{self.step / as_one.median:.2f} of one array's"


def rows(result: Mapping[str, Any], part: str | None = None) -> list[Row]:
    """The cases of a result, in their order, or those of one part."""
    found: dict[tuple[str, str, str, int], list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        if part in (None, run["part"]):
            key = run["part"], run["name"], run["system"], run["ranks"]
            found.setdefault(key, []).append(run)
    return [
        Row(
            *key,
            {
                phase: Spread.of([value for run in runs for value in run["seconds"][phase]])
                for phase in runs[-1]["seconds"]
            },
            dict(runs[-1]),
        )
        for key, runs in found.items()
    ]


def against(ours: float | None, theirs: float) -> str:
    """How a system compares with this project, in words that say who is faster."""
    if ours is None:
        return ""
    slower = max(theirs / ours, ours / theirs)
    if slower < 1.05:
        return "as fast"
    times = f"{slower:.1f} times" if slower >= 1.95 else f"{slower:.2f} times"
    return f"{times} slower" if theirs > ours else f"**{times} faster**"


def in_words(seconds: float) -> str:
    """Seconds with three digits, in the unit that suits them."""
    for unit, name in ((1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{three_digits(seconds / unit)} {name}"
    return f"{three_digits(seconds / 1e-6)} us"


def three_digits(number: float) -> str:
    """A number with three digits, or more before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def with_spread(spread: Spread) -> str:
    """The median, and between which values eight tenths of all are."""
    if spread.low == spread.high:
        return in_words(spread.median)
    return f"{in_words(spread.median)} ({in_words(spread.low)} to {in_words(spread.high)})"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown."""
    everything = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    for number, line in enumerate(everything):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "| " + " | ".join(cells) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def steps_table(found: Sequence[Row]) -> Iterator[str]:
    """A table of steps, each beside this project's of the same name and as many ranks."""
    ours = {(row.name, row.ranks): row.step for row in found if row.system == OURS}
    by_name = {row.name: row.step for row in found if row.system == OURS}
    lines = []
    for row in found:
        memory = row.rest.get("peak_over_base_bytes")
        reference = ours.get((row.name, row.ranks), by_name.get(row.name))
        lines.append(
            (
                row.name,
                str(row.ranks),
                TITLES[row.system],
                with_spread(row.seconds["step"]),
                "" if row.in_memcpys is None else f"{row.in_memcpys:.2f}",
                row.beside_itself if row.system == OURS else against(reference, row.step),
                "" if memory is None else f"{max(memory) / 2**20:.0f}",
            )
        )
    header = (
        "",
        "ranks",
        "system",
        "step",
        "in memcpys",
        "beside ours",
        "peak it adds, MiB a rank",
    )
    yield from table(header, lines)


def phases_table(found: Sequence[Row]) -> Iterator[str]:
    """A table of all phases."""
    lines = [
        (row.name, str(row.ranks), TITLES[row.system], phase, with_spread(spread))
        for row in found
        for phase, spread in row.seconds.items()
    ]
    yield from table(("", "ranks", "system", "", "time"), lines)


PLACEMENTS = {"staggered": "staggered", "meeting": "meeting a state", "equal": "equal offsets"}
"""Those of `smorms3_dist.bench.rule_kernels`, in words."""


def placements_of(row: Row) -> list[str]:
    """The placements at which kernels were measured."""
    return [placement for placement in PLACEMENTS if f"SMORMS3, {placement}" in row.seconds]


def kernels_table(found: Sequence[Row]) -> Iterator[str]:
    """A table of the kernels of all rules, by placement, and the time a byte beside SMORMS3's."""
    for row in found:
        if "bytes_an_element" not in row.rest:
            continue
        elements, nbytes = row.rest["elements"], row.rest["bytes_an_element"]

        def ns(rule: str, placement: str, row: Row = row, elements: int = elements) -> float:
            return 1e9 * row.seconds[f"{rule}, {placement}"].median / elements

        a_byte = ns("SMORMS3", "staggered") / nbytes["SMORMS3"]
        placements = placements_of(row)
        lines = [
            (
                rule,
                str(count),
                *(f"{ns(rule, placement):.2f}" for placement in placements),
                f"{ns(rule, 'staggered') / count / a_byte:.2f}",
            )
            for rule, count in nbytes.items()
        ]
        yield f"{row.name}:"
        yield ""
        words = (f"ns, {PLACEMENTS[placement]}" for placement in placements)
        yield from table(("rule", "bytes an element", *words, "a byte, SMORMS3 = 1"), lines)
        for other in found:
            if other.system == "c" and other.rest["elements"] == elements:
                taken = 1e9 * other.seconds["SMORMS3"].median / elements
                yield ""
                yield f"A loop in C with the same bits as SMORMS3's: {taken:.2f} ns an element."


def part_table(part: str, found: Sequence[Row]) -> Iterator[str]:
    """The table, or tables, of the cases of a part."""
    if part == "kernel":
        return kernels_table(found)
    return phases_table(found) if part in _BY_PHASE else steps_table(found)


def text(result: Mapping[str, Any], parts: Mapping[str, str] = PARTS) -> str:
    """Everything, for a terminal; the parts are given with their titles."""
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores; load average "
        f"{machine['load_average_at_start']} before, {machine['load_average_at_end']} after"
    ]
    for part, title in parts.items():
        found = rows(result, part)
        if not found:
            continue
        lines += ["", title, "", *part_table(part, found)]
    for failed in result["failed"]:
        lines += ["", f"FAILED: {failed['what']}: {failed['why']}"]
    return "\n".join(lines)
