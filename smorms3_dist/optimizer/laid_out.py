"""An optimizer and its model, laid out over the ranks: what each of them has.

The layout is made when it is needed, and again when the model has changed. What ranks have can be
compared, brought together, written and read.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from smorms3_dist.chainer_internals.optimizers import uses_fp32_update
from smorms3_dist.collectives.clocks import align_timelines
from smorms3_dist.collectives.connect import on_memory
from smorms3_dist.device.memory import Memory
from smorms3_dist.layout import FlatLayout
from smorms3_dist.optimizer.accumulation import Accumulation
from smorms3_dist.optimizer.on_device import on_its_device
from smorms3_dist.optimizer.overlap import Overlap, small_bucket_bytes
from smorms3_dist.optimizer.overlap_gather import OverlapGather
from smorms3_dist.optimizer.serialization import LeavesShardsOut
from smorms3_dist.optimizer.snapshot_log import SnapshotLog
from smorms3_dist.optimizer.sync import OutOfSync, are_alike, compare, refuse
from smorms3_dist.optimizer.wrapper import OptimizerWrapper
from smorms3_dist.phases import Phase, in_phase
from smorms3_dist.sharding.fingerprints import fingerprints_of
from smorms3_dist.sharding.gradients_in_flight import GradientsInFlight
from smorms3_dist.sharding.model import ModelView, check_parameters
from smorms3_dist.sharding.repairing import broadcast_parameters, broadcast_persistent_values
from smorms3_dist.sharding.rules import Kind
from smorms3_dist.sharding.sharded_model import GradientsAre, ShardedModel
from smorms3_dist.step.agreement import NO_FLAGS, Flag, meet
from smorms3_dist.step.way import Way

import chainer

_logger = logging.getLogger(__name__)

ShapeOf = Callable[[str], tuple[int, ...] | None]
"""Gives the shape of a parameter by its path, if it is known."""


class LaidOutOptimizer(OptimizerWrapper):
    """An optimizer whose model, with the states, lies over the ranks.

    Options are what `smorms3_dist.optimizer.optimizer.ShardedOptimizer` was told.
    """

    exact: bool
    communication_dtype: str | None
    gather_dtype: str | None
    transport: str
    _share_parameters: bool
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
    _accumulation: Accumulation
    _overlap: Overlap
    _overlap_gather: OverlapGather

    @on_its_device
    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizerWrapper:
        # CuPy's arrays are copied to the current GPU.
        return super().__deepcopy__(memo)

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
    def overlap(self) -> bool | str:
        """Whether gradients are reduced during the backward pass, as was asked for."""
        return self._overlap.wanted

    @property
    def overlap_gather(self) -> bool:
        """Whether parameters are gathered beside the next forward pass, as was asked for."""
        return self._overlap_gather.wanted

    def _finish_gather(self) -> None:
        """Waits until all parameters are there, where they are gathered beside the training."""
        sharded = self._model_cell[0]
        if sharded is not None:
            sharded.finish_gather()

    @property
    def share_parameters(self) -> bool:
        """Whether the ranks of a host share one array of parameters, as was asked for."""
        return self._share_parameters

    @property
    def layout(self) -> FlatLayout | None:
        """The layout of the model over the ranks; ``None`` before the first update."""
        sharded = self._model_cell[0]
        return None if sharded is None else sharded.layout

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

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds, with fp32 masters and gradients in flight.

        For SMORMS3, summed over the ranks: 3 x itemsize x parameters. Zero before the first update.
        """
        sharded = self._model_cell[0]
        return 0 if sharded is None else sum(group.nbytes for group in sharded.groups)

    @on_its_device
    def lay_out(
        self,
        occasion: str = "lay_out()",
        shape_of: ShapeOf | None = None,
    ) -> ShardedModel:
        """Lays the model out over the ranks as it is now, if that is not so already. Collective.

        All ranks take the parameters of rank 0 then. The first `update` does what it would have
        done otherwise.

        Args:
            occasion: What it is for, alike on all ranks.
            shape_of: In what shape parameters are initialized that are not yet.

        Raises:
            RuntimeError: Before ``setup``; or if the ranks' models differ; or if other ranks do
                something else.
        """
        return self._lay_out_on(occasion, shape_of)

    def _lay_out_on(
        self,
        occasion: str,
        shape_of: ShapeOf | None = None,
        compare: bool = True,
    ) -> ShardedModel:
        """See `lay_out`.

        Args:
            occasion: What it is for.
            shape_of: Likewise.
            compare: Whether what somebody has written is compared before ranks share it.
        """
        if self.actual_optimizer.target is None:
            raise RuntimeError("the optimizer has no target; call setup(link) first")
        self._accumulation.refuse_unfinished(occasion)
        model = self._view_model()
        if shape_of is not None and model.uninitialized:
            for path, param in model.uninitialized.items():
                if (shape := shape_of(path)) is not None:
                    param.initialize(shape)
            model = self._view_model()
        self._refuse_whole_rules(model)
        if self.overlap:
            occasion += f" (overlap={self.overlap})"
        if self.overlap_gather:
            occasion += " (overlap_gather=True)"
        flags = self._changes_of(model)
        if self.share_parameters:
            occasion += " (share_parameters=True)"
            flags |= self._written(model)
        changed = meet(self.collectives, occasion, flags)
        if Flag.LAY_OUT in changed:
            check_parameters(model.link)
            self._lay_out(model, Flag.BROADCAST in changed)
            self._broadcast_due = self._broadcast_due or (
                Flag.BROADCAST in changed and not self._snapshots.loaded and not self._synchronized
            )
        elif Flag.WRITTEN in changed and self.sharded_model.shares:
            if compare:
                self._compare(model, persistent=False, repair=False)
            self._move_in()
        sharded = self.sharded_model
        sharded.adopt(model if model is sharded.model else None)
        sharded.is_whole = not model.uninitialized
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
        sharded = self._lay_out_on("the repair", compare=False)
        broadcast_parameters(sharded, found.parameters, self.collectives)
        broadcast_persistent_values(model.link, found.persistent_values, self.collectives)
        sharded.note_values()
        if self.collectives.rank == 0:
            _logger.warning(
                "the ranks were not in sync (t = %d): %s. Now all have what rank 0 has",
                self.actual_optimizer.t,
                found.words(),
            )

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

    def note_loaded(self) -> None:
        """Notes that parameters and states have been loaded, on all ranks alike."""
        self._snapshots = SnapshotLog()
        self._snapshots.loaded = True
        self._broadcast_due = False
        if self.share_parameters:
            # Nobody else has written.
            self.sharded_model.note_values()

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

    def _written(self, model: ModelView) -> Flag:
        """Whether somebody has written to parameters of this rank since the last update."""
        sharded = self._model_cell[0]
        written = sharded is not None and sharded.was_written_to(model)
        return Flag.WRITTEN if written else NO_FLAGS

    def _changes_of(self, model: ModelView) -> Flag:
        """What has changed in the model since it was laid out."""
        sharded = self._model_cell[0]
        if sharded is None or not model.same_structure(sharded.model):
            return Flag.LAY_OUT | Flag.BROADCAST
        alike = model.same_plans(sharded.model) and not sharded.is_to_share
        return NO_FLAGS if alike else Flag.LAY_OUT

    def _refuse_whole_rules(self, model: ModelView) -> None:
        asked = {
            "double_buffering": self.double_buffering,
            "share_parameters": self.share_parameters,
        }
        options = [option for option, wanted in asked.items() if wanted]
        if not options or Kind.WHOLE not in model.kinds:
            return
        name, plan = next((n, p) for n, p in model.plans.items() if p.kind is Kind.WHOLE)
        raise RuntimeError(
            f"{options[0]}=True was asked for, but {plan.rule} of parameter {name} runs on "
            f"whole arrays: {plan.reason}. Leave {options[0]} out, or use a rule that treats "
            "each element by itself"
        )

    def _move_in(self) -> None:
        """Takes over what somebody has written to parameters that ranks share. Collective."""
        if not self.sharded_model.were_replaced:
            self._say(
                logging.WARNING,
                "somebody has written to param.array between updates, which all ranks of a host "
                "have in common (share_parameters=True): what each of them adds to it is added as "
                "often as there are ranks. The same values on all ranks are all right",
            )
        self.sharded_model.move_in(self.collectives)

    def _refuse_to_share(self, memory: Memory) -> None:
        """Refuses to share parameters where there is no way to do it."""
        assert self._host_collectives is not None, "there was a communicator to agree over"
        if not self.share_parameters:
            return
        reason = self._host_collectives.why_not_shared()
        if memory.launcher is not None:
            reason = "it is for models in host memory, and this one is on a GPU"
        if reason is not None:
            raise ValueError(
                f"share_parameters=True was asked for, but {reason}; leave share_parameters out"
            )

    def _compare(self, model: ModelView, persistent: bool, repair: bool) -> OutOfSync | None:
        """What ranks differ in; an error, unless it is going to be repaired. Collective."""
        memory, sharded = model.memory(self.exact), self._model_cell[0]
        flats = None if sharded is None else sharded.flats_of(model)
        fingerprints = fingerprints_of(model, memory, persistent, flats)
        if are_alike(fingerprints, self.collectives):
            return None
        # What lies between parameters, in flat buffers, may differ.
        each = fingerprints if flats is None else fingerprints_of(model, memory, persistent)
        found = compare(each, self.collectives)
        if found is not None and not repair:
            due = self._model_cell[0] is None or self._broadcast_due
            refuse(found, self.actual_optimizer.t, due)
        return found

    @in_phase(Phase.LAYOUT)
    def _lay_out(self, model: ModelView, broadcast: bool) -> None:
        memory = model.memory(self.exact)
        self._refuse_to_share(memory)
        self._make_missing_rules(model)
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
        self._overlap.decide(self.collectives, self._say)
        self._overlap_gather.decide(self.collectives, self._say)
        self._overlap_gather.finish()
        self._overlap_gather.forget_order()
        bucket_bytes = self._overlap.bucket_bytes(self.collectives)
        if self._overlap_gather.is_possible:
            bucket_bytes = bucket_bytes or small_bucket_bytes(self.collectives)
        sharded = ShardedModel(
            model,
            memory,
            self.collectives,
            broadcast,
            before,
            self.communication_dtype,
            self.double_buffering,
            bucket_bytes,
            self.share_parameters,
        )
        if sharded.obstacle is not None:
            self._say(
                logging.WARNING,
                "share_parameters=True was asked for, but each rank has parameters of its own: "
                f"{sharded.obstacle}",
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
        if self.collectives.rank == 0:
            self._say_here(level, message)

    def _say_here(self, level: int, message: str) -> None:
        """Says something that other ranks may not know; once."""
        if message not in self._said:
            _logger.log(level, message)
            self._said.add(message)
