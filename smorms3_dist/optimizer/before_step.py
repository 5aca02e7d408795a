"""What ranks tell each other before a step, and what follows from it.

Each raises its flags, and says what it was told; one word goes round, in which all flags are, and
where they differ (`smorms3_dist.step.agreement`). From there on all know the same.
"""

from __future__ import annotations

import logging

from smorms3_dist.chainer_internals.loss_scale import loss_scale_of
from smorms3_dist.optimizer.finiteness import Finiteness
from smorms3_dist.optimizer.laid_out import LaidOutOptimizer
from smorms3_dist.optimizer.overlap import OPTIMIZER, STATE
from smorms3_dist.optimizer.overlap_gather import STATE as GATHER_STATE
from smorms3_dist.optimizer.told import facts_of
from smorms3_dist.phases import Phase
from smorms3_dist.rank_page import page
from smorms3_dist.sharding.model import ModelView, check_parameters
from smorms3_dist.step.agreement import (
    NO_FLAGS,
    Background,
    DifferError,
    Flag,
    NoMoreBatches,
    agree,
)
from smorms3_dist.step.facts import SharedFacts
from smorms3_dist.step.way import StepPlan


class AgreeingOptimizer(LaidOutOptimizer):
    """An optimizer that agrees with those of the other ranks on the step to come.

    Options are what `smorms3_dist.optimizer.optimizer.ShardedOptimizer` was told.
    """

    gradients: str
    step_after_broadcast: bool
    uneven: str
    gradients_read_by: str | None
    keep_gradients: bool
    check_finite: str
    _background: list[Background]
    _asked_to_end: bool
    _finiteness: Finiteness
    # Of the update that is under way, or was the last one.
    _micro_batches: int
    # How often somebody has written to parameters before an update.
    _writes: int
    # Which of the communicator's optimizers this is; how often it was set up, and updated since.
    _number: int
    _setups: int
    _updates: int
    # In which hooks ranks differ that may only look; see `smorms3_dist.step.agreement.Agreement`.
    _tolerated: int
    _looking: str

    def _agree(self, model: ModelView, plan: StepPlan) -> Flag:
        """Tells the other ranks what this one knows, and acts on what they all know. Collective.

        Raises:
            RuntimeError: As `ShardedOptimizer.update`.
            NoMoreBatches: Likewise.
        """
        flags = self._flags_of(model) | self._gradients_wanted(plan)
        flags |= self._written(model)
        if self.check_finite != "off" and not plan.dynamic:
            memory = model.memory(self.exact)
            with self.phases.during(Phase.HOOKS):
                flags |= self._finiteness.flags(model, memory, self.communication_dtype)
        if model.loss_scale is not None:
            flags |= Flag.SCALED
        for work in self._background:
            flags |= work.flags()
        if page.asked:
            flags |= Flag.ASKED_TO_END
        page.entered += 1
        self._updates += 1
        flags |= self._overlap.flags()
        try:
            flags, self._tolerated, looking = agree(
                flags,
                self._facts(plan),
                self._since_last_step(),
                self.collectives,
                self._tolerated,
                self.uneven == "stop",
            )
        except DifferError as error:
            self._overlap.refuse(error, self._say)
            raise
        except BaseException as error:
            self._overlap.abandon(self._say)
            if isinstance(error, NoMoreBatches):
                page.entered -= 1
                self._updates -= 1
            raise
        self._overlap.settle(flags, self._say)
        if looking:
            self._looking = "; ".join(looking)
            self._say(logging.WARNING, f"ranks have hooks that may only look: {self._looking}")
        if Flag.SCALED in flags:
            # Also where a rank has no gradient in this step, and so nothing noted.
            model.loss_scale = model.loss_scale or loss_scale_of(self.actual_optimizer)
        self._asked_to_end = Flag.ASKED_TO_END in flags
        for work in self._background:
            work.proceed(flags)
        if Flag.WRITTEN in flags and Flag.BROADCAST not in flags:
            self._compare_written(model)
        if Flag.NOT_FINITE in flags and (Flag.BROADCAST not in flags or Flag.STEP in flags):
            mode, t = self.check_finite, self.actual_optimizer.t
            sent = self.communication_dtype
            self._finiteness.report(model, mode, t, self.collectives, sent)
        return flags

    @property
    def asked_to_end(self) -> bool:
        """Whether this training is to save a checkpoint and to end, because it is preempted.

        It becomes true on all ranks after the same update. `smorms3_dist.ShardedCheckpoint` sees to
        it; a loop without a Trainer looks at this after each update, saves, and raises
        `smorms3_dist.Preempted`. A launcher asks only if somebody has looked before.
        """
        page.handles = 1
        return self._asked_to_end

    @property
    def background(self) -> tuple[Background, ...]:
        """What goes on beside the training."""
        return tuple(self._background)

    def ask_before_each_step(self, work: Background) -> None:
        """Notes something that goes on beside the training; on all ranks alike.

        Args:
            work: It is asked for its flags before each step, and told those of all ranks.
        """
        self._background.append(work)

    def _flags_of(self, model: ModelView) -> Flag:
        """What this rank knows of the model, and all must act upon together."""
        flags = self._changes_of(model)
        if self._broadcast_due:
            flags |= Flag.LAY_OUT | Flag.BROADCAST
        if Flag.BROADCAST in flags:
            check_parameters(model.link)
            first = self._model_cell[0] is None
            synchronized = self._snapshots.loaded or (first and self._synchronized)
            if self.step_after_broadcast or synchronized:
                flags |= Flag.STEP
        return flags

    def _gradients_wanted(self, plan: StepPlan) -> Flag:
        """Whether this rank needs whole gradients."""
        if self.gradients == "sharded" and plan.needs_whole is not None:
            raise RuntimeError(
                f"gradients='sharded' was asked for, but {plan.needs_whole}. Use gradients='auto' "
                "or 'replicated'"
            )
        if self.gradients == "replicated":
            return Flag.WHOLE_GRADIENTS
        if plan.needs_whole is not None:
            self._say(logging.WARNING, f"every rank receives whole gradients: {plan.needs_whole}")
            return Flag.WHOLE_GRADIENTS
        reader = self.gradients_read_by
        if reader is not None and not self.keep_gradients:
            self._say(
                logging.WARNING,
                f"every rank receives whole gradients: the extension {reader} reads them after "
                "each step. With report_grads=False it does not",
            )
            return Flag.WHOLE_GRADIENTS
        self._say(logging.INFO, "gradients are sharded: nothing needs them whole")
        return NO_FLAGS

    def _compare_written(self, model: ModelView) -> None:
        """Compares what was written, before owners make half of it everybody's. Collective.

        Who writes before each step, as one who clips weights does, pays for it ever more rarely.
        """
        if self._writes & (self._writes + 1) == 0:
            self._compare(model, persistent=False, repair=False)
        self._writes += 1

    def _facts(self, plan: StepPlan) -> SharedFacts:
        """What this rank was told, and all must have been told alike."""
        optimizer = self.actual_optimizer
        settings = {
            OPTIMIZER: f"number {self._number} of its communicator, for a "
            f"{type(optimizer.target).__name__}",
            "calls of setup()": self._setups,
            "keep_gradients": self.keep_gradients,
            "communication_dtype": self.communication_dtype,
            "gather_dtype": self.gather_dtype,
            "exact": self.exact,
            "micro-batches of the update": self._micro_batches,
            "double_buffering": self.double_buffering,
            "overlap": self.overlap,
            STATE: self._overlap.state,
            "overlap_gather": self.overlap_gather,
            GATHER_STATE: self._overlap_gather.state,
            "share_parameters": self.share_parameters,
        }
        if self._in_flight is not None:
            settings["gradient in flight"] = self._in_flight.in_words
        return facts_of(optimizer, plan, settings, self._updates)

    def _since_last_step(self) -> tuple[str, ...]:
        """What has been saved and loaded since the last step, and what goes on, in words."""
        words = self._snapshots.since_last_step(self.actual_optimizer.t)
        if self._background:
            kinds = sorted(type(work).__name__ for work in self._background)
            words += (f"has in the background: {', '.join(kinds)}",)
        return words
