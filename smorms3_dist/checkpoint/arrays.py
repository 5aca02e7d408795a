"""The arrays that a rank owns of models: as they are written, and read back into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from smorms3_dist.checkpoint.files.manifest import GroupLine
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.files.writing import Chunk
from smorms3_dist.checkpoint.model_state import Optimizers, Places, SavedGroup, places_of
from smorms3_dist.device.memory import STATES, CudaMemory, HostMemory, Memory, assign
from smorms3_dist.kernels.segments import MASTER
from smorms3_dist.layout import GroupLayout
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

    def copy(
        self, optimizers: Optimizers, groups: Sequence[SavedGroup], in_place: bool
    ) -> list[Chunk]:
        """What this rank owns of the parameters, masters and states.

        Args:
            optimizers: The optimizers of the models, laid out.
            groups: The groups of the manifest.
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
        for number, saved in enumerate(groups):
            rank = optimizers[saved.optimizer].sharded_model.rank
            columns = _columns_of(saved.group.layout, rank)
            starts = saved.starts[columns.slot]
            columns, starts = columns.those(starts >= 0), starts[starts >= 0]
            columns = columns._replace(start=starts + columns.start)
            chunks += _parameters(number, saved, columns, rank, on_host)
            if saved.arrays:
                chunks += _states(number, saved, columns, on_host)
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


class _Columns(NamedTuple):
    """Segments, in the order of the flat buffer: a column of each number that they have.

    Attributes:
        slot: The indices of their slots.
        start: Their first elements, in the parameter or in a line.
        size: How many elements they have.
        start_s: Their first elements in the shard.
        start_f: Their first elements in the flat buffer.
    """

    slot: np.ndarray
    start: np.ndarray
    size: np.ndarray
    start_s: np.ndarray
    start_f: np.ndarray

    def those(self, which: np.ndarray | slice) -> _Columns:
        """Some of them."""
        return _Columns(*(column[which] for column in self))


_columns: WeakKeyDictionary[GroupLayout, dict[int, _Columns]] = WeakKeyDictionary()


def _columns_of(layout: GroupLayout, rank: int) -> _Columns:
    """The segments of a rank's shard, with their starts in the parameters."""
    known = _columns.setdefault(layout, {})
    if rank not in known:
        segments = layout.shards[rank].segments
        rows = [(s.slot.index, s.start_p, s.size, s.start_s, s.start_f) for s in segments]
        known[rank] = _Columns(*np.array(rows, np.int64).reshape(-1, 5).T.copy())
    return known[rank]


def _parameters(
    number: int, saved: SavedGroup, columns: _Columns, rank: int, on_host: _OnHost
) -> Iterator[Chunk]:
    group = saved.group
    for index, bucket in enumerate(group.layout.buckets):
        part_f = bucket.part_of(rank)
        key = saved.optimizer, saved.number, "param", index
        values = on_host(key, group.buffers.flat[part_f], group.memory)
        inside = columns.those(
            slice(*np.searchsorted(columns.start_f, (part_f.start, part_f.stop)))
        )
        runs = _runs(inside.start, inside.start_f - part_f.start, inside.size)
        yield from _chunks(GroupLine(number, "param", None), runs, values)


def _states(number: int, saved: SavedGroup, columns: _Columns, on_host: _OnHost) -> Iterator[Chunk]:
    group = saved.group
    assert isinstance(group, ShardedGroup)
    key = saved.optimizer, saved.number, "states"
    block = on_host(key, group.states.block, group.memory)
    runs = _runs(columns.start, columns.start_s, columns.size)
    for array, values in group.states.views_of(block).items():
        if array in saved.arrays:
            yield from _chunks(GroupLine(number, *_kind_of(array)), runs, values)


class _Run(NamedTuple):
    """Elements that lie one behind the other, in a line and in memory.

    Attributes:
        start: The first of them in the line.
        begin: The first of them in memory.
        size: How many they are.
    """

    start: int
    begin: int
    size: int


