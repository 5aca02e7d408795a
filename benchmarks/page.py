"""``python -m benchmarks page``: puts tables and pictures of stored runs into docs/benchmarks.md.

The page is written by hand; what stands between a mark ``<!-- results: NAME -->`` and the next
heading is made here.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import pictures
from benchmarks.cases import MAKERS, PARTS, ROOT
from benchmarks.stored import Result, merged, newest_of_parts, stored
from smorms3_dist.bench import simulation, summary
from smorms3_dist.bench.summary import OURS, TITLES, Row, against, in_words, table, with_spread

PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = Path("static") / "benchmarks"
"""Beside the page."""

NOTHING = "No run is stored."

CHECKPOINTS = {
    "save": ("save, until it is there for good", "write"),
    "stall": ("save in the background: stall", "memcpy"),
    "first_stall": ("the same, the first time", "memcpy"),
    "load": ("load, from the page cache", "read"),
    "reshard": (f"load what {MAKERS} ranks saved, from the page cache", "read"),
    "load_dropped": ("load, page cache dropped", "read_dropped"),
    "reshard_dropped": (f"load what {MAKERS} ranks saved, page cache dropped", "read_dropped"),
}
"""What is said of the phases, and the plain copying that each is compared with."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks page", allow_abbrev=False)
    parser.add_argument(
        "files", type=Path, nargs="*", help="results to take, in the place of benchmarks/results"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write to")
    options = parser.parse_args(arguments)
    results = stored(options.files)
    text = made(options.page.read_text(), results, options.page.parent)
    options.page.write_text(text)
    print(f"{options.page}: of {len(results)} stored runs")
    return 0


def made(text: str, results: Sequence[Result], folder: Path) -> str:
    """The page with what was measured.

    Args:
        text: The page, with marks.
        results: Stored runs.
        folder: Where the page is; pictures go to a folder beside it.
    """
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for old in (folder / PICTURES).glob("*.png"):
        old.unlink()
    page = _Page(results, folder)
    names = re.findall(r"<!-- results: ([\w ]+) -->", text)
    for name in names:
        lines = "\n".join(page.section(name)) or NOTHING
        mark = rf"(<!-- results: {name} -->\n).*?(?=\n## |\Z)"
        text = re.sub(mark, lambda m, lines=lines: f"{m[1]}{lines}\n", text, flags=re.S)
    return text


class _Page:
    def __init__(self, results: Sequence[Result], folder: Path) -> None:
        self._of_part = newest_of_parts(results)
        # By identity: results cannot be hashed.
        self._used = [*{id(result): result for result in self._of_part.values()}.values()]
        self._folder = folder
        self._recording: simulation.Recording | None = None
        if results:
            with contextlib.suppress(simulation.NotRecorded):
                self._recording = simulation.Recording(merged(self._of_part))

    def section(self, name: str) -> Iterator[str]:
        """The lines of a section: of the conditions, the model, or a part."""
        if name == "conditions":
            for result in self._used:
                yield from _conditions(result)
        elif name == "model":
            if self._recording is not None:
                pictures.model(self._path("model"), self._recording, simulation.MOST_RANKS)
                yield from self._shown("model", "Steps of up to 4096 ranks, foretold")
                yield from simulation.checked(self._recording)
        elif name in self._of_part:
            found = summary.rows(self._of_part[name], name)
            if name == "ranks":
                found = sorted(found, key=lambda row: (row.ranks, row.system != OURS))
            yield from self._picture(name, found)
            yield from _table(name, found)

    def _picture(self, part: str, found: list[Row]) -> Iterator[str]:
        path = self._path(part)
        if part in ("step", "hooks", "rules", "links"):
            pictures.bars(path, f"{PARTS[part]}, 2 ranks unless said", pictures.grouped(found))
        elif part == "ranks":
            pictures.over_ranks(path, found, self._recording)
        elif part == "whole":
            pictures.whole_steps(path, found)
        elif part == "kernel":
            pictures.kernels(path, next(row for row in found if row.system == OURS))
        elif part == "checkpoint":
            largest = [row for row in found if row.name == found[0].name]
            phases = {
                CHECKPOINTS[phase][0]: {row.system: row.seconds[phase] for row in largest}
                for phase in ("save", "stall", "load", "reshard", "load_dropped", "reshard_dropped")
            }
            pictures.bars(path, f"Checkpoints of {found[0].name}, 2 ranks", phases, False)
        else:
            return
        yield from self._shown(part, PARTS[part])

    def _path(self, name: str) -> Path:
        return self._folder / PICTURES / f"{name}.png"

    def _shown(self, name: str, words: str) -> Iterator[str]:
        yield f"![{words}]({(PICTURES / name).as_posix()}.png)"
        yield ""


def _conditions(result: Result) -> Iterator[str]:
    """What a run was made on, and how busy that was."""
    machine = result["machine"]
    others = [run["cores_used_by_others"] for run in result["runs"]]
    parts = dict.fromkeys(run["part"] for run in result["runs"])
    some = "" if len(parts) == len(PARTS) else f"; parts: {', '.join(parts)}"
    versions: dict[str, str] = {}
    for of_system in result["versions"].values():
        versions |= of_system
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "flags")
    for line in (
        f"{machine['started']}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}{some}",
        f"rounds: {result['rounds']}; other processes used {statistics.median(others):.2f} cores "
        f"(median over the cases; {max(others):.2f} at most)",
        told,
    ):
        words = textwrap.TextWrapper(118, subsequent_indent="  ", break_on_hyphens=False)
        yield from words.wrap(f"- {line}")
    for failed in result["failed"]:
        yield f"- **failed**: {failed['what']}"


