"""Triggers of which rank 0's decision counts for all ranks.

What fires by iteration or epoch fires alike on all ranks, and costs nothing here. A trigger that
looks at a clock, or at values that each rank has of its own, would fire in different iterations:
rank 0 alone is asked, and tells the others. A trigger on a value tells only when it looks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from smorms3_dist.chainer_internals.trainers import check_trigger_of
from smorms3_dist.optimizer.of_trainer import sharded_optimizers_of
from smorms3_dist.step.agreement import NO_FLAGS, Flag, meet

from chainer.training import Trainer
from chainer.training.triggers import IntervalTrigger, ManualScheduleTrigger, OnceTrigger

_ALIKE = (IntervalTrigger, ManualScheduleTrigger, OnceTrigger)


def fires_alike(trigger: Any) -> bool:
    """Whether a trigger is known to fire in the same iterations on all ranks."""
    return type(trigger) in _ALIKE


def look_of(trigger: Any) -> Any | None:
    """What says alike on all ranks when a trigger may fire; ``None`` if any iteration may do."""
    if fires_alike(trigger):
        return trigger
    check = check_trigger_of(trigger)
    return check if fires_alike(check) else None


def as_rank_zero(trigger: Any) -> Any:
    """A trigger that fires on all ranks when the given one does on rank 0."""
    return trigger if fires_alike(trigger) else AsRankZero(trigger)


class AsRankZero:
    """Fires on all ranks when a trigger does on rank 0. Calls are collective.

    Args:
        trigger: The trigger, whose state is saved and loaded. Ranks but rank 0 do not ask it.
    """

    def __init__(self, trigger: Any) -> None:
        self._trigger = trigger

    def __call__(self, trainer: Trainer) -> bool:
        """Whether it fires in this iteration. Collective."""
        return ask_rank_zero(trainer, self._trigger, look_of(self._trigger))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._trigger, name)


class Follows:
    """Fires on a rank when rank 0's trigger does, of which this rank has no copy.

    Args:
        alike: Whether the trigger fires alike on all ranks.
        look: What `look_of` says of it.
    """

    def __init__(self, alike: bool, look: Any | None) -> None:
        self.alike, self._look = alike, copy.copy(look)

    def __call__(self, trainer: Trainer) -> bool:
        """Whether it fires in this iteration. Collective."""
        if self.alike and self._look is not None:
            return bool(self._look(trainer))
        return ask_rank_zero(trainer, None, self._look)


def ask_rank_zero(
    trainer: Trainer, trigger: Callable[[Trainer], Any] | None, look: Any | None
) -> bool:
    """Rank 0's decision of this iteration. Collective.

    Args:
        trainer: The trainer.
        trigger: Whom rank 0 asks.
        look: What says alike on all ranks whether it may fire; ``None`` if it always may.
    """
    collectives = next(iter(sharded_optimizers_of(trainer).values())).collectives
    fires = False
    if collectives.rank == 0:
        assert trigger is not None
        # A copy, because the trigger itself asks it, too, and it answers once in an iteration.
        may_fire = look is None or copy.copy(look)(trainer)
        fires = bool(trigger(trainer))
    else:
        may_fire = look is None or look(trainer)
    if not may_fire:
        return fires
    occasion = f"a trigger of rank 0 in iteration {trainer.updater.iteration}"
    return Flag.WANTED in meet(collectives, occasion, Flag.WANTED if fires else NO_FLAGS)
