"""An all-gather of updated parameters that goes on beside the next forward pass.

It goes through a channel of its own, by a thread or a stream, bucket by bucket, in the order in
which the forward pass uses them. Whoever asks a parameter for its array meanwhile waits for the
buckets in which it lies, by a guard; whoever asks for a flat buffer waits for all. Who has the
array of a parameter already comes to no guard: such parameters are waited for at once.

On a GPU it is the current stream of who asks that waits, and the guard stays on for all others
until the buckets are there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals.guards import Wait, are_held, put_on
from smorms3_dist.collectives.base import GatherChannel
from smorms3_dist.collectives.beside import GATHERING, has_failed
from smorms3_dist.collectives.narrowing import all_gather_narrow
from smorms3_dist.layout import Bucket
from smorms3_dist.phases import Phase
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.sharded_model import ShardedModel
from smorms3_dist.waiting import Wait as RankWait


class _Turn(NamedTuple):
    """A bucket to be gathered."""

    group: ShardedGroup
    bucket: Bucket


class ParametersInFlight:
    """The all-gather of one update, from its beginning to its end. Made by all ranks together.

    Args:
        sharded: The model, with what owners have updated.
        groups: Those that are gathered.
        order: Names of parameters in the order in which they are going to be used. Those that it
            does not name come last.
        channel: Reaches the other ranks.
        rank: Where this rank notes that it waits.

    Attributes:
        held: Names of the parameters whose arrays somebody has, so that they were waited for.
    """

    def __init__(
        self,
        sharded: ShardedModel,
        groups: Sequence[ShardedGroup],
        order: Sequence[str],
        channel: GatherChannel,
        rank: RankWait,
    ) -> None:
        self._sharded = sharded
        self._channel = channel
        self._rank = rank
        self._groups = groups
        self._memory = groups[0].memory
        self._turns = _turns(groups, order)
        # How many buckets have to be there for a parameter, by name.
        self._needed: dict[str, int] = {}
        for count, (group, bucket) in enumerate(self._turns, 1):
            for slot in group.layout.slots_of_buckets[bucket]:
                self._needed[slot.name] = count
        self._changed = threading.Condition()
        self._arrived = 0
        # Of the stream on which they come, after each bucket.
        self._marks: list[Any] = []
        self._error: BaseException | None = None
        self._waiting = 0
        self._thread = threading.get_ident()
        self._read: dict[str, None] = {}
        known = sharded.model.noted_arrays
        self.held: list[str] = []
        self._guards = []
        for group in groups:
            buffers = group.buffers
            everybodys = are_held(
                buffers.params, buffers.views, known, self._memory.is_seen_otherwise
            )
            for (slot, param), held in zip(buffers.parameters(), everybodys, strict=True):
                if slot.name not in self._needed:
                    continue
                if held:
                    self.held.append(slot.name)
                else:
                    self._guards.append(put_on(param, self._waiting_for(slot.name)))
            buffers.in_flight = self
        sharded.in_flight = self
        _under_way.add(self)
        channel.start_gather(self._run)
        if self.held:
            self._wait_for(max(self._needed[name] for name in self.held))

    def _run(self, ranks: GatherChannel) -> None:
        try:
            for _ in self._gather(ranks):
                group, bucket = self._turns[self._arrived]
                self._sharded.note_gathered(group, bucket)
                self._marks.append(self._memory.mark())
                with self._changed:
                    self._arrived += 1
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            raise

    def _gather(self, ranks: GatherChannel) -> Iterator[None]:
        """Gathers the buckets in turn; gives something after each."""
        rest = list(self._turns)
        while rest:
            narrow = rest[0].group.seen_as
            if narrow is not None:
                group, bucket = rest.pop(0)
                all_gather_narrow(ranks, group.buffers.flat_in_flight, [bucket], narrow)
                yield
                continue
            exact = []
            while rest and rest[0].group.seen_as is None:
                group, bucket = rest.pop(0)
                exact.append((group.buffers.flat_in_flight, bucket))
            yield from ranks.gather_in_turn(exact)

    def _waiting_for(self, name: str) -> Wait:
        needed = self._needed[name]

        def wait() -> bool:
            if self._thread == threading.get_ident():
                self._read[name] = None
            return self._wait_for(needed)

        return wait

    def _wait_for(self, count: int) -> bool:
        """Waits until so many buckets are there; returns whether nobody has to any more."""
        if self._arrived < count:
            with self._changed:
                self._waiting += 1
                try:
                    self._wait_in_words(count)
                finally:
                    self._waiting -= 1
                    if not self._waiting:
                        self._channel.stop_hurrying()
        if self._error is not None and self._arrived < count:
            raise has_failed(self._rank.rank, self._error, GATHERING) from self._error
        mark = self._marks[count - 1]
        self._memory.follow(mark)
        return self._memory.has_come(mark)

    def _wait_in_words(self, count: int) -> None:
        """Waits, and says where, unless the rank waits in something else already."""
        is_noted = self._thread == threading.get_ident() and self._rank.at is None
        if is_noted:
            with self._rank.phases.during(Phase.GATHER), self._rank.inside(f"in the {GATHERING}"):
                self._wait_for_thread(count)
        else:
            self._wait_for_thread(count)

    def _wait_for_thread(self, count: int) -> None:
        self._channel.hurry()
        while self._arrived < count and self._error is None:
            self._changed.wait()

    @property
    def order(self) -> list[str]:
        """Names of the parameters in the order in which they have been asked for."""
        return list(self._read)

    def finish(self) -> None:
        """See `smorms3_dist.sharding.buffers.InFlight`.

        Raises:
            RuntimeError: If it has failed, naming the rank, and why.
        """
        if self._turns and not self._wait_for(len(self._turns)):
            return
        for group in self._groups:
            if group.buffers.in_flight is self:
                group.buffers.in_flight = None
        if self._sharded.in_flight is self:
            self._sharded.in_flight = None
        for guard in self._guards:
            guard.take_off()
        _under_way.discard(self)


def _turns(groups: Sequence[ShardedGroup], order: Sequence[str]) -> list[_Turn]:
    """All buckets in the order in which they are needed, on all ranks alike."""
    when = {name: index for index, name in enumerate(order)}

    def first_use(turn: _Turn) -> int:
        slots = turn.group.layout.slots_of_buckets[turn.bucket]
        return min((when.get(slot.name, len(when)) for slot in slots), default=len(when))

    turns = [_Turn(group, bucket) for group in groups for bucket in group.layout.buckets]
    return sorted(turns, key=first_use)


_under_way: weakref.WeakSet[ParametersInFlight] = weakref.WeakSet()


def _finish_all() -> None:
    for each in list(_under_way):
        # Whoever asks for parameters is told of an error.
        with contextlib.suppress(RuntimeError):
            each.finish()


# A child has no thread, and nothing would ever come.
os.register_at_fork(before=_finish_all)