def _table(part: str, found: Sequence[Row]) -> Iterator[str]:
    makers = {part: _by_system for part in ("step", "hooks", "rules", "links")}
    makers |= {"whole": _whole, "start": _start, "ranks": _ranks, "checks": _checks}
    if part in makers:
        yield from makers[part](found)
    elif part == "checkpoint":
        yield from _checkpoints(found)
    else:
        yield from summary.part_table(part, found)


def _by_system(found: Sequence[Row]) -> Iterator[str]:
    """A line for each name, a column for each system: the step, how it compares, the peak."""
    systems = list(dict.fromkeys(row.system for row in found))
    names = list(dict.fromkeys(row.name for row in found))
    by_both = {(row.name, row.system): row for row in found}
    lines = []
    for name in names:
        ours = by_both.get((name, OURS))
        cells = [name]
        for system in systems:
            row = by_both.get((name, system))
            words = []
            if row is not None:
                words = [with_spread(row.seconds["step"]), f"{row.in_memcpys:.1f} memcpys"]
                words += filter(None, [row.in_steps_as_one])
                if system != OURS:
                    words[1] = against(None if ours is None else ours.step, row.step)
                if (mib := _mib(row)) is not None:
                    own = None if ours is None else _mib(ours)
                    less = own is not None and mib < 0.95 * own
                    words.append(f"{mib:.0f} MiB" + ", **less**" * less)
            cells.append("; ".join(words))
        lines.append(cells)
    yield from table(("", *(TITLES[system] for system in systems)), lines)


def _mib(row: Row) -> float | None:
    """What optimizer and communication add to the peak of the rank that has most, if known."""
    peaks = row.rest.get("peak_over_base_bytes")
    return None if peaks is None else max(peaks) / 2**20


def _start(found: Sequence[Row]) -> Iterator[str]:
    (row,) = found
    lines = [(phase, with_spread(spread)) for phase, spread in row.seconds.items()]
    yield from table(("", "time"), lines)


def _ranks(found: Sequence[Row]) -> Iterator[str]:
    lines = []
    for ours in (row for row in found if row.system == OURS):
        others = [row for row in found if row.ranks == ours.ranks and row.system != OURS]
        memcpys = f"{ours.in_memcpys:.2f}"
        line = [str(ours.ranks), with_spread(ours.seconds["step"]), memcpys, "", ""]
        if others:
            line[3:] = with_spread(others[0].seconds["step"]), against(ours.step, others[0].step)
        shared = ours.seconds.get("shared")
        if shared is not None:
            line += with_spread(shared), against(ours.step, shared.median)
        lines.append(line)
    header = ["ranks", OURS, "in memcpys", TITLES["chainermn"], "beside ours"]
    header += ["share_parameters", "beside ours"][: max(map(len, lines)) - len(header)]
    lines = [line + [""] * (len(header) - len(line)) for line in lines]
    yield from table(header, lines)


