"""The manifest of one step: what was saved, which file holds which part of it, and its checksums.

Parameters that have the same arrays are a *group*, and stand in it one behind the other, without
gaps. One array of each of them, in that order, is a *line*: all parameters of the group, or all
their states of one name. Files hold ranges of lines. So thousands of small parameters take no more
records than one large one, and nothing but where ranges end depends on how the ranks were laid out:
a step can be read at any world size.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
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


class GroupLine(NamedTuple):
    """One array of each parameter of a group, one behind the other.

    Attributes:
        group: The group's number in the manifest.
        kind: As in `Array`.
        state: As in `Array`.
    """

    group: int
    kind: str
    state: str | None


class StoredRange(NamedTuple):
    """A range of a line, and the tensor that holds it; counted in the elements of the line."""

    tensor: str
    line: GroupLine
    start: int
    stop: int


class Location(NamedTuple):
    """A range of a line, and the file that holds it."""

    range: StoredRange
    file: FileRecord


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file of a step.

    Attributes:
        path: Its name in the directory of the step.
        kind: ``shard`` for ranges of lines, ``rank`` for the rest of a rank's state.
        rank: The rank that wrote it.
        host: The host of that rank.
        sums: Its size and checksums.
        ranges: What it holds, if it is a shard.
    """

    path: str
    kind: str
    rank: int
    host: str
    sums: Sums
    ranges: tuple[StoredRange, ...] = ()

    @property
    def origin(self) -> str:
        """Whose file it is, for errors."""
        return f"of rank {self.rank} on host {self.host}"


