"""Whether an optimizer reduces gradients during the backward pass, and what has come of it.

It does so in ``update(lossfun, ...)`` alone: there it calls the backward pass itself, and nobody
can change a gradient between the pass and the reduction.
"""

from __future__ import annotations

import logging
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from smorms3_dist.collectives.base import Collectives, DeviceCollectives, EarlyChannel
from smorms3_dist.collectives.beside import end_with_script
from smorms3_dist.device.memory import running_host
from smorms3_dist.layout import early_gpu_bucket_bytes
from smorms3_dist.sharding.sharded_model import ShardedModel
from smorms3_dist.step.agreement import NO_FLAGS, DifferError, Flag
from smorms3_dist.step.early import EarlyReduction, MeanOfBatches, Schedule
from smorms3_dist.step.last_use import watching

import chainer

_PART_BYTES = 1 << 21
"""What each rank owns of a bucket. All of them have a part of every layer, so that all links are
busy at any time; and little is left to be reduced when the backward pass is over."""

_VOID = Flag.AGAIN | Flag.LAY_OUT | Flag.BROADCAST | Flag.WHOLE_GRADIENTS

STATE = "overlap of reduction and backward pass"
"""The name of the fact that says where it stands."""

OPTIMIZER = "optimizer"
"""The name of the fact that says which of the communicator's optimizers is in an update."""

Say = Callable[[int, str], None]
"""``say(level, message)``: logs something once, on rank 0."""


class _Rank(NamedTuple):
    """What a rank has to do with it.

    Attributes:
        obstacle: Why it is not possible on this rank, or ``None``.
        host: Where it is.
        cores: Those that it may use.
    """

    obstacle: str | None
    host: str
    cores: frozenset[int]