def _runs(starts: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> list[_Run]:
    """Makes one run of those that follow each other without a gap."""
    if not sizes.size:
        return []
    apart = starts[1:] != (starts + sizes)[:-1]
    apart |= begins[1:] != (begins + sizes)[:-1]
    first = np.concatenate(([0], np.flatnonzero(apart) + 1))
    columns = starts[first], begins[first], np.add.reduceat(sizes, first)
    return list(map(_Run, *(column.tolist() for column in columns)))


def _chunks(line: GroupLine, runs: list[_Run], values: np.ndarray) -> list[Chunk]:
    """What is saved of a line: what is one in the line, but not in memory, in several parts."""
    chunks: list[Chunk] = []
    stop = -1
    for start, begin, size in runs:
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
        runs: Where they lie in the flat buffer, by where they lie in ``flat``.
        block: The states, laid out as the group's own.
        ranges: What has been read of each state: ranges of the shard.
        whole: Whether all of each state has been read.
    """

    group: AnyGroup
    flat: np.ndarray
    runs: list[_Run]
    block: np.ndarray | None
    ranges: dict[str, list[slice]]
    whole: bool

    def move_in(self) -> None:
        for start, begin, size in self.runs:
            part = self.flat[begin : begin + size]
            assign(self.group.buffers.flat[start : start + size], part)
        if self.block is None or not isinstance(self.group, ShardedGroup):
            return
        if self.whole:
            self.group.replace_block(self.block)
            return
        for array, values in self.group.states.views_of(self.block).items():
            for location in self.ranges[array]:
                assign(self.group.states[array][location], values[location])


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
        self._places = [
            places_of(name, group, reader.manifest, leave) for group in self._model.groups
        ]
        self._read = [
            self._read_group(reader, group, places)
            for group, places in zip(self._model.groups, self._places, strict=True)
        ]

    def _read_group(self, reader: StepReader, group: AnyGroup, places: Places) -> _GroupRead:
        memory, lines = HostMemory(), self._manifest.lines
        every = _columns_of(group.layout, self._model.rank)
        there = every.those(places.groups[every.slot] >= 0)
        numbers, begins = places.groups[there.slot], np.cumsum(there.size) - there.size
        starts = places.starts[there.slot] + there.start
        flat = memory.empty(int(there.size.sum()), group.dtype, "the parameters of a checkpoint")
        runs: dict[int, list[_Run]] = {}
        for number in np.unique(numbers).tolist():
            which = numbers == number
            # Of what was rounded for all to see then, and is not now, the master is the parameter.
            exact = self._manifest.groups[number].master == group.dtype.name
            exact = exact and group.plan.seen_as is None
            line = GroupLine(number, "master" if exact else "param", None)
            for start, begin, size in _runs(starts[which], begins[which], there.size[which]):
                reader.read_line(line, start, start + size, flat[begin : begin + size])
            runs[number] = _runs(starts[which], there.start_s[which], there.size[which])
        locations = _runs(there.start_f, begins, there.size)
        if not isinstance(group, ShardedGroup):
            return _GroupRead(group, flat, locations, None, {}, False)
        nbytes = group.states.block.size
        block = memory.empty(nbytes, np.dtype(np.uint8), "the states of a checkpoint", STATES)
        ranges: dict[str, list[slice]] = {}
        for array, values in group.states.views_of(block).items():
            found = ranges.setdefault(array, [])
            for number, of_number in runs.items():
                line = GroupLine(number, *_kind_of(array))
                for start, begin, size in of_number if line in lines else ():
                    reader.read_line(line, start, start + size, values[begin : begin + size])
                    found.append(slice(begin, begin + size))
        owned = int(every.size.sum())
        whole = all(sum(r.stop - r.start for r in found) == owned for found in ranges.values())
        return _GroupRead(group, flat, locations, block, ranges, whole)

    def move_in(self) -> None:
        """Writes everything over what this rank has, and frees the memory."""
        while self._read:
            self._read.pop().move_in()
        for group, places in zip(self._model.groups, self._places, strict=True):
            for number, saved in enumerate(self._manifest.groups):
                params = group.buffers.params
                slots = np.flatnonzero(places.groups == number).tolist()
                rules = {s: rule for s in slots if (rule := params[s].update_rule) is not None}
                indices = places.indices[[*rules]].tolist()
                for rule, index in zip(rules.values(), indices, strict=True):
                    rule.t = saved.rule_t[index]
                if not rules or not isinstance(group, ShardedGroup):
                    continue
                if group.seen_as is not None and saved.master is None:
                    group.fill_masters(rules)
                if saved.states.keys() - {IN_FLIGHT} or (saved.master and group.seen_as is None):
                    group.mark_filled(rules)
