"""Whether an optimizer gathers parameters beside the next forward pass, and what has come of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from smorms3_dist.chainer_internals.guards import make_guardable
from smorms3_dist.collectives.base import Collectives, GatherChannel
from smorms3_dist.optimizer.overlap import Say, state_in_words
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.sharded_model import ShardedModel
from smorms3_dist.step.parameters_in_flight import ParametersInFlight

import chainer

STATE = "gathering beside the forward pass"
"""The name of the fact that says where it stands."""


class OverlapGather:
    """The gathers of an optimizer that go on beside its forward passes.

    In the first of them it is learned in which order parameters are used, and the ranks agree on
    the order of one of them; buckets come in that order from then on.

    Args:
        wanted: Whether there are to be any.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._is_decided = not wanted
        self._channel: GatherChannel | None = None
        self._order: Sequence[str] | None = None
        # That which shows the order, and the one that is to be ended before the next one begins.
        self._last: ParametersInFlight | None = None
        self._begun: ParametersInFlight | None = None

    @property
    def state(self) -> str:
        """Where it stands, in words, which must be alike on all ranks."""
        if self._order is None and self._last is not None:
            return "learning an order"
        return state_in_words(self._is_decided, self.is_possible, self._order)

    @property
    def is_possible(self) -> bool:
        """Whether there is a way to the other ranks beside the training."""
        return self._channel is not None

    def set_up(self, link: chainer.Link) -> None:
        """Prepares a model before copies are made of it, which have arrays in common with it."""
        if self.wanted:
            make_guardable(link.params())
        self.forget_order()

    def forget_order(self) -> None:
        """Learns the order in which parameters are used anew."""
        self._order = self._last = None

    def decide(self, collectives: Collectives, say: Say) -> None:
        """Decides whether there are any, and makes what they need; once. Collective."""
        if self._is_decided:
            return
        obstacles = collectives.all_gather_object(collectives.why_no_gather_channel())
        self._is_decided = True
        if collectives.size == 1:
            return
        for rank, obstacle in enumerate(obstacles):
            if obstacle is not None:
                self.say_why_not(say, f"on rank {rank} {obstacle}")
                return
        self._channel = collectives.open_gather_channel()

    def finish(self) -> None:
        """Waits until what was begun has come to its end, on the host as well."""
        if self._begun is not None:
            assert self._channel is not None
            self._channel.finish()
            self._begun.finish()
            self._begun = None

    def start(
        self,
        sharded: ShardedModel,
        groups: Sequence[ShardedGroup],
        collectives: Collectives,
        say: Say,
    ) -> None:
        """Lets the parameters of groups be gathered from now on, after `finish`. Collective."""
        assert self._channel is not None and self._begun is None
        if self._order is None and self._last is not None:
            self._order = self._agree_on_order(self._last.order, collectives)
        self._last = self._begun = ParametersInFlight(
            sharded, groups, self._order or (), self._channel, collectives.wait
        )
        held = self._last.held
        if held:
            rest = f" and {len(held) - 1} more" if len(held) > 1 else ""
            whose = f"{held[0]}{rest}, or a view of it"
            self.say_why_not(say, f"on rank {collectives.rank} somebody has the array of {whose}")

    def _agree_on_order(self, mine: list[str], collectives: Collectives) -> tuple[str, ...]:
        return tuple(collectives.all_gather_object(mine)[0])

    def say_why_not(self, say: Say, reason: str) -> None:
        """Says why parameters are there before an update returns."""
        say(logging.WARNING, f"parameters are gathered within update (overlap_gather): {reason}")
