"""`ShardedOptimizer`, in the place of a Chainer optimizer.

What it decides is what kind of step comes next: whether it is a micro-batch, makes a step of its
own gradients or of those in flight, or broadcasts parameters. The step itself is in
`smorms3_dist.step.step`, what ranks tell each other before it in
`smorms3_dist.optimizer.before_step`, what they have in `smorms3_dist.optimizer.laid_out`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from smorms3_dist.chainer_internals.loss_scale import loss_scale_of
from smorms3_dist.chainer_internals.optimizers import uses_cleargrads
from smorms3_dist.device.forks import tell_of_forks
from smorms3_dist.optimizer.accumulation import Accumulation
from smorms3_dist.optimizer.before_step import AgreeingOptimizer
from smorms3_dist.optimizer.finiteness import Finiteness
from smorms3_dist.optimizer.on_device import on_its_device
from smorms3_dist.optimizer.overlap import Overlap
from smorms3_dist.optimizer.overlap_gather import OverlapGather
from smorms3_dist.optimizer.snapshot_log import SnapshotLog
from smorms3_dist.phases import Phase, in_phase
from smorms3_dist.rank_page import page
from smorms3_dist.sharding.gradients_in_flight import GradientsInFlight
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.model import ModelView, check_parameters
from smorms3_dist.sharding.rules import Kind
from smorms3_dist.sharding.sharded_model import GradientsAre, ShardedModel
from smorms3_dist.step.agreement import Flag, end_training
from smorms3_dist.step.step import Step
from smorms3_dist.step.way import StepPlan, Way, choose_way

import chainer


class ShardedOptimizer(AgreeingOptimizer):
    """A multi-node optimizer that keeps 1/N of the optimizer's states on each rank.

    Make it with `smorms3_dist.create_multi_node_optimizer` or `smorms3_dist.shard`. What it does
    not have itself is the wrapped optimizer's, as `OptimizerWrapper` says.

    Args:
        actual_optimizer: The optimizer to wrap.
        communicator: A ChainerMN communicator, another object with its interface, or an mpi4py
            communicator.
        zero_fill: Kept, as ChainerMN's multi-node optimizer keeps it.
        gradients: ``'auto'``, ``'replicated'`` or ``'sharded'``.
        step_after_broadcast: Whether a call that broadcasts parameters makes a step as well.
        exact: Whether kernels on GPUs give the results of CPUs bit for bit.
        communication_dtype: The narrow dtype in which gradients are sent; ``None`` for their own.
        gather_dtype: That in which parameters are.
        transport: ``'auto'`` or ``'nccl'``.
        synchronized: Whether all ranks have the same parameters already, so that the first update
            makes a step as well.
        uneven: ``'error'`` or ``'stop'``.
        check_finite: ``'off'``, ``'warn'`` or ``'error'``.
        accumulate: How many micro-batches make an update.
        double_buffering: Whether each update applies the gradients of the one before.
        overlap: ``'auto'``, ``True`` or ``False``.
        overlap_gather: Whether parameters are gathered beside the next forward pass.
        share_parameters: Whether the ranks of a host share one array of parameters.

    Attributes:
        gradients_read_by: The trainer's extension that reads gradients after each step, if any.
        keep_gradients: Whether to keep the mean gradients of a sharded step, 1/N on each rank, so
            that `gather_gradients` can be called after it. To be set by all ranks alike.
        check_finite: What is done about gradients that are not finite, as
            `smorms3_dist.create_multi_node_optimizer` says. To be set by all ranks alike.
    """

    zero_fill: bool

    def __init__(
        self,
        actual_optimizer: chainer.GradientMethod,
        communicator: Any,
        zero_fill: bool = True,
        gradients: str = "auto",
        step_after_broadcast: bool = False,
        exact: bool = False,
        communication_dtype: str | None = None,
        gather_dtype: str | None = None,
        transport: str = "auto",
        synchronized: bool = False,
        uneven: str = "error",
        check_finite: str = "off",
        accumulate: int = 1,
        double_buffering: bool = False,
        overlap: bool | str = False,
        overlap_gather: bool = False,
        share_parameters: bool = False,
    ) -> None:
        super().__init__(actual_optimizer, communicator)
        self.zero_fill = zero_fill
        self.gradients = gradients
        self.step_after_broadcast = step_after_broadcast
        self.exact = exact
        self.communication_dtype = communication_dtype
        self.gather_dtype = gather_dtype
        self.gradients_read_by = None
        self.uneven = uneven
        self.keep_gradients = False
        self.check_finite = check_finite
        self.transport = transport
        self._share_parameters = share_parameters
        self._in_flight = GradientsInFlight() if double_buffering else None
        self._synchronized = synchronized
        self._way = None
        self._said = set()
        self._snapshots = SnapshotLog()
        self._broadcast_due = False
        self._background = []
        self._asked_to_end = False
        self._finiteness = Finiteness()
        self._accumulation = Accumulation(accumulate)
        self._overlap = Overlap(overlap)
        self._overlap_gather = OverlapGather(overlap_gather)
        self._micro_batches = 1
        self._writes = 0
        self._number = self.collectives.count_user()
        self._setups = self._updates = self._tolerated = 0
        self._looking = ""
        link = actual_optimizer.target
        if link is not None:
            check_parameters(link)
            self._overlap_gather.set_up(link)
        self._known = (link, [] if link is None else list(link.params()))

    def _carried(self) -> dict[str, Any]:
        if self._in_flight is not None:
            # Before anything is copied: a thread writes to the states.
            self._in_flight.finish()
        own = {
            "_snapshots": copy.copy(self._snapshots),
            "_finiteness": Finiteness(),
            "_accumulation": Accumulation(self.micro_batches),
            "_overlap": Overlap(self.overlap),
            "_overlap_gather": OverlapGather(self.overlap_gather),
            "_background": [],
        }
        return {**super()._carried(), **own}

    @property
    def gradient_mode(self) -> str | None:
        """``'sharded'`` or ``'replicated'``, as in the last update.

        ``None`` before the first one, and after one that made no step.
        """
        if self._way is None:
            return None
        return "replicated" if self._way is Way.REPLICATED else "sharded"

    def setup(self, link: chainer.Link) -> ShardedOptimizer:
        """Sets the target link, resets ``t`` and ``epoch``, and gives parameters new update rules.

        Args:
            link: The model. Its parameters' states start afresh.

        Returns:
            This optimizer.

        Raises:
            TypeError: If it is no link, or a parameter is no NumPy or CuPy array of a floating
                dtype.
            ValueError: If it has no parameters, or they lie on several devices.
        """
        if not isinstance(link, chainer.Link):
            raise TypeError(f"optimization target must be a link, not {type(link).__name__}")
        check_parameters(link)
        if link.device.name.startswith("@cupy"):
            tell_of_forks(self.collectives.rank)
        self._accumulation.refuse_unfinished("setup()")
        if self._in_flight is not None:
            self._in_flight.drop()
        self._synchronized = self._synchronized and link is self.actual_optimizer.target
        self.actual_optimizer.setup(link)
        self._overlap_gather.set_up(link)
        self._snapshots = SnapshotLog()
        self._broadcast_due = False
        self._known = (link, list(link.params()))
        self._setups += 1
        self._updates = 0
        return self

    @in_phase(Phase.AGREE)
    @on_its_device
    def update(self, lossfun: Callable[..., Any] | None = None, *args: Any, **kwds: Any) -> None:
        """Runs one step on all ranks together.

        The first call, and the first after the model has changed (a parameter was initialized,
        added, replaced or removed, on any rank), broadcasts the parameters of rank 0 instead and
        discards the gradients, as ChainerMN does: ``t`` is the number of calls less one. With
        ``step_after_broadcast`` it makes a step as well.

        With ``double_buffering``, the step applies the mean gradients of the call before, and those
        of this call are reduced until the next one. Where there are none from before, as in the
        first call after one that has broadcast parameters, no step is made.

        With ``accumulate=k``, each call but every k-th only adds its gradients to those of the
        k-th, as all calls within `accumulate` do.

        Args:
            lossfun: Returns the loss, given ``args`` and ``kwds``; gradients are then computed
                here. Without it, the gradients that the parameters hold are used.
            *args: For ``lossfun``.
            **kwds: For ``lossfun``.

        Raises:
            RuntimeError: Before ``setup``; or if ranks have different models or hooks; or if
                ``gradients='sharded'`` was asked for and something needs whole gradients; or if
                ``double_buffering`` or ``share_parameters`` was, and a rule needs whole arrays; or
                if the reduction of the gradients of the call before has failed; or if a hook writes
                to whole parameters that ranks share; or if other ranks do something else, or have
                ended; or if gradients are not finite and ``check_finite='error'`` was asked
                for.
            NoMoreBatches: In the place of the last but one with ``uneven='stop'``.
            TypeError: If the model has changed so that a parameter's dtype or device is not
                supported.
        """
        if self.actual_optimizer.target is None:
            raise RuntimeError("the optimizer has no target; call setup(link) before update()")
        self._overlap.start_update()
        if lossfun is not None:
            self._compute_gradients(lossfun, *args, **kwds)
        self._finish_gather()
        self._overlap_gather.finish()
        if self._accumulate():
            return
        model = self._view_model()
        model.note_loss_scale(loss_scale_of(self.actual_optimizer), used=lossfun is not None)
        self._refuse_whole_rules(model)
        plan = StepPlan.of(self.actual_optimizer, model)
        try:
            self._update_together(model, plan)
        except BaseException:
            self._overlap.fail_update()
            raise

    def _update_together(self, model: ModelView, plan: StepPlan) -> None:
        """Agrees with the other ranks on what this update is, and makes it. Collective."""
        flags = self._agree(model, plan)
        self._snapshots.start_step()
        self._broadcast_due = False
        left_to_gather: list[ShardedGroup] = []
        if Flag.LAY_OUT in flags:
            self._lay_out(model, Flag.BROADCAST in flags)
        elif Flag.WRITTEN in flags and self.sharded_model.shares:
            self._move_in()
        if Flag.BROADCAST in flags and Flag.STEP not in flags:
            self._way = None
            self.sharded_model.gradients_are = GradientsAre.NOT_REDUCED
        elif self._in_flight is not None:
            self._apply_in_flight(self._in_flight, model, plan, Flag.WHOLE_GRADIENTS in flags)
        else:
            left_to_gather = self._make_step(model, plan, Flag.WHOLE_GRADIENTS in flags)
        sharded = self.sharded_model
        sharded.note_values(seen=self._parameters_were_seen(model))
        # Of a copy, which has a layout already.
        self._overlap.decide(self.collectives, self._say)
        replicated = self._way is Way.REPLICATED
        self._overlap.finish_update(flags, replicated, sharded, self.collectives)
        self._overlap_gather.decide(self.collectives, self._say)
        if left_to_gather:
            self._overlap_gather.start(sharded, left_to_gather, self.collectives, self._say_here)
        page.finished += 1
        self.phases.end_step(self.actual_optimizer.t)

    def _make_step(
        self, model: ModelView, plan: StepPlan, whole_gradients: bool
    ) -> list[ShardedGroup]:
        """Makes a step. Collective.

        Returns:
            The groups whose parameters are to be gathered afterwards.
        """
        sharded = self.sharded_model
        sharded.adopt(model)
        memory = sharded.groups[0].memory
        early = self._overlap.early
        self._way, fused = choose_way(
            plan, whole_gradients, self.keep_gradients, memory, early is not None
        )
        looking = self._looking if self._tolerated else None
        leaves_gather = self._leaves_gather(model, plan)
        step = Step(
            *(self.actual_optimizer, sharded, self.collectives, fused),
            looking,
            early,
            leaves_gather,
        )
        step.make(self._way)
        self.actual_optimizer.update_loss_scale()
        return step.left_to_gather

    def _leaves_gather(self, model: ModelView, plan: StepPlan) -> bool:
        """Whether the parameters of this step may be gathered after it; on all ranks alike."""
        if not self._overlap_gather.is_possible:
            return False
        obstacle = None
        if self.sharded_model.shares:
            obstacle = "ranks of a host share parameters"
        elif Kind.WHOLE in model.kinds:
            obstacle = "there is an update rule that runs on whole arrays"
        elif self._way is Way.REPLICATED:
            obstacle = "hooks see whole gradients and parameters"
        elif plan.fused is None and self._way is Way.STAGED:
            obstacle = "hooks see parameters that they might keep"
        if obstacle is not None:
            self._overlap_gather.say_why_not(self._say, obstacle)
        return obstacle is None

    def _parameters_were_seen(self, model: ModelView) -> bool:
        """Whether code of others has seen parameters in the update: of hooks, or whole rules."""
        return self._way in (Way.STAGED, Way.REPLICATED) or Kind.WHOLE in model.kinds

    def _apply_in_flight(
        self, in_flight: GradientsInFlight, model: ModelView, plan: StepPlan, whole: bool
    ) -> None:
        """Makes a step of the gradients in flight, and lets those of now take their place."""
        sharded, loss_scale = self.sharded_model, model.loss_scale
        with self.phases.during(Phase.REDUCE):
            in_flight.finish()
            in_flight.take(sharded)
            if sharded.shares:
                # They may be parameters themselves, which other ranks are about to update.
                self.collectives.meet_on_host()
        if in_flight.are_there:
            model.loss_scale = in_flight.loss_scale
            self._make_step(model, plan, whole)
        else:
            self._way = None
            sharded.adopt(model)
            sharded.gradients_are = GradientsAre.IN_FLIGHT
        in_flight.send(self.collectives, loss_scale)

    @on_its_device
    def no_more_batches(self) -> None:
        """Lets the training end on all ranks, because this one makes no more steps.

        To be called after a loop of updates with ``uneven='stop'``. It waits until the others come
        to their next update, which raises `smorms3_dist.NoMoreBatches` there, or to this call.
        """
        self._finish_gather()
        self._overlap.hold_up_nobody()
        if end_training(self.collectives):
            # As they do, to whom it has become an error.
            self._overlap.abandon(self._say)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Lets the updates within a ``with`` block be micro-batches of the one that follows it.

        They compute gradients, if they are given a loss, and nothing else. The update after the
        block adds its own and takes the mean of all, as that of one large batch would be. All ranks
        take as many micro-batches.
        """
        with self._accumulation.hold_back():
            yield

    @property
    def micro_batches(self) -> int:
        """How many calls of `update` make one step, as ``accumulate`` has said."""
        return self._accumulation.micro_batches

    @in_phase(Phase.COMPUTE)
    def _accumulate(self) -> bool:
        """Adds a micro-batch to those before; returns whether there is more to come."""
        accumulation = self._accumulation
        held_back = accumulation.is_next_held_back
        self._micro_batches = 1
        if held_back or accumulation.count:
            scale = loss_scale_of(self.actual_optimizer)
            accumulation.add(self.actual_optimizer.target.params(), scale)
        if not held_back and accumulation.count:
            self._micro_batches = accumulation.release()
        return held_back

    @in_phase(Phase.COMPUTE)
    def _compute_gradients(self, lossfun: Callable[..., Any], *args: Any, **kwds: Any) -> None:
        optimizer = self.actual_optimizer
        loss = lossfun(*args, **kwds)
        # After the forward pass, which may have created parameters that have to be cleared as well.
        if uses_cleargrads(optimizer):
            optimizer.target.cleargrads()
        else:
            optimizer.target.zerograds()
        accumulation = self._accumulation
        sharded = None if accumulation.is_next_held_back else self._laid_out_as_it_is()
        self._overlap.run_backward(
            loss,
            optimizer.target,
            sharded,
            accumulation.mean_with,
            loss_scale=loss_scale_of(optimizer),
        )

    def _laid_out_as_it_is(self) -> ShardedModel | None:
        """The model laid out, unless it has changed since, or nothing is going to ask for it."""
        sharded = self._model_cell[0]
        if sharded is None or self._broadcast_due or not self._overlap.has_order:
            return None
        return None if self._changes_of(self._view_model()) else sharded
