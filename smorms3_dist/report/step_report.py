"""`StepReport`, which brings the numbers of steps into a trainer's observation."""

from __future__ import annotations

from typing import Any

from smorms3_dist.chainer_internals.trainers import entries_of
from smorms3_dist.optimizer.of_trainer import sharded_optimizers_of
from smorms3_dist.optimizer.rank_zero import as_rank_zero
from smorms3_dist.report.meter import StepMeter

import chainer
from chainer.training import PRIORITY_WRITER, Extension, Trainer


class StepReport(Extension):
    """Reports where the time of steps goes, and memory: an extension of Chainer's Trainer.

    To be extended with on all ranks, with the same trigger: a rank that lacks it is named in an
    error. A trigger that looks at the time or at a value is rank 0's. All ranks observe the same
    numbers, those of the steps since the last report, under keys such as ``smorms3/reduce_s``, so
    that LogReport and PrintReport find them. See docs/seeing.md.

    Example::

        trainer.extend(smorms3_dist.extensions.StepReport(every=(1, "epoch")))
        trainer.extend(extensions.LogReport(trigger=(1, "epoch")))
        trainer.extend(extensions.PrintReport(["epoch", "main/loss", "smorms3/step_s"]))

    Args:
        every: The trigger, as `chainer.training.Trainer.extend` takes it. LogReport forms the mean
            of what is reported between two of its own.
        by_rank: Whether the numbers of each rank are reported as well, as
            ``smorms3/rank0/step_s``.
        prometheus: A port on which rank 0 serves the numbers of all ranks, as for
            `smorms3_dist.StepMeter`.
    """

    priority = PRIORITY_WRITER

    def __init__(
        self,
        every: Any = (1, "epoch"),
        *,
        by_rank: bool = False,
        prometheus: int | str | None = None,
    ) -> None:
        self.trigger = every
        self._by_rank = by_rank
        self._prometheus = prometheus
        self._meter: StepMeter | None = None

    def initialize(self, trainer: Trainer) -> None:
        """Begins to record, and to serve where that was asked for."""
        optimizers = sharded_optimizers_of(trainer).values()
        self._meter = StepMeter(optimizers, prometheus=self._prometheus)
        for entry in entries_of(trainer):
            if entry.extension is self:
                entry.trigger = as_rank_zero(entry.trigger)

    def __call__(self, trainer: Trainer) -> None:
        """Reports. Collective."""
        assert self._meter is not None
        occasion = f"the StepReport of iteration {trainer.updater.iteration}"
        chainer.reporter.report(self._meter.read(occasion, self._by_rank))

    def finalize(self) -> None:
        """Ends what serves the numbers."""
        if self._meter is not None:
            self._meter.close()
