"""The arrays that a rank owns of models: as they are written, and read back into them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from smorms3_dist.checkpoint.files.manifest import GroupLine, full_name
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.files.writing import Chunk
from smorms3_dist.checkpoint.model_state import Optimizers, SavedGroup, saved_groups
from smorms3_dist.device.memory import STATES, CudaMemory, HostMemory, Memory, assign
from smorms3_dist.kernels.segments import MASTER
from smorms3_dist.layout import Segment
from smorms3_dist.optimizer.optimizer import ShardedOptimizer
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.sharded_model import AnyGroup, ShardedModel
from smorms3_dist.sharding.states import IN_FLIGHT

import numpy as np

_Key = tuple[Any, ...]


class HostCopies:
    """Memory on the host for a copy of what a rank owns, kept from one save to the next."""

    def __init__(self) -> None:
        self._copies: dict[_Key, np.ndarray] = {}

    def copy(self, optimizers: Optimizers, in_place: bool) -> list[Chunk]:
        """What this rank owns of the parameters, masters and states.

        Args:
            optimizers: The optimizers of the models, laid out.
            in_place: Whether what is in host memory already is not copied.

        Returns:
            Copies, valid until the next call; or if in place, the arrays themselves, as long as
            nothing is updated.
        """
        used: dict[_Key, np.ndarray] = {}

        def on_host(key: _Key, source: Any, memory: Memory) -> np.ndarray:
            if in_place and not hasattr(source, "get"):
                return source
            if key not in used:
                used[key] = self._copy(key, source, memory)
            return used[key]

        chunks: list[Chunk] = []
        for number, saved in enumerate(saved_groups(optimizers)):
            rank = optimizers[saved.optimizer].sharded_model.rank
            shard = saved.group.layout.shards[rank]
            segments = [s for s in shard.segments if s.slot.index in saved.members]
            chunks += _parameters(number, saved, segments, rank, on_host)
            if saved.arrays:
                chunks += _states(number, saved, segments, on_host)
        self._copies = used
        return chunks

    def _copy(self, key: _Key, source: Any, memory: Memory) -> np.ndarray:
        values = self._copies.get(key)
        # Each optimizer of a checkpoint may have a GPU of its own.
        with memory.current():
            if values is None or values.shape != source.shape or values.dtype != source.dtype:
                values = _host_array(memory, source.size, source.dtype)
            if hasattr(source, "get"):
                source.get(out=values)
            else:
                np.copyto(values, source)
        return values


_OnHost = Callable[[_Key, Any, Memory], np.ndarray]


def _host_array(memory: Memory, size: int, dtype: np.dtype) -> np.ndarray:
    what = "the copy of a shard that a checkpoint is written from"
    if isinstance(memory, CudaMemory):
        return memory.pinned(size, dtype, what)
    return memory.empty(size, dtype, what)


def _parameters(
    number: int, saved: SavedGroup, segments: list[Segment], rank: int, on_host: _OnHost
) -> Iterator[Chunk]:
    group, starts_f = saved.group, [segment.start_f for segment in segments]
    for index, bucket in enumerate(group.layout.buckets):
        part_f = bucket.part_of(rank)
        key = saved.optimizer, saved.number, "param", index
        values = on_host(key, group.buffers.flat[part_f], group.memory)
        inside = segments[bisect_left(starts_f, part_f.start) : bisect_left(starts_f, part_f.stop)]
        runs = _runs(
            (number, saved.members[s.slot.index] + s.start_p, s.start_f - part_f.start, s.size)
            for s in inside
        )
        yield from _chunks(GroupLine(number, "param", None), runs, values)


def _states(
    number: int, saved: SavedGroup, segments: list[Segment], on_host: _OnHost
) -> Iterator[Chunk]:
    group = saved.group
    assert isinstance(group, ShardedGroup)
    key = saved.optimizer, saved.number, "states"
    block = on_host(key, group.states.block, group.memory)
    runs = _runs(
        (number, saved.members[s.slot.index] + s.start_p, s.start_s, s.size) for s in segments
    )
    for array, values in group.states.views_of(block).items():
        if array in saved.arrays:
            yield from _chunks(GroupLine(number, *_kind_of(array)), runs, values)


class _Run(NamedTuple):
    """Elements that lie one behind the other, in a line and in memory.

    Attributes:
        number: The number of the line's group.
        start: The first of them in the line.
        begin: The first of them in memory.
        size: How many they are.
    """

    number: int
    start: int
    begin: int
    size: int


def _runs(parts: Iterable[tuple[int, int, int, int]]) -> list[_Run]:
    """Makes one run of those that follow each other without a gap."""
    found: list[_Run] = []
    number = start = begin = size = 0
    for part_number, part_start, part_begin, part_size in parts:
        joins = part_start == start + size and part_begin == begin + size
        if size and joins and part_number == number:
            size += part_size
            continue
        if size:
            found.append(_Run(number, start, begin, size))
        number, start, begin, size = part_number, part_start, part_begin, part_size
    return [*found, _Run(number, start, begin, size)] if size else found


def _chunks(line: GroupLine, runs: list[_Run], values: np.ndarray) -> list[Chunk]:
    """What is saved of a line: what is one in the line, but not in memory, in several parts."""
    chunks: list[Chunk] = []
    stop = -1
    for _, start, begin, size in runs:
        part = values[begin : begin + size]
        if start == stop:
            chunks[-1].values.append(part)
        else:
            chunks.append(Chunk(line, start, [part]))
        stop = start + size
    return chunks


def _kind_of(array: str) -> tuple[str, str | None]:
    """What a checkpoint calls an array of a group's states: its kind, and the state."""
    return ("master", None) if array == MASTER else ("state", array)