def _checks(found: Sequence[Row]) -> Iterator[str]:
    """What is checked in units of the step beside it in the same processes, or of that case."""
    synced = next((row for row in found if "check_sync" in row.seconds), None)
    if synced is None:
        return
    memcpy = synced.seconds["memcpy"].median
    taken = {"a step of 59M": synced.seconds["step"], "check_sync()": synced.seconds["check_sync"]}
    taken |= {
        f"a step of {r.name}": r.seconds["step"]
        for r in found
        if r is not synced and "recorded" not in r.seconds
    }
    lines = [
        (
            what,
            with_spread(spread),
            f"{spread.median / synced.step:.3f}",
            f"{spread.median / memcpy:.2f}",
        )
        for what, spread in taken.items()
    ]
    for row in (row for row in found if "recorded" in row.seconds):
        for what, phase in (("a step", "recorded"), ("a StepReport", "report")):
            spread = row.seconds[phase]
            beside = f"{spread.median / row.step:.3f}"
            lines.append((f"{what} of {row.name}", with_spread(spread), beside, ""))
    yield from table(("", "time", "in steps", "in memcpys"), lines)


def _whole(found: Sequence[Row]) -> Iterator[str]:
    lines = []
    for row in found:
        ours = next(r for r in found if r.name == row.name and r.system == OURS)
        parts = pictures.phases_of(row)
        update = sum(seconds for phase, seconds in parts.items() if "ward" not in phase)
        compared = against(ours.step, row.step) if row.ranks == ours.ranks else ""
        if row.system == OURS:
            compared = ""
        lines.append(
            (
                f"{row.name}, {row.rest['parameters'] / 1e6:.1f}M",
                str(row.ranks),
                TITLES[row.system],
                with_spread(row.seconds["step"]),
                f"{update / row.step:.0%}",
                compared,
                str(row.rest["page_faults"]),
            )
        )
    header = ("", "ranks", "system", "whole step", "of it the update", "beside ours", "page faults")
    yield from table(header, lines)


def _checkpoints(found: Sequence[Row]) -> Iterator[str]:
    names = list(dict.fromkeys(row.name for row in found))
    lines = []
    for name in names:
        of_name = {row.system: row for row in found if row.name == name}
        ours, theirs = of_name[OURS], of_name.get("torch")
        # Of the models but the first, what users wait for.
        phases = CHECKPOINTS if name == names[0] else ("save", "stall", "load", "reshard")
        for phase in phases:
            what, plain = CHECKPOINTS[phase]
            own = ours.seconds[phase]
            times = f"{own.median / ours.seconds[plain].median:.2f}"
            beside = ("", "")
            if theirs is not None:
                other = theirs.seconds[phase]
                beside = with_spread(other), against(own.median, other.median)
            lines.append((name, what, with_spread(own), times, *beside))
    yield from table(("", "", OURS, "in plain copies", TITLES["torch"], "beside ours"), lines)
    yield ""
    of_name = {row.system: row for row in found if row.name == names[0]}
    ours, theirs = of_name[OURS], of_name.get("torch")
    owned = max(ours.rest["own_bytes"]) / 2**20
    yield f"- of {names[0]} a rank owns {owned:.0f} MiB"
    for kind, peaks in ours.rest["peaks_over_base_bytes"].items():
        words = f"- to {kind.replace('_', ' ')} takes {max(peaks) / 2**20:.0f} MiB a rank"
        if theirs is not None:
            others = theirs.rest["peaks_over_base_bytes"][kind]
            words += f", PyTorch {max(others) / 2**20:.0f} MiB"
        yield words
    if "step_saving" in ours.seconds:
        alone, saving = (ours.seconds[kind].median for kind in ("step", "step_saving"))
        yield (
            f"- a step without forward and backward pass takes {in_words(alone)}, and "
            f"{in_words(saving)} while a save goes on in the background"
        )
