"""The mean gradient of a shard on CPUs, kept until a norm is known, or that all of it is finite.

A rank sends the gradients that others own and no other, so the mean of what it owns can take the
place of its own gradients, as ChainerMN's mean takes the place of all: nothing is allocated, and
what is read is what is written. Small parameters, which are packed for their way between ranks,
stay packed; gradients that cannot be written to have a place of their own.

While a piece is in the cache, operations are applied to it, and its squares are summed up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from smorms3_dist.collectives.base import Collectives, Gradients
from smorms3_dist.hooks.norms import EXACT_RANKS, lanes_on_all_ranks
from smorms3_dist.hooks.parts import Part, Values
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.operations import Operations, apply
from smorms3_dist.kernels.running_dot import RunningDot
from smorms3_dist.kernels.segments import CommonSettings, touching
from smorms3_dist.kernels.selection import compiled_scale, compiled_store
from smorms3_dist.layout import Piece, Segment
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.staged_gradient import names_not_finite

import numpy as np


class _Packed(NamedTuple):
    """Where the small parameters of a piece are kept, step by step.

    Attributes:
        place: Their mean gradients, one behind the other.
        values: Views of it.
        runs: The segments of each range without gaps.
    """

    place: np.ndarray
    values: dict[Segment, np.ndarray]
    runs: Sequence[Sequence[Segment]]


class KeptGradient:
    """The mean gradient of one group's shard. Made by all ranks together.

    Args:
        group: The parameters whose gradient it is.
        collectives: The ranks.

    Attributes:
        group: The parameters.
        sums: Sums of squares, as far as the last pass has formed them: see
            `smorms3_dist.hooks.norms.Begun`.
    """

    def __init__(self, group: ShardedGroup, collectives: Collectives) -> None:
        self.group = group
        self.sums: dict[str, RunningDot | np.floating] = {}
        self._lanes = lanes_on_all_ranks(group.dtype, collectives)
        self._exact = collectives.size <= EXACT_RANKS
        self._store = compiled_store(group.dtype)
        self._scale = compiled_scale(group.dtype)
        self._owners: Callable[[], Mapping[int, int]] = dict
        self._overwritable: list[bool] | None = None
        self._spare: dict[Segment, np.ndarray] = {}
        self._packed: dict[tuple[int, int], _Packed] = {}
        self._are_packed: set[Segment] = set()
        # Of packed parameters, whose values stay where they are.
        self._parts: dict[int, Part] = {}
        self._values: dict[Segment, np.ndarray] = {}
        self._places: list[tuple[Piece, np.ndarray]] = []

    def prepare(self, owners: Callable[[], Mapping[int, int]]) -> None:
        """Begins a step.

        Args:
            owners: Gives what it takes to find out which gradients can be written to, if any is
                large enough: see `FlatBuffers.overwritable`.
        """
        self._owners, self._overwritable = owners, None
        self._places, self._values = [], {}

    def reduce(
        self, gradients: Gradients, collectives: Collectives, how: CommonSettings, sums: bool
    ) -> None:
        """Forms the mean, after `prepare`. Collective.

        Args:
            gradients: This rank's own, as they are sent.
            collectives: The ranks.
            how: What is done to it.
            sums: Whether its squares are to be summed up.
        """
        self.sums = {}
        keep = functools.partial(self._keep, how, sums)
        self.group.reduce(gradients, collectives, keep)

    def treat(self, how: CommonSettings, sums: bool) -> None:
        """Passes over the mean once more; see `reduce`."""
        self.sums = {}
        for piece, place in self._places:
            self._pass(piece, Mean(place), place, how, sums)

    def scale(self, decay: float, rates: Mapping[str, np.floating]) -> set[str]:
        """Decays and then scales the gradients of small parameters, each by its own rate.

        Returns:
            The names of those for which that is done: all that are packed, or none.
        """
        dtype = self.group.dtype
        packed = {segment.slot for segment in self._are_packed}
        alike = all(rate.dtype == dtype for rate in rates.values())
        owned = (segment for slot in packed for segment in self.group.owned(slot.index))
        if self._scale is None or not alike or not self._are_packed.issuperset(owned):
            return set()
        for piece, place in self._places:
            if len(piece.segments) == 1:
                continue
            for run in self._packed_in(piece).runs:
                start, stop = run[0].start_s - piece.start_s, run[-1].stop_s - piece.start_s
                param = self.group.buffers.flat[run[0].start_f : run[-1].stop_f]
                stops = np.array([s.stop_s for s in run]) - run[0].start_s
                factors = np.array([rates[s.slot.name] for s in run])
                self._scale(place[start:stop], param, decay, stops, factors)
        return {slot.name for slot in packed}

    def update(self) -> None:
        """Updates the shard by it."""
        for piece, place in self._places:
            self.group.update_piece(piece, Mean(place))

    def forget(self) -> None:
        """Lets go of this rank's gradients."""
        self._places, self._values = [], {}
        self.group.buffers.clear_gradients()

    def not_finite(self) -> Iterator[str]:
        """Names of the parameters in whose segments here a gradient is infinite or nan."""
        if not all(np.isfinite(place).all() for _, place in self._places):
            shard = self.group.shard
            yield from names_not_finite(shard, (self._values[s] for s in shard.segments))

    def parts(self) -> Iterator[Part]:
        """The parameters, for their norms."""
        group = self.group
        flat, dtype = group.buffers.flat, group.dtype
        for slot, param in group.parameters():
            part = self._parts.get(slot.index)
            if part is None or part.rule is not param.update_rule:
                owned = group.owned(slot.index)
                values = [Values(flat[s.range_f], self._values[s]) for s in owned]
                owners = group.layout.segments[slot.index]
                whole = flat[slot.start_f : slot.stop_f]
                part = Part(slot.name, param.update_rule, (), values, owners, dtype, whole)
                if owned and self._are_packed.issuperset(owned):
                    self._parts[slot.index] = part
            yield part

    def _keep(self, how: CommonSettings, sums: bool, piece: Piece, mean: Mean) -> None:
        place = self._place_of(piece)
        self._places.append((piece, place))
        self._pass(piece, mean, place, how, sums)

    def _place_of(self, piece: Piece) -> np.ndarray:
        if len(piece.segments) > 1:
            packed = self._packed_in(piece)
            self._values.update(packed.values)
            return packed.place
        (first,) = piece.segments
        whole = self._owned(first)
        if whole not in self._values:
            own = None
            if self._overwritable is None:
                self._overwritable = self.group.buffers.overwritable(self._owners())
            if self._overwritable[whole.slot.index]:
                own = self.group.buffers.gradient(whole)
            self._values[whole] = self._spare_place(whole) if own is None else own
        start = first.start_p - whole.start_p
        return self._values[whole][start : start + first.size]

    def _packed_in(self, piece: Piece) -> _Packed:
        key = piece.start_s, piece.stop_s
        if key not in self._packed:
            place = self._empty(piece.size)
            starts = [segment.start_s - piece.start_s for segment in piece.segments]
            values = {
                segment: place[start : start + segment.size]
                for start, segment in zip(starts, piece.segments, strict=True)
            }
            self._packed[key] = _Packed(place, values, touching(piece.segments))
            self._are_packed.update(values)
        return self._packed[key]

    def _spare_place(self, segment: Segment) -> np.ndarray:
        place = self._spare.get(segment)
        if place is None:
            place = self._spare[segment] = self._empty(segment.size)
        return place

    def _empty(self, size: int) -> np.ndarray:
        dtype = self.group.dtype
        return self.group.memory.empty(size, dtype, f"mean gradients in {dtype}")

    def _owned(self, part: Segment) -> Segment:
        """The segment of the shard that a part of one lies in."""
        (whole,) = (
            s
            for s in self.group.owned(part.slot.index)
            if s.start_p <= part.start_p and part.stop_p <= s.stop_p
        )
        return whole

    def _pass(
        self, piece: Piece, mean: Mean, place: np.ndarray, how: CommonSettings, sums: bool
    ) -> None:
        flat = self.group.buffers.flat
        if len(piece.segments) == 1:
            (segment,) = piece.segments
            dot = self._dot_of(segment) if sums else None
            operations = how.of(segment.slot.name)
            self._store_in(place, mean, flat[segment.range_f], operations, dot, segment.start_p)
            return
        packed = self._packed_in(piece)
        apart = ([segment] for segment in piece.segments)
        for run in packed.runs if how.are_alike else apart:
            start, stop = run[0].start_s - piece.start_s, run[-1].stop_s - piece.start_s
            param = flat[run[0].start_f : run[-1].stop_f]
            operations = how.of(run[0].slot.name)
            self._store_in(place[start:stop], mean.part(start, stop), param, operations, None, 0)
        for segment, values in packed.values.items() if sums else ():
            if segment.size == segment.slot.size:
                self.sums[segment.slot.name] = values.dot(values)
            else:
                dot = self._dot_of(segment)
                if dot is not None:
                    dot.add(values, segment.start_p)

    def _dot_of(self, segment: Segment) -> RunningDot | None:
        """The running dot that a part of a parameter is to be added to now, if there is one."""
        slot = segment.slot
        if self._lanes is None or not (self._exact or self._owned(segment).size == slot.size):
            return None
        dot = self.sums.get(slot.name)
        if dot is None and segment.start_p == 0:
            dot = self.sums[slot.name] = RunningDot(slot.size, self.group.dtype, self._lanes)
        return dot if isinstance(dot, RunningDot) and dot.filled == segment.start_p else None

    def _store_in(
        self,
        place: np.ndarray,
        mean: Mean,
        param: np.ndarray,
        operations: Operations,
        dot: RunningDot | None,
        start: int,
    ) -> None:
        if dot is None and not operations and mean.second is None and mean.first is place:
            return
        if self._store is not None:
            self._store(place, mean, param, operations, dot, start)
        else:
            mean.evaluate(place)
            apply(operations, place, param)
            if dot is not None:
                dot.add(place, start)
