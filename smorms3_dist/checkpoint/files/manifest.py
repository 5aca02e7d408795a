"""The manifest of one step: what was saved, which file holds which part of it, and its checksums.

Nothing in it depends on how the ranks were laid out but the segments, which are ranges of the
parameters' own elements: a step can be read at any world size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from smorms3_dist.checkpoint.files.blocks import Sums
from smorms3_dist.checkpoint.files.safetensors import DTYPES

Value = bool | int | float | str | None
"""A hyperparameter."""

MAIN = "main"
"""The name of the optimizer that a training usually has."""

RESHARDED = "resharded"
"""The note that the ranks of the training were others than those of the manifest, which versions
before 0.2 could make."""


_DTYPE_NAMES = frozenset(dtype.name for dtype in DTYPES.values())


def full_name(optimizer: str, parameter: str) -> str:
    """The name of a parameter in a checkpoint: its path, after the optimizer's name if not main."""
    return parameter if optimizer == MAIN else f"{optimizer}:{parameter}"


class Array(NamedTuple):
    """One of the arrays that belong to a parameter.

    Attributes:
        parameter: Name of the parameter.
        kind: ``param`` for the parameter itself, ``master`` for its copy in higher precision,
            ``state`` for a state of its update rule.
        state: Name of the state; ``None`` for the other kinds.
    """

    parameter: str
    kind: str
    state: str | None

    def __str__(self) -> str:
        what = {"param": "parameter", "master": "master"}.get(self.kind, f"state {self.state}")
        return f"{what} of {self.parameter}" if self.kind != "param" else f"{what} {self.parameter}"


class StoredSegment(NamedTuple):
    """A range of an array, in the parameter's own offsets, and the tensor that holds it."""

    tensor: str
    array: Array
    start: int
    stop: int


class Location(NamedTuple):
    """A segment, and the file that holds it."""

    segment: StoredSegment
    file: FileRecord


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file of a step.

    Attributes:
        path: Its name in the directory of the step.
        kind: ``shard`` for segments of arrays, ``rank`` for the rest of a rank's state.
        rank: The rank that wrote it.
        host: The host of that rank.
        sums: Its size and checksums.
        segments: What it holds, if it is a shard.
    """

    path: str
    kind: str
    rank: int
    host: str
    sums: Sums
    segments: tuple[StoredSegment, ...] = ()

    @property
    def origin(self) -> str:
        """Whose file it is, for errors."""
        return f"of rank {self.rank} on host {self.host}"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter, and the arrays that belong to it. They all have its shape.

    Attributes:
        name: Path of the parameter in the link, such as ``/l1/W``.
        shape: Its shape.
        dtype: Name of its dtype, such as ``float32``.
        update: How it is updated, in words.
        states: The dtypes of the states of its update rule, by name.
        master: The dtype of its copy in higher precision, if it has one.
        rule_t: How many steps its update rule has made.
        hyperparameters: Those that differ from the optimizer's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    update: str
    states: dict[str, str]
    master: str | None
    rule_t: int
    hyperparameters: dict[str, Value]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def arrays(self) -> Iterator[tuple[Array, str]]:
        """Its arrays with their dtypes."""
        yield Array(self.name, "param", None), self.dtype
        if self.master is not None:
            yield Array(self.name, "master", None), self.master
        for state, dtype in self.states.items():
            yield Array(self.name, "state", state), dtype


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What one step of a checkpoint consists of.

    Attributes:
        step: The iteration of the trainer.
        t: How many steps the optimizer has made.
        epoch: The optimizer's epoch.
        world_size: Number of ranks that wrote it.
        local: Whether each host has its own ranks' files only, in a file system of its own.
        created: When it was written, as `smorms3_dist.checkpoint.files.manifest_json.now` says it.
        versions: The versions of the software, by name.
        hyperparameters: Those of the optimizer.
        loss_scale: The state of loss scaling, if it is used.
        notes: Whatever else is to be kept: JSON, with finite numbers only.
        parameters: The initialized parameters.
        files: The files.
    """

    step: int
    t: int
    epoch: int
    world_size: int
    local: bool
    created: str
    versions: dict[str, str]
    hyperparameters: dict[str, Value]
    loss_scale: dict[str, Value] | None
    notes: dict[str, Any]
    parameters: tuple[Parameter, ...]
    files: tuple[FileRecord, ...]

    @functools.cached_property
    def dtypes(self) -> Mapping[Array, str]:
        """The dtypes of all arrays."""
        return {array: dtype for parameter in self.parameters for array, dtype in parameter.arrays}

    @functools.cached_property
    def sizes(self) -> Mapping[str, int]:
        """The number of elements of each parameter, by its name."""
        return {parameter.name: parameter.size for parameter in self.parameters}

    @functools.cached_property
    def locations(self) -> Mapping[Array, Sequence[Location]]:
        """Where each array lies, in the order of its elements."""
        found: dict[Array, list[Location]] = {array: [] for array in self.dtypes}
        for file in self.files:
            for segment in file.segments:
                found[segment.array].append(Location(segment, file))
        for locations in found.values():
            locations.sort(key=lambda location: location.segment[2:])
        return found

    def rank_file(self, rank: int) -> FileRecord | None:
        """The file with the rest of a rank's state, if there is one."""
        return next((f for f in self.files if f.kind == "rank" and f.rank == rank), None)

    def disagreement(self) -> str | None:
        """What in the manifest does not fit together, in words, if anything does not.

        Names are unique, all dtypes are known, and each array is covered exactly once.
        """
        if len(self.sizes) != len(self.parameters):
            return "parameters names a parameter twice"
        for array, dtype in self.dtypes.items():
            if dtype not in _DTYPE_NAMES:
                return f"parameters has {dtype!r}, which is not known, for {array}"
        if len({file.path for file in self.files}) != len(self.files):
            return "files names a file twice"
        of_ranks = [file.rank for file in self.files if file.kind == "rank"]
        if len(set(of_ranks)) != len(of_ranks):
            return "files has two files of kind rank for one rank"
        for file in self.files:
            path, sums, segments = file.path, file.sums, file.segments
            if sums.block_bytes < 1 or len(sums.blocks) != sums.count:
                return f"{path} has {len(sums.blocks)} checksums for {sums.size} bytes"
            if len({segment.tensor for segment in segments}) != len(segments):
                return f"files has a tensor twice in {path}"
            for segment in segments:
                if segment.array not in self.dtypes:
                    return f"files has a segment of an unknown array in {path}: {segment.array}"
        for array, locations in self.locations.items():
            end = 0
            for (_, _, start, stop), _ in locations:
                if start != end or stop <= start:
                    return (
                        f"files has {array} from element {start} to {stop}, where a range that "
                        f"starts at {end} must come"
                    )
                end = stop
            if end != self.sizes[array.parameter]:
                return f"files has {array} up to element {end} of {self.sizes[array.parameter]}"
        return None
