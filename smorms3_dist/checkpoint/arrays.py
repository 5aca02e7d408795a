"""The arrays that a rank owns of models: as they are written, and read back into them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from smorms3_dist.checkpoint.files.manifest import Array, full_name
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.files.writing import Chunk
from smorms3_dist.checkpoint.model_state import Optimizers
from smorms3_dist.device.memory import STATES, CudaMemory, HostMemory, Memory, assign
from smorms3_dist.kernels.segments import MASTER
from smorms3_dist.optimizer.optimizer import ShardedOptimizer
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.sharded_model import AnyGroup, ShardedModel

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
            used[key] = self._copy(key, source, memory)
            return used[key]

        chunks: list[Chunk] = []
        for name, optimizer in optimizers.items():
            for index, group in enumerate(optimizer.sharded_model.groups):
                key = name, index
                chunks += _parameters(group, name, optimizer.sharded_model.rank, key, on_host)
                if isinstance(group, ShardedGroup):
                    chunks += _states(group, name, key, on_host)
        self._copies = used
        return chunks

    def _copy(self, key: _Key, source: Any, memory: Memory) -> np.ndarray:
        values = self._copies.get(key)
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
    group: AnyGroup, optimizer: str, rank: int, key: _Key, on_host: _OnHost
) -> Iterator[Chunk]:
    segments = group.layout.shards[rank].segments
    starts_f = [segment.start_f for segment in segments]
    for index, bucket in enumerate(group.layout.buckets):
        part_f = bucket.part_of(rank)
        source = group.buffers.flat[part_f]
        values = on_host((*key, "param", index), source, group.memory)
        for s in segments[bisect_left(starts_f, part_f.start) : bisect_left(starts_f, part_f.stop)]:
            part = values[s.start_f - part_f.start : s.stop_f - part_f.start]
            yield Chunk(Array(full_name(optimizer, s.slot.name), "param", None), s.start_p, part)


def _states(group: ShardedGroup, optimizer: str, key: _Key, on_host: _OnHost) -> Iterator[Chunk]:
    block = on_host((*key, "states"), group.states.block, group.memory)
    has = {slot.index: group.has_arrays_of(slot.index) for slot in group.layout.slots}
    for array, values in group.states.views_of(block).items():
        kind, state = _kind_of(array)
        for s in group.shard.segments:
            if array not in has[s.slot.index]:
                continue
            saved = Array(full_name(optimizer, s.slot.name), kind, state)
            yield Chunk(saved, s.start_p, values[s.range_s])


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
        self._name = name
        self._model: ShardedModel = optimizer.sharded_model
        self._saved = {p.name: p for p in reader.manifest.parameters if p.name not in leave}
        self._read = [self._read_group(reader, group) for group in self._model.groups]

    def _read_group(self, reader: StepReader, group: AnyGroup) -> _GroupRead:
        memory = HostMemory()
        segments = group.layout.shards[self._model.rank].segments
        named = [(full_name(self._name, segment.slot.name), segment) for segment in segments]
        known = [(name, segment) for name, segment in named if name in self._saved]
        size = sum(segment.size for _, segment in known)
        flat = memory.empty(size, group.dtype, "the parameters of a checkpoint")
        begin = 0
        for name, segment in known:
            part = flat[begin : begin + segment.size]
            # Of what was rounded for all to see then, and is not now, the master is the parameter.
            exact = self._saved[name].master == group.dtype.name and group.plan.seen_as is None
            kind = "master" if exact else "param"
            reader.read(Array(name, kind, None), segment.start_p, segment.stop_p, part)
            begin += segment.size
        locations = [segment.range_f for _, segment in known]
        if not isinstance(group, ShardedGroup):
            return _GroupRead(group, flat, locations, None, {}, False)
        nbytes = group.states.block.size
        block = memory.empty(nbytes, np.dtype(np.uint8), "the states of a checkpoint", STATES)
        ranges = {}
        for array, values in group.states.views_of(block).items():
            kind, state = _kind_of(array)
            there = [(n, s) for n, s in known if self._has(n, state)]
            for name, segment in there:
                part = values[segment.range_s]
                reader.read(Array(name, kind, state), segment.start_p, segment.stop_p, part)
            ranges[array] = [segment.range_s for _, segment in there]
        whole = all(len(found) == len(segments) for found in ranges.values())
        return _GroupRead(group, flat, locations, block, ranges, whole)

    def _has(self, name: str, state: str | None) -> bool:
        saved = self._saved[name]
        return state in saved.states if state else saved.master is not None

    def move_in(self) -> None:
        """Writes everything over what this rank has, and frees the memory."""
        while self._read:
            self._read.pop().move_in()
        for group in self._model.groups:
            for slot, param in group.parameters():
                saved = self._saved.get(full_name(self._name, slot.name))
                if saved is None or param.update_rule is None:
                    continue
                param.update_rule.t = saved.rule_t
                if not isinstance(group, ShardedGroup):
                    continue
                if group.seen_as is not None and saved.master is None:
                    group.fill_masters([slot.index])
                if saved.states or (saved.master and group.seen_as is None):
                    group.mark_filled(slot.index)