class _GroupRead(NamedTuple):
    """What was read for one group.

    Attributes:
        group: The group.
        flat: The parameters, one behind the other.
        locations: Their ranges of the flat buffer.
        block: The states, laid out as the group's own.
        ranges: What has been read of each state: ranges of the shard.
        whole: Whether all of each state has been read.
    """

    group: AnyGroup
    flat: np.ndarray
    locations: list[slice]
    block: np.ndarray | None
    ranges: dict[str, list[slice]]
    whole: bool

    def move_in(self) -> None:
        begin = 0
        for location in _joined(self.locations):
            part = self.flat[begin : begin + location.stop - location.start]
            assign(self.group.buffers.flat[location], part)
            begin += part.size
        if self.block is None or not isinstance(self.group, ShardedGroup):
            return
        if self.whole:
            self.group.replace_block(self.block)
            return
        for array, values in self.group.states.views_of(self.block).items():
            for location in _joined(self.ranges[array]):
                assign(self.group.states[array][location], values[location])


def _joined(ranges: list[slice]) -> Iterator[slice]:
    """Makes one of ranges that follow each other without a gap."""
    start = stop = 0
    for found in ranges:
        if found.start != stop:
            if start < stop:
                yield slice(start, stop)
            start = found.start
        stop = found.stop
    if start < stop:
        yield slice(start, stop)


class Incoming:
    """What a rank owns of an optimizer's model, read into memory of its own first.

    Args:
        name: The name of the optimizer.
        optimizer: The optimizer, laid out.
        reader: The step.
        leave: Full names of the parameters that are left as they are.

    Raises:
        CheckpointError: If a file is missing or damaged; nothing has been changed then.
        MemoryError: If there is no memory to read it into; nothing has been changed then.
    """

    def __init__(
        self, name: str, optimizer: ShardedOptimizer, reader: StepReader, leave: set[str]
    ) -> None:
        self._model: ShardedModel = optimizer.sharded_model
        self._manifest = reader.manifest
        # Of each parameter, by group and slot, the number of its group in the manifest and its
        # index there; `None` if it is left as it is.
        self._places: list[list[tuple[int, int] | None]] = []
        places = reader.manifest.places
        for group in self._model.groups:
            names = [full_name(name, slot.name) for slot in group.layout.slots]
            self._places.append([None if n in leave else places.get(n) for n in names])
        self._read = [
            self._read_group(reader, group, places)
            for group, places in zip(self._model.groups, self._places, strict=True)
        ]

    def _read_group(
        self, reader: StepReader, group: AnyGroup, places: Sequence[tuple[int, int] | None]
    ) -> _GroupRead:
        memory, lines = HostMemory(), self._manifest.lines
        segments = group.layout.shards[self._model.rank].segments
        starts = [each.starts for each in self._manifest.groups]
        in_flat, in_shard, locations = [], [], []
        begin = owned = 0
        for segment in segments:
            size, place = segment.size, places[segment.slot.index]
            owned += size
            if place is not None:
                number, index = place
                start = starts[number][index] + segment.start_p
                in_flat.append((number, start, begin, size))
                in_shard.append((number, start, segment.start_s, size))
                locations.append(segment.range_f)
                begin += size
        flat = memory.empty(begin, group.dtype, "the parameters of a checkpoint")
        for number, start, begin, size in _runs(in_flat):
            # Of what was rounded for all to see then, and is not now, the master is the parameter.
            exact = self._manifest.groups[number].master == group.dtype.name
            exact = exact and group.plan.seen_as is None
            line = GroupLine(number, "master" if exact else "param", None)
            reader.read_line(line, start, start + size, flat[begin : begin + size])
        if not isinstance(group, ShardedGroup):
            return _GroupRead(group, flat, locations, None, {}, False)
        nbytes = group.states.block.size
        block = memory.empty(nbytes, np.dtype(np.uint8), "the states of a checkpoint", STATES)
        ranges = {}
        runs = _runs(in_shard)
        for array, values in group.states.views_of(block).items():
            there = [
                (GroupLine(run.number, *_kind_of(array)), run)
                for run in runs
                if GroupLine(run.number, *_kind_of(array)) in lines
            ]
            for line, (_, start, begin, size) in there:
                reader.read_line(line, start, start + size, values[begin : begin + size])
            ranges[array] = [slice(run.begin, run.begin + run.size) for _, run in there]
        whole = all(sum(r.stop - r.start for r in found) == owned for found in ranges.values())
        return _GroupRead(group, flat, locations, block, ranges, whole)

    def move_in(self) -> None:
        """Writes everything over what this rank has, and frees the memory."""
        while self._read:
            self._read.pop().move_in()
        for group, places in zip(self._model.groups, self._places, strict=True):
            counts = [saved.rule_t for saved in self._manifest.groups]
            members: list[list[int]] = [[] for _ in self._manifest.groups]
            for slot, (param, place) in enumerate(zip(group.buffers.params, places, strict=True)):
                if place is not None and param.update_rule is not None:
                    number, index = place
                    param.update_rule.t = counts[number][index]
                    members[number].append(slot)
            if not isinstance(group, ShardedGroup):
                continue
            for saved, slots in zip(self._manifest.groups, members, strict=True):
                if group.seen_as is not None and saved.master is None and slots:
                    group.fill_masters(slots)
                if saved.states.keys() - {IN_FLIGHT} or (saved.master and group.seen_as is None):
                    group.mark_filled(slots)
