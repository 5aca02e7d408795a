"""What there is to say about steps: as JSON for programs, and as tables for people."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files.directory import ABANDONED
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import Array, Manifest
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.files.steps import Steps
from smorms3_dist.checkpoint.files.verify import diff, verify
from smorms3_dist.checkpoint.files.worth import Worth, by_worth
from smorms3_dist.checkpoint.tools.progress import Meter, Progress, size_text

import numpy as np

_TOLD = 3
"""How many names an error tells."""

Facts = Any
"""What can be JSON."""


def show(facts: Facts, as_json: bool, text: Callable[[Facts], Iterable[str]]) -> None:
    """Prints facts."""
    if as_json:
        print(json.dumps(_finite(facts), indent=1))
    else:
        for line in text(facts):
            print(printable(line))


def printable(text: str) -> str:
    """A text without what a terminal might take for commands, in one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _finite(facts: Facts) -> Facts:
    """Strings in the place of numbers that JSON does not have."""
    if isinstance(facts, dict):
        return {key: _finite(value) for key, value in facts.items()}
    if isinstance(facts, (list, tuple)):
        return [_finite(value) for value in facts]
    return str(facts) if isinstance(facts, float) and not math.isfinite(facts) else facts


def _table(rows: Sequence[Sequence[str]], right: str) -> list[str]:
    """Lines with columns, those aligned to the right where ``right`` has an ``r``."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _nbytes(manifest: Manifest) -> int:
    return sum(file.sums.size for file in manifest.files)


# list


def foreign(path: Path) -> str | None:
    """What a directory without steps is instead, and what to do, in words; if it is anything."""
    names = sorted(name for name in os.listdir(path) if not name.startswith((".", ABANDONED)))
    holding = [name for name in names if (path / name).is_dir() and _has_steps(path / name)]
    if holding:
        listed = " or ".join(str(path / name) for name in holding[:_TOLD])
        return f"has no steps itself, but what is in it has: give {listed}"
    snapshots = [name for name in names if name.startswith("snapshot_iter_")]
    if snapshots:
        return (
            f"has no steps, but snapshots of Chainer's, such as {snapshots[-1]}, which "
            "chainer.serializers.load_npz loads: load one, and the next save makes a checkpoint"
        )
    if not names:
        return None
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return (
        f"is no directory of checkpoints: it has no steps, but {', '.join(names[:_TOLD])}{more}. "
        "Give the directory that ShardedCheckpoint or save_checkpoint was given"
    )


def _has_steps(path: Path) -> bool:
    try:
        return bool(Steps(path).numbers())
    except CheckpointError:
        return False


def listed(directory: Steps) -> Facts:
    """The steps of a directory, in ascending order."""
    whole, damaged = directory.steps(), directory.damaged()
    worths: dict[int, Worth | None] = {}
    found = []
    for step in sorted([*whole, *damaged]):
        problem = damaged.get(step)
        try:
            manifest = directory.manifest(step)
            facts = {
                "created": manifest.created,
                "t": manifest.t,
                "epoch": manifest.epoch,
                "world_size": manifest.world_size,
                "bytes": _nbytes(manifest),
            }
            worths[step] = Worth.of(manifest)
        except CheckpointError:
            facts = dict.fromkeys(("created", "t", "epoch", "world_size", "bytes"))
        worth = worths.get(step)
        found.append(
            {
                "step": step,
                **facts,
                "whole": problem is None,
                "problem": None if problem is None else str(problem),
                "newest": bool(whole) and step == whole[-1],
                "worth": None if worth is None else worth._asdict(),
            }
        )
    best = None
    last = worths.get(whole[-1]) if whole else None
    if last is not None:
        found_whole = {step: worths.get(step) for step in whole}
        best = next(iter(by_worth(found_whole, last.name, last.mode)), None)
    return [{**each, "best": each["step"] == best} for each in found]


def list_text(steps: Facts) -> Iterable[str]:
    """`listed` as lines."""
    if not steps:
        return ["no steps"]
    rows: list[Sequence[str]] = [("step", "created", "t", "epoch", "ranks", "size", "")]
    for each in steps:
        size = "-" if each["bytes"] is None else size_text(each["bytes"])
        facts = ["-" if each[k] is None else str(each[k]) for k in ("t", "epoch", "world_size")]
        state = f"damaged: {printable(each['problem'])}" if not each["whole"] else "whole"
        if each["newest"]:
            state += ", newest"
        if each["best"]:
            state += f", best: {printable(each['worth']['name'])} {each['worth']['value']:g}"
        rows.append((str(each["step"]), each["created"] or "-", *facts, size, state))
    return _table(rows, "rlrrrrl")


# inspect


def inspected(directory: Steps, step: int) -> Facts:
    """What the manifest of a step says, and which of its files are there."""
    manifest = directory.manifest(step)
    present = {file.path for file in directory.present(manifest)}
    facts = {
        field.name: getattr(manifest, field.name)
        for field in dataclasses.fields(manifest)
        if field.name not in ("groups", "files")
    }
    return {
        "path": str(directory.path_of(step)),
        **facts,
        "bytes": _nbytes(manifest),
        "parameters": [parameter._asdict() for parameter in manifest.parameters],
        "files": [
            {
                "path": file.path,
                "kind": file.kind,
                "rank": file.rank,
                "host": file.host,
                "bytes": file.sums.size,
                "xxh3": file.sums.xxh3,
                "present": file.path in present,
            }
            for file in manifest.files
        ],
    }


def inspect_text(facts: Facts) -> Iterable[str]:
    """`inspected` as lines."""
    yield f"step {facts['step']} in {facts['path']}"
    yield f"created {facts['created']}, t {facts['t']}, epoch {facts['epoch']}"
    where = ", each host with its own files" if facts["local"] else ""
    yield f"saved by {facts['world_size']} ranks{where}, {size_text(facts['bytes'])}"
    yield f"versions: {_pairs(facts['versions'])}"
    if facts["hyperparameters"]:
        yield f"hyperparameters: {_pairs(facts['hyperparameters'])}"
    if facts["loss_scale"] is not None:
        yield f"loss scale: {_pairs(facts['loss_scale'])}"
    elements = sum(math.prod(each["shape"]) for each in facts["parameters"])
    yield ""
    yield f"{len(facts['parameters'])} parameters of {elements} elements:"
    rows: list[Sequence[str]] = [("name", "shape", "dtype", "states", "t", "update")]
    for each in facts["parameters"]:
        states = [f"{name} ({dtype})" for name, dtype in each["states"].items()]
        if each["master"] is not None:
            states.append(f"master ({each['master']})")
        shape, t = str(tuple(each["shape"])), str(each["rule_t"])
        # It goes on with the states, in brackets.
        update = each["update"].partition(" (")[0]
        if each["hyperparameters"]:
            update += f" with {_pairs(each['hyperparameters'])}"
        row = [each["name"], shape, each["dtype"], ", ".join(states) or "-", t, update]
        rows.append([printable(cell) for cell in row])
    yield from _table(rows, "llllrl")
    yield ""
    yield f"{len(facts['files'])} files:"
    rows = [("file", "rank", "host", "size", "")]
    for each in facts["files"]:
        state = "" if each["present"] else "missing here, or of another size"
        row = [each["path"], str(each["rank"]), each["host"], size_text(each["bytes"]), state]
        rows.append([printable(cell) for cell in row])
    yield from _table(rows, "lrlrl")


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


# verify


def verified(directory: Steps, step: int, progress: Progress | None) -> Facts:
    """Reads a step, and tells what is wrong with it."""
    problems = [dataclasses.asdict(problem) for problem in verify(directory, step, progress)]
    elsewhere = 0
    files = nbytes = None
    try:
        manifest = directory.manifest(step)
        expected = directory.expected(manifest)
        files, nbytes = len(expected), sum(file.sums.size for file in expected)
        elsewhere = len(manifest.files) - files
    except CheckpointError:
        assert problems
    return {
        "step": step,
        "problems": problems,
        "files": files,
        "bytes": nbytes,
        "files_of_other_hosts": elsewhere,
    }


def verify_text(steps: Facts) -> Iterable[str]:
    """`verified` of some steps as lines."""
    for each in steps:
        for problem in each["problems"]:
            yield f"step {each['step']}: {problem['path']}: {problem['reason']}"
        if not each["problems"]:
            rest = each["files_of_other_hosts"]
            note = f"; {rest} files are those of other hosts, and not looked at" if rest else ""
            size = size_text(each["bytes"])
            yield f"step {each['step']}: {each['files']} files of {size} are as written{note}"


# diff


def compared(
    first: Steps, step: int, second: Steps, other_step: int, progress: Progress | None
) -> Facts:
    """Compares a step of a directory with one of another."""
    with StepReader(first, step) as ours, StepReader(second, other_step) as theirs:
        sizes = {array: size for reader in (ours, theirs) for array, size in _sizes(reader)}
        meter = Meter(sum(sizes.values()), progress)
        # It is told of an array before that is compared.
        before = 0

        def count(array: Array) -> None:
            nonlocal before
            meter.add(before)
            before = sizes[array]

        differences = []
        for each in diff(ours, theirs, count):
            facts = dataclasses.asdict(each)
            differences.append({**facts, "array": each.array._asdict(), "text": str(each)})
        meter.add(before)
    return {
        "first": str(first.path_of(step)),
        "second": str(second.path_of(other_step)),
        "arrays": len(sizes),
        "differences": differences,
    }


def _sizes(reader: StepReader) -> Iterator[tuple[Array, int]]:
    """All arrays of a step, with their bytes."""
    for parameter in reader.manifest.parameters:
        for array, dtype in parameter.arrays:
            yield array, math.prod(parameter.shape) * np.dtype(dtype).itemsize


def diff_text(facts: Facts) -> Iterable[str]:
    """`compared` as lines."""
    for each in facts["differences"]:
        yield each["text"]
    yield f"{len(facts['differences'])} of {facts['arrays']} arrays differ"
