"""Reads steps to see whether they are as they were written, and how two of them differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from smorms3_dist.checkpoint.files.blocks import SummedReader
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import Array
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.files.steps import Steps

import numpy as np

_ELEMENTS = 1 << 18
"""How many elements of each of two steps are compared at once."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is wrong with a step.

    Attributes:
        path: The file.
        reason: What is wrong with it.
        rank: The rank that wrote it; ``None`` for the manifest.
        host: The host of that rank; ``None`` for the manifest.
        start: First byte of the first damaged block, if the file can be read and is damaged.
        stop: One past the last byte of that block.
    """

    path: str
    reason: str
    rank: int | None = None
    host: str | None = None
    start: int | None = None
    stop: int | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def verify(
    directory: Steps, step: int, progress: Callable[[int, int], Any] | None = None
) -> Iterator[Problem]:
    """Reads all of a step that should be in a directory, and compares the checksums.

    Where each host has its own files, those of other hosts are left to their hosts.

    Args:
        directory: The directory of the checkpoints.
        step: A step of it.
        progress: Is called with the number of bytes that have been read, and with how many there
            are.

    Yields:
        The problems, at most one a file.

    Raises:
        CheckpointError: If there is no such step.
    """
    path = directory.path_of(step)
    try:
        step_reader = StepReader(directory, step)
    except CheckpointError as error:
        yield Problem(error.path, error.reason)
        return
    files = directory.expected(step_reader.manifest)
    total = sum(file.sums.size for file in files)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    with step_reader:
        for file in files:
            try:
                with SummedReader(path / file.path, file.sums, file.origin) as reader:
                    damage = reader.find_damage(count)
                    if damage is None:
                        step_reader.open(file)
                    else:
                        reason = reader.error(f"is damaged: {damage}").reason
                        where = (damage.start, damage.stop)
                        yield Problem(str(reader.path), reason, file.rank, file.host, *where)
            except CheckpointError as error:
                yield Problem(error.path, error.reason, file.rank, file.host)


@dataclasses.dataclass(frozen=True)
class Difference:
    """An array that differs between two steps.

    Attributes:
        array: The array.
        change: ``added``, ``removed``, ``reshaped``, ``retyped`` (its dtype) or ``changed``.
        before: Dtype and shape in the first step, as in ``float32 (3, 4)``; ``None`` if added.
        after: Those in the second one; ``None`` if removed.
        count: How many elements differ, where the shapes are equal. Two that are not numbers are
            equal.
        largest: The largest absolute difference of two elements, in float64; infinite where only
            one is a finite number.
    """

    array: Array
    change: str
    before: str | None
    after: str | None
    count: int = 0
    largest: float = 0.0

    def __str__(self) -> str:
        text = f"{self.array}: {self.change}"
        if self.before != self.after:
            text += f", {self.before or 'absent'} -> {self.after or 'absent'}"
        if self.count:
            text += f", {self.count} element{'s' * (self.count > 1)} by up to {self.largest:g}"
        return text


def diff(
    first: StepReader, second: StepReader, progress: Callable[[Array], Any] | None = None
) -> Iterator[Difference]:
    """Compares the parameters of two steps and what belongs to them.

    Args:
        first: One step.
        second: The other, of the same directory or not, saved by any number of ranks.
        progress: Is called with each array before it is compared.

    Yields:
        The arrays that differ, ordered by parameter.

    Raises:
        CheckpointError: If a file of theirs is missing or damaged.
    """
    ours, theirs = _forms(first), _forms(second)
    for array in sorted(ours.keys() | theirs.keys(), key=lambda a: (a[:2], a.state or "")):
        if progress is not None:
            progress(array)
        before, after = ours.get(array), theirs.get(array)
        if before is None or after is None:
            change = "added" if before is None else "removed"
            yield Difference(array, change, _text(before), _text(after))
        elif before[1] != after[1]:
            yield Difference(array, "reshaped", _text(before), _text(after))
        else:
            count, largest = _compare(first, second, array)
            if count or before != after:
                change = "changed" if before == after else "retyped"
                yield Difference(array, change, _text(before), _text(after), count, largest)


_Form = tuple[str, tuple[int, ...]]


def _forms(reader: StepReader) -> dict[Array, _Form]:
    """Dtypes and shapes of all arrays of a step."""
    return {
        array: (dtype, parameter.shape)
        for parameter in reader.manifest.parameters
        for array, dtype in parameter.arrays
    }


def _text(form: _Form | None) -> str | None:
    return None if form is None else f"{form[0]} {form[1]}"


def _compare(first: StepReader, second: StepReader, array: Array) -> tuple[int, float]:
    count = 0
    largest = 0.0
    blocks = zip(first.whole(array, _ELEMENTS), second.whole(array, _ELEMENTS), strict=True)
    for ours, theirs in blocks:
        differ = (ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs))
        if differ.any():
            count += int(differ.sum())
            # Infinite minus infinite is not a number, and neither is what only one of them is.
            with np.errstate(invalid="ignore", over="ignore"):
                change = np.abs(ours[differ].astype(np.float64) - theirs[differ])
            largest = max(largest, float(np.where(np.isnan(change), np.inf, change).max()))
    return count, largest
