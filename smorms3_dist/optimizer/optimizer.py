"""`ShardedOptimizer`, in the place of a Chainer optimizer.

What it decides is what kind of step comes next: whether the model has changed and has to be laid
out over the ranks again, and who wants to see gradients. The step itself is in
`smorms3_dist.step.step`, what makes it look like the optimizer that it wraps in
`smorms3_dist.optimizer.wrapper`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from smorms3_dist.chainer_internals import loss_scale_of, uses_cleargrads, uses_fp32_update
from smorms3_dist.collectives.clocks import align_timelines
from smorms3_dist.collectives.connect import on_memory
from smorms3_dist.device.forks import tell_of_forks
from smorms3_dist.layout import FlatLayout
from smorms3_dist.optimizer.accumulation import Accumulation
from smorms3_dist.optimizer.finiteness import Finiteness
from smorms3_dist.optimizer.on_device import on_its_device
from smorms3_dist.optimizer.serialization import LeavesShardsOut
from smorms3_dist.optimizer.snapshot_log import SnapshotLog
from smorms3_dist.optimizer.sync import OutOfSync, compare, refuse
from smorms3_dist.optimizer.told import facts_of
from smorms3_dist.optimizer.wrapper import OptimizerWrapper
from smorms3_dist.phases import Phase, in_phase
from smorms3_dist.rank_page import page
from smorms3_dist.sharding.fingerprints import fingerprints_of
from smorms3_dist.sharding.gradients_in_flight import GradientsInFlight
from smorms3_dist.sharding.model import ModelView, check_parameters
from smorms3_dist.sharding.repairing import broadcast_parameters, broadcast_persistent_values
from smorms3_dist.sharding.rules import Kind
from smorms3_dist.sharding.sharded_model import GradientsAre, ShardedModel
from smorms3_dist.step.agreement import (
    NO_FLAGS,
    Background,
    Flag,
    NoMoreBatches,
    agree,
    end_training,
    meet,
)
from smorms3_dist.step.facts import SharedFacts
from smorms3_dist.step.step import Step
from smorms3_dist.step.way import StepPlan, Way, choose_way

import chainer

_logger = logging.getLogger(__name__)


class ShardedOptimizer(OptimizerWrapper):
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

    Attributes:
        gradients_read_by: The trainer's extension that reads gradients after each step, if any.
        keep_gradients: Whether to keep the mean gradients of a sharded step, 1/N on each rank, so
            that `gather_gradients` can be called after it. To be set by all ranks alike.
        check_finite: What is done about gradients that are not finite, as
            `smorms3_dist.create_multi_node_optimizer` says. To be set by all ranks alike.
    """

    zero_fill: bool
    gradients: str
    step_after_broadcast: bool
    exact: bool
    communication_dtype: str | None
    gather_dtype: str | None
    transport: str
    gradients_read_by: str | None
    uneven: str
    keep_gradients: bool
    check_finite: str
    # Those that the next update applies; `None` without double buffering.
    _in_flight: GradientsInFlight | None
    # The model as `setup` has seen it.
    _known: tuple[chainer.Link | None, list[chainer.Parameter]]
    _synchronized: bool
    # The way of the last update; `None` if it made no step.
    _way: Way | None
    _said: set[str]
    _snapshots: SnapshotLog
    # Whether the update that broadcasts parameters is still to come, though there is a layout.
    _broadcast_due: bool
    _background: list[Background]
    _asked_to_end: bool
    _finiteness: Finiteness
    _accumulation: Accumulation
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
        self._micro_batches = 1
        self._writes = 0
        self._number = self.collectives.count_user()
        self._setups = self._updates = self._tolerated = 0
        self._looking = ""
        link = actual_optimizer.target
        if link is not None:
            check_parameters(link)
        self._known = (link, [] if link is None else list(link.params()))

    @on_its_device
    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizerWrapper:
        # CuPy's arrays are copied to the current GPU.
        return super().__deepcopy__(memo)

    def _carried(self) -> dict[str, Any]:
        if self._in_flight is not None:
            # Before anything is copied: a thread writes to the states.
            self._in_flight.finish()
        own = {
            "_snapshots": copy.copy(self._snapshots),
            "_finiteness": Finiteness(),
            "_accumulation": Accumulation(self.micro_batches),
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

    @property
    def double_buffering(self) -> bool:
        """Whether each update applies the gradients of the one before."""
        return self._in_flight is not None

    @property
    def in_flight(self) -> GradientsInFlight | None:
        """The gradients that the next update applies, reduced; ``None`` without double buffering.

        Raises:
            RuntimeError: If their reduction has failed, naming the rank, and why.
        """
        if self._in_flight is not None:
            self._in_flight.finish()
        return self._in_flight

    @property
    def layout(self) -> FlatLayout | None:
        """The layout of the model over the ranks; ``None`` before the first update."""
        sharded = self._model_cell[0]
        return None if sharded is None else sharded.layout

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
                ``double_buffering`` was, and a rule needs whole arrays, or the reduction of the
                gradients of the call before has failed; or if other ranks do something else, or
                have ended; or if gradients are not finite and ``check_finite='error'`` was asked
                for.
            NoMoreBatches: In the place of the last but one with ``uneven='stop'``.
            TypeError: If the model has changed so that a parameter's dtype or device is not
                supported.
        """
        if self.actual_optimizer.target is None:
            raise RuntimeError("the optimizer has no target; call setup(link) before update()")
        if lossfun is not None:
            self._compute_gradients(lossfun, *args, **kwds)
        if self._accumulate():
            return
        model = self._view_model()
        model.note_loss_scale(loss_scale_of(self.actual_optimizer), used=lossfun is not None)
        self._refuse_whole_rules(model)
        plan = StepPlan.of(self.actual_optimizer, model)
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
        try:
            flags, self._tolerated, looking = agree(
                flags,
                self._facts(plan),
                self._since_last_step(),
                self.collectives,
                self._tolerated,
                self.uneven == "stop",
            )
        except NoMoreBatches:
            page.entered -= 1
            self._updates -= 1
            raise
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
        self._snapshots.start_step()
        self._broadcast_due = False
        if Flag.LAY_OUT in flags:
            self._lay_out(model, Flag.BROADCAST in flags)
        if Flag.BROADCAST in flags and Flag.STEP not in flags:
            self._way = None
            self.sharded_model.gradients_are = GradientsAre.NOT_REDUCED
        elif self._in_flight is not None:
            self._apply_in_flight(self._in_flight, model, plan, Flag.WHOLE_GRADIENTS in flags)
        else:
            self._make_step(model, plan, Flag.WHOLE_GRADIENTS in flags)
        self.sharded_model.note_values()
        page.finished += 1
        self.phases.end_step(self.actual_optimizer.t)

    def _make_step(self, model: ModelView, plan: StepPlan, whole_gradients: bool) -> None:
        sharded = self.sharded_model
        sharded.model = model
        sharded.adopt()
        memory = sharded.groups[0].memory
        self._way, fused = choose_way(plan, whole_gradients, self.keep_gradients, memory)
        looking = self._looking if self._tolerated else None
        step = Step(self.actual_optimizer, sharded, self.collectives, fused, looking)
        step.make(self._way)
        self.actual_optimizer.update_loss_scale()

    def _apply_in_flight(
        self, in_flight: GradientsInFlight, model: ModelView, plan: StepPlan, whole: bool
    ) -> None:
        """Makes a step of the gradients in flight, and lets those of now take their place."""
        sharded, loss_scale = self.sharded_model, model.loss_scale
        with self.phases.during(Phase.REDUCE):
            in_flight.finish()
            in_flight.take(sharded)
        if in_flight.are_there:
            model.loss_scale = in_flight.loss_scale
            self._make_step(model, plan, whole)
        else:
            self._way = None
            sharded.model = model
            sharded.adopt()
            sharded.gradients_are = GradientsAre.IN_FLIGHT
        in_flight.send(self.collectives, loss_scale)

    @property
    def asked_to_end(self) -> bool:
        """Whether this training is to save a checkpoint and to end, because it is preempted.

        It becomes true on all ranks after the same update. `smorms3_dist.ShardedCheckpoint` sees to
        it; a loop without a Trainer looks at this after each update, saves, and raises
        `smorms3_dist.Preempted`. A launcher asks only if somebody has looked before.
        """
        page.handles = 1
        return self._asked_to_end

    @on_its_device
    def gather_gradients(self) -> None:
        """Gives every rank the whole mean gradients of the last step, in ``param.grad``.

        They are what Chainer leaves there: changed by hooks, and without the loss scale. All ranks
        call this together. After a replicated step there is nothing to do. After an update that
        only broadcast parameters, they are the means of the gradients that it did not use. With
        double buffering they are those that the step has applied; where none were, there are none.

        Raises:
            RuntimeError: Before the first update, or if the last step has not kept them; or if
                other ranks do something else.
        """
        sharded = self._model_cell[0]
        if sharded is None or sharded.gradients_are is GradientsAre.NOT_KEPT:
            raise RuntimeError(
                "there are no mean gradients to gather: the last update did not keep them. Set "
                "optimizer.keep_gradients = True on all ranks before the step, or use "
                "gradients='replicated'"
            )
        if sharded.gradients_are not in (GradientsAre.WHOLE, GradientsAre.IN_FLIGHT):
            meet(self.collectives, "gather_gradients()")
            sharded.gather_gradients(self.collectives)

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds, with fp32 masters and gradients in flight.

        For SMORMS3, summed over the ranks: 3 x itemsize x parameters. Zero before the first update.
        """
        sharded = self._model_cell[0]
        return 0 if sharded is None else sum(group.nbytes for group in sharded.groups)

    @property
    def sharded_model(self) -> ShardedModel:
        """The model laid out over the ranks.

        Raises:
            RuntimeError: Before the first update, or `lay_out`.
        """
        sharded = self._model_cell[0]
        if sharded is None:
            raise RuntimeError("the model is not laid out yet; call update() or lay_out() first")
        return sharded

    def no_more_batches(self) -> None:
        """Lets the training end on all ranks, because this one makes no more steps.

        To be called after a loop of updates with ``uneven='stop'``. It waits until the others come
        to their next update, which raises `smorms3_dist.NoMoreBatches` there, or to this call.
        """
        end_training(self.collectives)

    @on_its_device
    def lay_out(self, occasion: str = "lay_out()") -> ShardedModel:
        """Lays the model out over the ranks as it is now, if that is not so already. Collective.

        All ranks take the parameters of rank 0 then. The first `update` does what it would have
        done otherwise.

        Args:
            occasion: What it is for, alike on all ranks.

        Raises:
            RuntimeError: Before ``setup``; or if the ranks' models differ; or if other ranks do
                something else.
        """
        if self.actual_optimizer.target is None:
            raise RuntimeError("the optimizer has no target; call setup(link) first")
        self._accumulation.refuse_unfinished(occasion)
        model = self._view_model()
        self._refuse_whole_rules(model)
        changed = meet(self.collectives, occasion, self._changes_of(model))
        if Flag.LAY_OUT in changed:
            check_parameters(model.link)
            self._lay_out(model, Flag.BROADCAST in changed)
            self._broadcast_due = self._broadcast_due or (
                Flag.BROADCAST in changed and not self._snapshots.loaded and not self._synchronized
            )
        sharded = self.sharded_model
        sharded.adopt()
        for group in sharded.sharded_groups:
            group.adopt_whole_states()
        if self._in_flight is not None:
            self._in_flight.finish()
        return sharded

    @on_its_device
    def check_sync(self, persistent: bool = False, repair: bool = False, when: str = "") -> None:
        """Compares across ranks what they have: all parameters, bit for bit. Collective.

        Also those that nothing updates, and those that are not initialized. The ranks exchange a
        digest, and more only if they differ.

        Args:
            persistent: Whether to compare the persistent values of links as well, such as the
                statistics of a batch normalization.
            repair: Whether to give all ranks what rank 0 has of what differs, instead of an error.
                Rank 0 logs what it was. fp32 masters follow: those that do not round to the value
                of rank 0 become that value. The states of the optimizer stay as they are.
            when: Words for errors, alike on all ranks, such as ``at the end of its training``.

        Raises:
            RuntimeError: If ranks differ, on all ranks, naming the first parameter that does, and
                the ranks; or other ranks make a step instead.
        """
        if self.actual_optimizer.target is None:
            raise RuntimeError("the optimizer has no target; call setup(link) first")
        call = f"check_sync(persistent={persistent}, repair={repair})"
        meet(self.collectives, f"{call} {when}".rstrip())
        model = self._view_model()
        found = self._compare(model, persistent, repair)
        if found is None:
            return
        sharded = self.lay_out()
        broadcast_parameters(sharded, found.parameters, self.collectives)
        broadcast_persistent_values(model.link, found.persistent_values, self.collectives)
        sharded.note_values()
        if self.collectives.rank == 0:
            _logger.warning(
                "the ranks were not in sync (t = %d): %s. Now all have what rank 0 has",
                self.actual_optimizer.t,
                found.words(),
            )

    def _compare(self, model: ModelView, persistent: bool, repair: bool) -> OutOfSync | None:
        """What ranks differ in; an error, unless it is going to be repaired. Collective."""
        fingerprints = fingerprints_of(model, model.memory(self.exact), persistent)
        found = compare(fingerprints, self.collectives)
        if found is not None and not repair:
            due = self._model_cell[0] is None or self._broadcast_due
            refuse(found, self.actual_optimizer.t, due)
        return found

    def note_loaded(self) -> None:
        """Notes that parameters and states have been loaded, on all ranks alike."""
        self._snapshots = SnapshotLog()
        self._snapshots.loaded = True
        self._broadcast_due = False

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

    @on_its_device
    def consolidate(self, root: int = 0) -> None:
        """Brings the whole states together on one rank, where snapshots are whole from then on.

        All ranks call this together. It takes 3 x itemsize x parameters of host memory on ``root``
        (for SMORMS3), until the next `update`, and next to nothing elsewhere.

        Args:
            root: The rank that is going to save.

        Raises:
            RuntimeError: If states that have been loaded as shards wait for the first update.
        """
        meet(self.collectives, f"consolidate(root={root})")
        self._snapshots.consolidate(self._model_cell[0], self.collectives, root, self.in_flight)

    def release_consolidated(self) -> None:
        """Frees the whole states that `consolidate` has brought together."""
        self._snapshots.release()

    @on_its_device
    def serialize(self, serializer: Any) -> None:
        """Writes or reads ``t``, ``epoch``, the states of the update rules and the loss scale.

        Nothing here communicates. After `consolidate`, ``root`` writes the whole states in
        Chainer's own keys, as a single rank always does. Other ranks, and all ranks without it,
        write their own shard: every rank has to save a file of its own, and to load that one again
        in a job of as many ranks. Snapshots of whole states, Chainer's and ChainerMN's own too, can
        be loaded at any world size, before the model or after it, and by all ranks. The first
        update after loading makes a step.

        Args:
            serializer: A serializer or deserializer of Chainer's.

        Raises:
            RuntimeError: If Chainer's snapshot extension is about to save the shard of one rank; if
                a snapshot is of another rank, world size or model. Nothing has been changed then.
        """
        if self.actual_optimizer.target is None:
            raise RuntimeError("the optimizer has no target; call setup(link) before serializing")
        if isinstance(serializer, LeavesShardsOut):
            return
        inner, collectives = self.actual_optimizer, self.collectives
        sharded, in_flight = self._model_cell[0], self.in_flight
        warn = functools.partial(self._say, logging.WARNING)
        if isinstance(serializer, chainer.serializer.Deserializer):
            self._snapshots.read(inner, serializer, sharded, collectives, in_flight, warn)
        else:
            self._snapshots.write(inner, serializer, sharded, collectives, in_flight, warn)

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

    # Before the step

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
        loss.backward(loss_scale=loss_scale_of(optimizer))

    def _view_model(self) -> ModelView:
        sharded = self._model_cell[0]
        before = None if sharded is None else sharded.model
        link = self.actual_optimizer.target
        if (
            before is not None
            and before.link is link
            and before.gather_dtype == self.gather_dtype
            and before.is_current()
        ):
            return before
        return ModelView(link, before, self.gather_dtype)

    def _changes_of(self, model: ModelView) -> Flag:
        """What has changed in the model since it was laid out."""
        sharded = self._model_cell[0]
        if sharded is None or not model.same_structure(sharded.model):
            return Flag.LAY_OUT | Flag.BROADCAST
        return NO_FLAGS if model.same_plans(sharded.model) else Flag.LAY_OUT

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

    def _written(self, model: ModelView) -> Flag:
        """Whether somebody has written to parameters of this rank since the last update."""
        sharded = self._model_cell[0]
        written = sharded is not None and sharded.was_written_to(model)
        return Flag.WRITTEN if written else NO_FLAGS

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
            "optimizer": f"number {self._number} of its communicator, for a "
            f"{type(optimizer.target).__name__}",
            "calls of setup()": self._setups,
            "keep_gradients": self.keep_gradients,
            "communication_dtype": self.communication_dtype,
            "gather_dtype": self.gather_dtype,
            "exact": self.exact,
            "micro-batches of the update": self._micro_batches,
            "double_buffering": self.double_buffering,
        }
        if self._in_flight is not None:
            settings["gradient in flight"] = self._in_flight.in_words
        return facts_of(optimizer, plan, settings, self._updates)

    def _refuse_whole_rules(self, model: ModelView) -> None:
        if self._in_flight is None or Kind.WHOLE not in model.kinds:
            return
        name, plan = next((n, p) for n, p in model.plans.items() if p.kind is Kind.WHOLE)
        raise RuntimeError(
            f"double_buffering=True was asked for, but {plan.rule} of parameter {name} runs on "
            f"whole arrays: {plan.reason}. Leave double_buffering out, or use a rule that treats "
            "each element by itself"
        )

    def _since_last_step(self) -> tuple[str, ...]:
        """What has been saved and loaded since the last step, and what goes on, in words."""
        words = self._snapshots.since_last_step(self.actual_optimizer.t)
        if self._background:
            kinds = sorted(type(work).__name__ for work in self._background)
            words += (f"has in the background: {', '.join(kinds)}",)
        return words

    def _make_missing_rules(self, model: ModelView) -> None:
        """Gives an update rule to parameters that came after ``setup``, without one.

        One that was there at ``setup`` has had its rule taken away on purpose.
        """
        link, params = self._known
        known = {id(param) for param in params}
        added = []
        # A model that the wrapped optimizer was set up with by itself was seen by nobody.
        for name, param in model.parameters() if link is model.link else ():
            if id(param) not in known and param.update_rule is None:
                param.update_rule = self.actual_optimizer.create_update_rule()
                if uses_fp32_update(self.actual_optimizer):
                    param.update_rule.use_fp32_update()
                added.append(name)
        if added:
            model.plan_again()
            self._say(
                logging.INFO, f"parameters added after setup get update rules: {', '.join(added)}"
            )
        self._known = (model.link, [param for _, param in model.parameters()])

    def _say(self, level: int, message: str) -> None:
        if self.collectives.rank == 0 and message not in self._said:
            _logger.log(level, message)
            self._said.add(message)

    @in_phase(Phase.LAYOUT)
    def _lay_out(self, model: ModelView, broadcast: bool) -> None:
        self._make_missing_rules(model)
        memory = model.memory(self.exact)
        assert self._host_collectives is not None, "there was a communicator to agree over"
        self._collectives = on_memory(
            self._host_collectives,
            memory,
            self._communicator,
            self.communication_dtype,
            self.gather_dtype,
            self.transport,
        )
        self.phases.use_clock(memory.clock())
        if self._in_flight is not None:
            self.collectives.check_side_channel()
            self._in_flight.finish()
            if broadcast:
                self._in_flight.drop()
        before = self._model_cell[0]
        if before is None:
            align_timelines(self.collectives)
        sent = self.communication_dtype
        sharded = ShardedModel(
            model, memory, self.collectives, broadcast, before, sent, self.double_buffering
        )
        if self._way is not None:
            sharded.gradients_are = GradientsAre.NOT_KEPT
        self._snapshots.write_pending_states(sharded, self._in_flight)
        self._model_cell[0] = sharded
        whole: dict[tuple[str, str], list[str]] = {}
        for name, plan in model.plans.items():
            if plan.kind is Kind.WHOLE:
                whole.setdefault((plan.rule, plan.reason), []).append(name)
        for (rule, reason), names in whole.items():
            self._say(
                logging.WARNING,
                f"{rule} runs on whole arrays, with its whole states on every rank: {reason} "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})",
            )