class Parameter(NamedTuple):
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
    def arrays(self) -> Iterator[tuple[Array, str]]:
        """Its arrays with their dtypes."""
        for (kind, state), dtype in _dtypes(self).items():
            yield Array(self.name, kind, state), dtype


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that have the same arrays, in the order in which lines have them.

    Attributes:
        dtype: As in `Parameter`, of all of them; so are the next three.
        update: How they are updated.
        states: The dtypes of their states.
        master: The dtype of their masters.
        names: Their names.
        shapes: Their shapes.
        rule_t: How many steps the update rule of each has made.
        hyperparameters: Those that differ from the optimizer's, by name, for those that have any.
    """

    dtype: str
    update: str
    states: dict[str, str]
    master: str | None
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    rule_t: tuple[int, ...]
    hyperparameters: dict[str, dict[str, Value]]

    @functools.cached_property
    def starts(self) -> Sequence[int]:
        """The first element of each in a line, and last the number of elements of a line."""
        return [0, *itertools.accumulate(map(math.prod, self.shapes))]

    @property
    def size(self) -> int:
        """Number of elements of a line."""
        return self.starts[-1]

    def place(self, element: int) -> tuple[str, int]:
        """The parameter to which an element of a line belongs, and its offset there."""
        index = bisect.bisect_right(self.starts, element) - 1
        return self.names[index], element - self.starts[index]

    def span(self, start: int, stop: int) -> str:
        """A range of a line that is not empty, in words: of which parameters it has what."""
        (first, start_p), (last, stop_p) = self.place(start), self.place(stop - 1)
        if first == last:
            return f"{first} {start_p}:{stop_p + 1}"
        return f"{first} {start_p}: to {last} :{stop_p + 1}"

    def parameters(self) -> Iterator[Parameter]:
        """The parameters, one by one."""
        alike = self.dtype, self.update, self.states, self.master
        for name, shape, t in zip(self.names, self.shapes, self.rule_t, strict=True):
            yield Parameter(name, shape, *alike, t, self.hyperparameters.get(name, {}))


def _dtypes(of: Parameter | ParameterGroup) -> dict[tuple[str, str | None], str]:
    """The dtypes of the arrays that a parameter has, by kind and state."""
    found: dict[tuple[str, str | None], str] = {("param", None): of.dtype}
    if of.master is not None:
        found["master", None] = of.master
    return found | {("state", state): dtype for state, dtype in of.states.items()}


@dataclasses.dataclass(frozen=True, repr=False)
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
        groups: The initialized parameters.
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
    groups: tuple[ParameterGroup, ...]
    files: tuple[FileRecord, ...]

    def __repr__(self) -> str:
        count = sum(len(group.names) for group in self.groups)
        return (
            f"<Manifest of step {self.step}: t={self.t}, epoch={self.epoch}, {self.world_size} "
            f"ranks, {count} parameters>"
        )

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters, ordered by name."""
        everybody = itertools.chain.from_iterable(group.parameters() for group in self.groups)
        return tuple(sorted(everybody, key=lambda parameter: parameter.name))

    @functools.cached_property
    def places(self) -> Mapping[str, tuple[int, int]]:
        """Of each parameter, by its name, the number of its group and its index there."""
        return {
            name: (number, index)
            for number, group in enumerate(self.groups)
            for index, name in enumerate(group.names)
        }

    @functools.cached_property
    def lines(self) -> Mapping[GroupLine, str]:
        """The dtypes of all lines."""
        return {
            GroupLine(number, kind, state): dtype
            for number, group in enumerate(self.groups)
            for (kind, state), dtype in _dtypes(group).items()
        }

    @functools.cached_property
    def locations(self) -> Mapping[GroupLine, Sequence[Location]]:
        """Where each line lies, in the order of its elements."""
        found: dict[GroupLine, list[Location]] = {line: [] for line in self.lines}
        for file in self.files:
            for each in file.ranges:
                found[each.line].append(Location(each, file))
        for locations in found.values():
            locations.sort(key=lambda location: location.range[2:])
        return found

    def line_of(self, array: Array) -> tuple[GroupLine, int, int] | None:
        """The line that an array is a part of, its first element there and one past its last."""
        number, index = self.places.get(array.parameter, (-1, 0))
        line = GroupLine(number, array.kind, array.state)
        if line not in self.lines:
            return None
        starts = self.groups[number].starts
        return line, starts[index], starts[index + 1]

    def rank_file(self, rank: int) -> FileRecord | None:
        """The file with the rest of a rank's state, if there is one."""
        return next((f for f in self.files if f.kind == "rank" and f.rank == rank), None)

    def disagreement(self) -> str | None:
        """What in the manifest does not fit together, in words, if anything does not.

        Fields have their types, names are unique, all dtypes are known, and each line is covered
        exactly once.
        """
        wrong = self._wrong_type()
        if wrong is not None:
            return wrong
        names = [*itertools.chain.from_iterable(group.names for group in self.groups)]
        if len(set(names)) != len(names):
            return "groups names a parameter twice"
        for group in self.groups:
            if not len(group.names) == len(group.shapes) == len(group.rule_t) > 0:
                return f"groups has one that gives {_listed(group)}"
            if not group.hyperparameters.keys() <= set(group.names):
                return f"groups has hyperparameters of others than those of {group.names[0]}"
        for line, dtype in self.lines.items():
            if dtype not in _DTYPE_NAMES:
                array = Array(self.groups[line.group].names[0], line.kind, line.state)
                return f"groups has {dtype!r}, which is not known, for {array}"
        if len({file.path for file in self.files}) != len(self.files):
            return "files names a file twice"
        of_ranks = [file.rank for file in self.files if file.kind == "rank"]
        if len(set(of_ranks)) != len(of_ranks):
            return "files has two files of kind rank for one rank"
        for file in self.files:
            path, sums, ranges = file.path, file.sums, file.ranges
            if sums.block_bytes < 1 or len(sums.blocks) != sums.count:
                return f"{path} has {len(sums.blocks)} checksums for {sums.size} bytes"
            if len({each.tensor for each in ranges}) != len(ranges):
                return f"files has a tensor twice in {path}"
            for each in ranges:
                if each.line not in self.lines:
                    return f"files has a range of an unknown line in {path}: {tuple(each.line)}"
        for line, locations in self.locations.items():
            fault = self._gap(line, locations)
            if fault is not None:
                return fault
        return None

    def _gap(self, line: GroupLine, locations: Sequence[Location]) -> str | None:
        """Where a line is not covered exactly once, in words, if it is not."""
        group = self.groups[line.group]

        def at(element: int) -> str:
            name, offset = group.place(element)
            return f"element {offset} of {Array(name, line.kind, line.state)}"

        end = 0
        for (_, _, start, stop), _ in locations:
            if start != end or not start < stop <= group.size:
                here = at(start) if start < group.size else f"element {start} of {line}"
                return (
                    f"files has {stop - start} elements from {here} on, where a range that starts "
                    f"at {at(end) if end < group.size else 'no element'} must come"
                )
            end = stop
        return None if end == group.size else f"files has nothing from {at(end)} on"

    def _wrong_type(self) -> str | None:
        for name, value, right in self._types():
            if not right:
                return f"has {value!r:.80} as {name}, which cannot be"
        return None

    def _types(self) -> Iterator[tuple[str, Any, bool]]:
        """Each field with its name, and whether it can be what it is."""
        for name in ("step", "t", "epoch"):
            yield name, getattr(self, name), is_count(getattr(self, name))
        yield "world_size", self.world_size, is_count(self.world_size, 1)
        yield "local", self.local, isinstance(self.local, bool)
        yield "created", self.created, isinstance(self.created, str)
        for name in ("versions", "hyperparameters", "notes"):
            yield name, getattr(self, name), isinstance(getattr(self, name), dict)
        for g in self.groups:
            yield "states of a group", g.states, isinstance(g.states, dict)
            own = g.hyperparameters
            yield "hyperparameters of a group", own, isinstance(own, dict)
            yield "names of parameters", g.names, set(map(type, g.names)) <= {str}
            lengths = itertools.chain.from_iterable(g.shapes)
            yield "shapes of parameters", g.shapes, _are_counts([*lengths])
            yield "rule_t of parameters", g.rule_t, _are_counts(g.rule_t)
        for f in self.files:
            yield "path of a file", f.path, isinstance(f.path, str)
            yield f"kind of {f.path}", f.kind, f.kind in ("shard", "rank")
            yield f"rank of {f.path}", f.rank, is_count(f.rank) and f.rank < self.world_size
            yield f"host of {f.path}", f.host, isinstance(f.host, str)
            for each in f.ranges:
                numbers = each.line.group, each.start, each.stop
                yield f"a range in {f.path}", numbers, all(map(is_count, numbers))


def _listed(group: ParameterGroup) -> str:
    return f"{len(group.names)} names, {len(group.shapes)} shapes and {len(group.rule_t)} rule_t"


def _are_counts(values: Sequence[Any]) -> bool:
    """Whether all are what `is_count` says."""
    return set(map(type, values)) <= {int} and min(values, default=0) >= 0


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a value is an integer that is not below another."""
    return type(value) is int and value >= least
