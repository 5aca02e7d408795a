"""Tables of the results of `checkpoint.py`, and what was expected of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.report import MIB, RESET, Expectation, conditions, table, versions

OURS = "smorms3_dist"
TORCH = "torch.distributed.checkpoint"

PHASES = {
    "save": ("save, until it is there for good", "write"),
    "stall": ("save in the background: stall", "memcpy"),
    "first_stall": ("the same, the first time", "memcpy"),
    "background": ("the same: the rest, waiting", None),
    "load": ("load, from the page cache", "read"),
    "reshard": ("load what {makers} ranks saved, from the page cache", "read"),
    "load_dropped": ("load, page cache dropped", "read_dropped"),
    "reshard_dropped": ("load what {makers} ranks saved, page cache dropped", "read_dropped"),
}
"""What is said of the phases, and the plain thing that each is compared with."""

PLAIN = {
    "memcpy": "memcpy, one array",
    "memcpy_in_4": "memcpy, four arrays",
    "write": "plain write and fsync",
    "read": "plain read, from the page cache",
    "read_dropped": "plain read, page cache dropped",
}

PEAKS = {
    "load": "load (the first thing that is done)",
    "save": "save",
    "save_in_background": "save in the background",
}


def progress(run: Mapping[str, Any]) -> str:
    """One line about a run, for somebody who waits."""
    times = run["seconds"]
    return (
        f"round {run['round'] + 1}: {run['model']} {run['system']}: save {times['save']:.2f} s, "
        f"stall {times['stall']:.3f} s, load {times['load']:.2f} s; "
        f"others used {run['cores_used_by_others']} cores"
    )


class Summary(NamedTuple):
    """Medians over the rounds of one system with one model.

    Attributes:
        seconds: By phase.
        ratios: Of each phase to the plain thing beside it: medians of the rounds' own ratios.
        peaks: MiB over base a rank, of the rank that has most, by what was done.
        own: Bytes that the rank owns which owns most.
        bytes: Bytes of all ranks.
        steps: Seconds of steps of training, without and with a save, if there were any.
    """

    seconds: dict[str, float]
    ratios: dict[str, float]
    peaks: dict[str, float]
    own: int
    bytes: int
    steps: dict[str, float]


def summarize(runs: Sequence[Mapping[str, Any]]) -> Summary:
    """Condenses the runs of one system with one model."""
    times = [run["seconds"] | {"first_stall": run["first_stall_s"]} for run in runs]
    return Summary(
        {phase: statistics.median(t[phase] for t in times) for phase in times[0]},
        {
            phase: statistics.median(t[phase] / t[plain] for t in times)
            for phase, (_, plain) in PHASES.items()
            if plain is not None
        },
        {
            kind: statistics.median(max(run["peak_over_base_bytes"][kind]) / MIB for run in runs)
            for kind in PEAKS
        },
        max(runs[0]["own_bytes"]),
        sum(runs[0]["own_bytes"]),
        {
            kind: statistics.median(run["steps_s"][kind] for run in runs)
            for kind in runs[0]["steps_s"]
        },
    )


def expectations(ours: Summary, torch: Summary | None) -> Iterator[Expectation]:
    """What is expected of the model of 59M parameters."""
    yield Expectation("stall / memcpy", ours.ratios["stall"], False, 1.3)
    for suffix, words in ("", "from the page cache"), ("_dropped", "page cache dropped"):
        yield Expectation(
            f"throughput with another number of ranks / with the same, {words}",
            ours.seconds["load" + suffix] / ours.seconds["reshard" + suffix],
            True,
            0.8,
        )
    if torch is not None:
        for phase in ("save", "stall", "load", "reshard", "load_dropped", "reshard_dropped"):
            yield Expectation(
                f"{phase.replace('_', ', page cache ')}: time of PyTorch / ours",
                torch.seconds[phase] / ours.seconds[phase],
                True,
                1,
            )


def markdown(result: Mapping[str, Any]) -> str:
    """The whole report."""
    runs = result["runs"]
    keys = dict.fromkeys((run["model"], run["system"]) for run in runs)
    summaries = {
        key: summarize([run for run in runs if (run["model"], run["system"]) == key])
        for key in keys
    }
    lines = [f"# Checkpoints, {result['ranks']} ranks", "", *_conditions(result)]
    for model in dict.fromkeys(model for model, _ in keys):
        ours = summaries[model, OURS]
        parameters = next(run["parameters"] for run in runs if run["model"] == model)
        lines += [
            "",
            f"## {model}: {parameters / 1e6:.1f} million parameters, {ours.bytes / 1e9:.2f} GB",
            "",
            *_times(ours, summaries.get((model, TORCH)), result["makers"]),
        ]
        if ours.steps:
            alone, saving = 1e3 * ours.steps["step"], 1e3 * ours.steps["step_saving"]
            lines += [
                "",
                f"Steps of training, without forward and backward pass: {alone:.1f} ms; while a "
                f"save goes on in the background: {saving:.1f} ms.",
            ]
    if ("59M", OURS) in summaries:
        expected = expectations(summaries["59M", OURS], summaries.get(("59M", TORCH)))
        header = ("expected with 59M", "measured", "bound", "")
        lines += ["", *table(header, [item.row() for item in expected])]
    return "\n".join(lines)


def _times(ours: Summary, torch: Summary | None, makers: int) -> Iterator[str]:
    header = ("", f"{OURS}, s", "GB/s", "/ plain", f"{TORCH}, s", "GB/s", "/ plain", "time / ours")
    rows = []
    for phase, (words, plain) in PHASES.items():
        row = [words.format(makers=makers)]
        for system in (ours, torch):
            if system is None:
                row += ["", "", ""]
                continue
            seconds = system.seconds[phase]
            ratio = f"{system.ratios[phase]:.2f}" if plain else ""
            row += [f"{seconds:.3f}", f"{system.bytes / seconds / 1e9:.2f}", ratio]
        row.append("" if torch is None else f"{torch.seconds[phase] / ours.seconds[phase]:.2f}")
        rows.append(row)
    for phase, words in PLAIN.items():
        row = [words]
        for system in (ours, torch):
            seconds = None if system is None else system.seconds[phase]
            row += (
                ["", "", ""]
                if system is None or seconds is None
                else [f"{seconds:.3f}", f"{system.bytes / seconds / 1e9:.2f}", ""]
            )
        rows.append([*row, ""])
    yield from table(header, rows)
    yield ""
    peaks = [
        (words, *("" if s is None else f"{s.peaks[kind]:.0f}" for s in (ours, torch)))
        for kind, words in PEAKS.items()
    ]
    yield from table(
        (f"peak over base, MiB a rank, which owns {ours.own / MIB:.0f}", OURS, TORCH), peaks
    )


def _conditions(result: Mapping[str, Any]) -> Iterator[str]:
    runs = result["runs"]
    yield from conditions(result, runs)
    yield (
        f"- files on {result['machine']['file_system']}; {result['rounds']} rounds of "
        f"{result['steps']} saves and loads; 1 thread a rank"
    )
    least = min(run["read_from_disk"] for run in runs)
    yield f"- where the page cache was dropped, {least:.0%} of the bytes or more came from the disk"
    yield from versions((run["system"], run) for run in runs)
    if not all(run["peak_was_reset"] for run in runs):
        yield RESET
