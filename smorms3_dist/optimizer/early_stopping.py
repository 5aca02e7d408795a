"""Stopping early on all ranks together."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from smorms3_dist.chainer_internals import EarlyStoppingState, serialize_early_stopping
from smorms3_dist.optimizer.rank_zero import AsRankZero, ask_rank_zero, fires_alike

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

    def __call__(self, trainer: Trainer) -> bool:
        """Whether the training ends. Collective."""
        return ask_rank_zero(trainer, self._trigger, self._look)

    def serialize(self, serializer: Any) -> None:
        """Writes or reads how far it has come; a file without that is passed over."""
        with contextlib.suppress(KeyError):
            serialize_early_stopping(self._trigger, serializer)


class _Either:
    """Fires when one of two triggers does, and asks both."""

    def __init__(self, first: Any, second: Any) -> None:
        self._both = first, second

    def __copy__(self) -> _Either:
        return _Either(*map(copy.copy, self._both))

    def __call__(self, trainer: Trainer) -> bool:
        return any([trigger(trainer) for trigger in self._both])
