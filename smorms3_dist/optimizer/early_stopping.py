"""Stopping early on all ranks together."""

from __future__ import annotations

import copy
import math
from typing import Any

from smorms3_dist.chainer_internals.trainers import (
    EarlyStoppingState,
    is_missing,
    serialize_early_stopping,
)
from smorms3_dist.optimizer.rank_zero import AsRankZero, ask_rank_zero, fires_alike

import chainer
from chainer.training import Trainer
from chainer.training.triggers import EarlyStoppingTrigger


class EarlyStopping(AsRankZero):
    """Chainer's trigger, of which rank 0's value counts. Calls are collective.

    Args:
        trigger: The trigger.
    """

    def __init__(self, trigger: EarlyStoppingTrigger) -> None:
        super().__init__(trigger)
        state = EarlyStoppingState.of(trigger)
        alike = fires_alike(state.look) and fires_alike(state.limit)
        self._look = _Either(state.look, state.limit) if alike else None
        self._trainer: Trainer | None = None
        # The value of the iteration that was saved. The trigger sees it before the next one.
        self._unseen = math.nan

    def __call__(self, trainer: Trainer) -> bool:
        """Whether the training ends. Collective."""
        self._trainer = trainer
        observation = trainer.observation
        if not math.isnan(self._unseen) and self._trigger.monitor not in observation:
            trainer.observation = {**observation, self._trigger.monitor: self._unseen}
        self._unseen = math.nan
        try:
            return ask_rank_zero(trainer, self._trigger, self._look)
        finally:
            trainer.observation = observation

    def serialize(self, serializer: Any) -> None:
        """Writes or reads how far it has come; a file without that is passed over."""
        if is_missing(serializer):
            return
        try:
            serialize_early_stopping(self._trigger, serializer)
            if isinstance(serializer, chainer.serializer.Deserializer):
                self._unseen = float(serializer("unseen", math.nan))
            else:
                observation = {} if self._trainer is None else self._trainer.observation
                value = observation.get(self._trigger.monitor, math.nan)
                serializer("unseen", float(getattr(value, "array", value)))
        except KeyError:
            return


class _Either:
    """Fires when one of two triggers does, and asks both."""

    def __init__(self, first: Any, second: Any) -> None:
        self._both = first, second

    def __copy__(self) -> _Either:
        return _Either(*map(copy.copy, self._both))

    def __call__(self, trainer: Trainer) -> bool:
        return any([trigger(trainer) for trigger in self._both])
