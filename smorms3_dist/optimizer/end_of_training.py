"""What ranks do together when a trainer has come to its end."""

from __future__ import annotations

import sys

from smorms3_dist.optimizer.of_trainer import sharded_optimizers_of
from smorms3_dist.optimizer.optimizer import ShardedOptimizer

from chainer.training import Trainer


class EndOfTraining:
    """Tells an extension whether its trainer has ended well, and compares the ranks then.

    Chainer finalizes extensions also after an error, when the ranks will not meet again.
    """

    def __init__(self) -> None:
        self._optimizers: list[ShardedOptimizer] = []
        self._given_up = False
        self._handled: BaseException | None = None

    def expect(self, trainer: Trainer) -> None:
        """Takes notice of a trainer that begins; for ``initialize``."""
        self._optimizers = list(sharded_optimizers_of(trainer).values())
        self._given_up = False
        self._handled = sys.exc_info()[1]

    def give_up(self) -> None:
        """Notes that the ranks will not meet again; for ``on_error``."""
        self._given_up = True

    @property
    def is_good(self) -> bool:
        """Whether the training has ended without an exception; for ``finalize``."""
        # A rank that is interrupted cannot count on the others; Chainer has not called on_error.
        return not self._given_up and sys.exc_info()[1] is self._handled

    def check_sync(self, persistent: bool = False, repair: bool = False) -> None:
        """Compares the ranks if it has ended well. Collective.

        Raises:
            RuntimeError: As `ShardedOptimizer.check_sync`.
        """
        if self.is_good:
            for optimizer in self._optimizers:
                if optimizer.layout is not None:
                    optimizer.check_sync(persistent, repair, "at the end of its training")