class Overlap:
    """The overlap of an optimizer's reductions with its backward passes.

    In one update it is learned in which order gradients become final, and the ranks agree on the
    order of one of them; from the next update on they are handed over in that order. Whether there
    is an order all ranks know alike, from what they have agreed on.

    Args:
        wanted: ``'auto'``, ``True`` or ``False``.

    Attributes:
        early: The reduction that the update makes use of, once the ranks have agreed on it.
    """

    def __init__(self, wanted: bool | str) -> None:
        self.wanted = wanted
        self._is_decided = wanted is False
        self._channel: EarlyChannel | None = None
        self._schedule: Schedule | None = None
        # What has been handed over in the update under way, or in one that has failed before the
        # ranks had agreed on it.
        self._begun: EarlyReduction | None = None
        self.early: EarlyReduction | None = None
        self._is_valid = False
        self._learned: list[chainer.Parameter] | None = None
        self._rank = 0

    @property
    def state(self) -> str:
        """Where it stands, in words, which must be alike on all ranks."""
        order = None if self._schedule is None else self._schedule.order
        return state_in_words(self._is_decided, self._channel is not None, order)

    @property
    def has_order(self) -> bool:
        """Whether gradients can be handed over in an order on which the ranks have agreed."""
        return self._schedule is not None

    def decide(self, collectives: Collectives, say: Say) -> None:
        """Decides whether there is any, and makes what it needs; once. Collective.

        All ranks want the same.
        """
        if self._is_decided:
            return
        mine = _Rank(collectives.why_not_beside(), running_host(), _cores())
        ranks = [_Rank(*other) for other in collectives.all_gather_object(tuple(mine))]
        self._is_decided = True
        if collectives.size == 1:
            return
        # What it brings on GPUs has not been measured.
        on_gpus = isinstance(collectives, DeviceCollectives)
        if self.wanted == "auto" and (on_gpus or not _pays(ranks)):
            return
        obstacle = _obstacle(ranks)
        if obstacle is None:
            self._channel = collectives.open_early_channel()
            self._rank = collectives.rank
            end_with_script(self)
        else:
            self._say(say, obstacle)

    def bucket_bytes(self, collectives: Collectives) -> int | None:
        """How large buckets are to be at most; ``None`` if overlap asks for nothing."""
        return None if self._channel is None else small_bucket_bytes(collectives)

    def start_update(self) -> None:
        """Takes notice of an update, in which nothing has been handed over yet."""
        self._is_valid = False
        self._learned = None

    def run_backward(
        self,
        loss: chainer.Variable,
        model: chainer.Link,
        sharded: ShardedModel | None,
        mean: MeanOfBatches,
        **kwds: Any,
    ) -> None:
        """Runs the backward pass of a loss.

        Args:
            loss: The loss.
            model: What is trained.
            sharded: The same, laid out as it is now; ``None`` if it is not, or if gradients are not
                reduced after this pass.
            mean: What becomes of a gradient together with those of micro-batches before.
            **kwds: For `chainer.Variable.backward`.
        """
        if self._schedule is not None:
            # What an update that has failed has handed over is under way still.
            if sharded is not None and self._begun is None and self._channel is not None:
                begun = self._begun = EarlyReduction(self._schedule, self._channel, mean)
                try:
                    with watching(loss, begun.params, begun.hand_over):
                        loss.backward(**kwds)
                    self._is_valid = begun.hand_over_rest()
                except BaseException:
                    # Others that have begun, too, may wait for what has not come.
                    begun.hand_over_nothing()
                    raise
                return
        elif self._channel is not None or not self._is_decided:
            learned: list[chainer.Parameter] = []
            with watching(loss, model.params(), lambda param, grad: learned.append(param)):
                loss.backward(**kwds)
            self._learned = learned
            return
        loss.backward(**kwds)

    def hold_up_nobody(self) -> None:
        """Begins without gradients, where that may hold up others otherwise before they agree.

        To be called before this rank waits for the others.
        """
        if self._schedule is None or self._channel is None or self._begun is not None:
            return
        if not self._channel.has_thread:
            self._begun = EarlyReduction(self._schedule, self._channel)
            self._begun.hand_over_nothing()

    def end(self) -> None:
        """Holds up nobody who makes another update than the last one of this rank's script."""
        if self._schedule is None:
            return
        try:
            with self._schedule.sharded.groups[0].memory.current():
                self.hold_up_nobody()
        except Exception as error:
            # Others are still to be told that the script ends.
            told = f"begins no reduction as its script ends: {type(error).__name__}: {error}"
            sys.stderr.write(f"smorms3_dist: rank {self._rank} {told}\n")

    def flags(self) -> Flag:
        """What the other ranks have to know of this one."""
        self.hold_up_nobody()
        flags = NO_FLAGS
        if self._begun is not None or self._learned is not None:
            flags |= Flag.WATCHED
        if self._schedule is not None and not self._is_valid:
            flags |= Flag.AGAIN
        return flags

    def settle(self, flags: Flag, say: Say) -> None:
        """Gives the reduction that has begun as `early`, if it is of use to all ranks. Collective.

        Otherwise, if any rank has begun, all come to the end of it, and gradients are to be reduced
        as if there had been none.

        Args:
            flags: What all ranks have agreed on.
            say: Is told why there is none.
        """
        begun, self._begun = self._begun, None
        if self._channel is None:
            return
        void = flags & _VOID
        if Flag.WATCHED not in flags:
            if void in (NO_FLAGS, Flag.AGAIN):
                self._say(say, "update(lossfun, ...) has not computed them, or not all of them")
            return
        if self._schedule is None:
            return
        if begun is None:
            begun = EarlyReduction(self._schedule, self._channel)
        if not void:
            self.early = begun
            return
        begun.end()
        self._schedule = None
        if void == Flag.AGAIN:
            self._say(
                say,
                "a rank had computed them otherwise than update(lossfun, ...) does, or an update "
                "has failed; they are handed over again from the next update but one on",
            )

    def finish_update(
        self, flags: Flag, replicated: bool, sharded: ShardedModel, collectives: Collectives
    ) -> None:
        """Agrees on an order, where there is none yet and one is of use. Collective.

        Args:
            flags: What all ranks have agreed on in this update.
            replicated: Whether somebody needs whole gradients.
            sharded: The model, as it is laid out now.
            collectives: The ranks.
        """
        self._end_early()
        learned, self._learned = self._learned, None
        if self._channel is None:
            return
        if replicated or Flag.LAY_OUT in flags:
            self._schedule = None
        if replicated or self._schedule is not None or Flag.WATCHED not in flags:
            return
        names = {id(param): name for name, param in sharded.model.initialized.items()}
        mine = None if learned is None else [names[id(p)] for p in learned if id(p) in names]
        everybodys = collectives.all_gather_object(mine)
        order = next((names for names in everybodys if names is not None), None)
        if order is not None:
            self._schedule = Schedule(sharded, order, self._channel, collectives.wait)

    def fail_update(self) -> None:
        """Takes notice that an update fails: what all ranks have begun comes to its end."""
        self._end_early()

    def _end_early(self) -> None:
        early, self.early = self.early, None
        if early is not None:
            early.end()

    def refuse(self, error: DifferError, say: Say) -> None:
        """Brings what any rank has begun in an update that all refuse to its end. Collective."""
        if error.names & {STATE, OPTIMIZER}:
            self.abandon(say)
        elif Flag.WATCHED in error.flags:
            self.settle(error.flags | Flag.AGAIN, say)

    def abandon(self, say: Say) -> None:
        """Gives up what is under way, on all ranks alike, and all overlap from now on."""
        if self._channel is not None:
            self._say(say, "the ranks have not come to an update together")
        if self._begun is not None:
            self._begun.abandon()
        self._begun = self._schedule = self._channel = None

    def _say(self, say: Say, reason: str) -> None:
        level = logging.WARNING if self.wanted is True else logging.INFO
        say(level, f"gradients are reduced after the backward pass (overlap): {reason}")


def small_bucket_bytes(collectives: Collectives) -> int:
    """How large buckets are at most that come one by one."""
    on_gpus = isinstance(collectives, DeviceCollectives)
    size = collectives.size
    return early_gpu_bucket_bytes(size) if on_gpus else _PART_BYTES * size


def state_in_words(is_decided: bool, is_possible: bool, order: Sequence[str] | None) -> str:
    """Where an overlap stands, which goes by an order of parameters that all ranks have alike."""
    if not is_decided:
        return "to be decided"
    if not is_possible:
        return "none"
    if order is None:
        return "in an order to be learned"
    return f"in the order {zlib.crc32(repr(order).encode()):08x}"


def _obstacle(ranks: Sequence[_Rank]) -> str | None:
    """Why there cannot be any."""
    for rank, other in enumerate(ranks):
        if other.obstacle is not None:
            return f"on rank {rank} {other.obstacle}"
    return None


def _pays(ranks: Sequence[_Rank]) -> bool:
    """Whether a step gets shorter: where ranks have a network between them, and cores to spare."""
    hosts: dict[str, list[_Rank]] = {}
    for rank in ranks:
        hosts.setdefault(rank.host, []).append(rank)
    return len(hosts) > 1 and all(
        len(frozenset().union(*(rank.cores for rank in there))) > len(there)
        and all(len(rank.cores) > 1 for rank in there)
        for there in hosts.values()
    )


def _cores() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))
