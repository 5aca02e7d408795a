"""What all reports have alike: tables, conditions, what was expected, and files by date."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MIB = 2**20


class Expectation(NamedTuple):
    """A bound on a number.

    Attributes:
        what: What the number is.
        value: The number.
        at_least: Whether the bound is the smallest that is expected, and not the largest.
        bound: The bound.
    """

    what: str
    value: float
    at_least: bool
    bound: float

    @property
    def met(self) -> bool:
        """Whether the number keeps to the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def row(self) -> tuple[str, ...]:
        """As a row of a table."""
        bound = f"at {'least' if self.at_least else 'most'} {self.bound:g}"
        return self.what, f"{self.value:.2f}", bound, "met" if self.met else "NOT met"


def conditions(result: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the runs were made on, and how busy that was, as lines of a list.

    Args:
        result: The whole result; it has the ``machine``.
        runs: Its runs.
    """
    machine = result["machine"]
    others = [run["cores_used_by_others"] for run in runs]
    yield (
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}; {machine['started']}"
    )
    yield (
        f"- load average {_loads(machine['load_average_at_start'])} at the start, "
        f"{_loads(machine['load_average_at_end'])} at the end; other processes used "
        f"{statistics.median(others):.2f} cores "
        f"(median over the runs; {min(others):.2f} to {max(others):.2f})"
    )


def versions(runs: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """The versions that systems ran with, as lines of a list.

    Args:
        runs: The name of the system, and the run, for each run.
    """
    seen: dict[str, dict[str, str]] = {}
    for name, run in runs:
        seen.setdefault(name, run.get("versions", {}))
    for name, found in seen.items():
        yield f"- {name}: " + ", ".join(f"{key} {value}" for key, value in found.items())


RESET = (
    "- the system does not allow to reset the high-water mark of memory: what a process needed "
    "before is in its peak"
)
"""Is said where `peak_was_reset` is not true of all runs."""


def _loads(averages: Sequence[float]) -> str:
    return "/".join(f"{average:.2f}" for average in averages)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "| " + " | ".join(cells) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def store(result: Mapping[str, Any], text: str, directory: Path, what: str) -> list[Path]:
    """Writes the report and all that was measured, under names that begin with the date.

    Args:
        result: All that was measured.
        text: The report.
        directory: Where they go.
        what: What the names say after the date.
    """
    directory.mkdir(parents=True, exist_ok=True)
    date = result["machine"]["started"].partition(" ")[0]
    taken = {path.stem for path in directory.iterdir()}
    names = (f"{date}-{what}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    name = next(name for name in names if name not in taken)
    files = {".md": text + "\n", ".json": json.dumps(result, indent=1) + "\n"}
    for suffix, text in files.items():
        (directory / (name + suffix)).write_text(text)
    return [directory / (name + suffix) for suffix in files]
