"""The order of a step: reduction, hooks, update of the own shard, gathering.

What happens, and when, is Chainer's: check of the gradients, pre hooks, ``t``, for each parameter
the division by the loss scale, hooks of its rule and the update, post hooks. Who sees the gradients
meanwhile depends on the way that the step takes: `smorms3_dist.step.way`.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from smorms3_dist.chainer_internals.loss_scale import (
    is_loss_scale_dynamic,
    loss_scale_of,
    note_finite,
    note_loss_scale,
)
from smorms3_dist.chainer_internals.optimizers import call_hooks_of_rule, has_hooks, hooks_of
from smorms3_dist.collectives.base import Collectives, Consume
from smorms3_dist.hooks.recognition import FusedHooks, is_kind, operation_of
from smorms3_dist.hooks.running import run_hook, run_hooks_of_rules
from smorms3_dist.kernels.operations import Operations
from smorms3_dist.kernels.segments import MASTER, CommonSettings
from smorms3_dist.phases import Phase, in_phase
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.rules import Kind
from smorms3_dist.sharding.sharded_model import AnyGroup, GradientsAre, ShardedModel
from smorms3_dist.sharding.staged_gradient import StagedGradient
from smorms3_dist.step.early import EarlyReduction
from smorms3_dist.step.treatment import Treatment
from smorms3_dist.step.way import Way

import chainer
import numpy as np
from chainer.backends import cuda
from chainer.optimizer_hooks import GradientClipping


class Step:
    """One step of an optimizer, which all ranks make in the same way.

    Attributes:
        phases: Where its time goes.
        left_to_gather: The groups whose parameters are to be gathered after the step, if it leaves
            that to others.
    """

    def __init__(
        self,
        optimizer: chainer.GradientMethod,
        sharded: ShardedModel,
        collectives: Collectives,
        fused: FusedHooks,
        looking: str | None = None,
        early: EarlyReduction | None = None,
        leaves_gather: bool = False,
    ) -> None:
        self._optimizer = optimizer
        self._sharded = sharded
        self._collectives = collectives
        self.phases = collectives.phases
        self._fused = fused
        # Hooks that only some ranks have, and that have to leave what they see as it is.
        self._looking = looking
        # The reduction that has begun with the backward pass; none if gradients are whole.
        self._early = early
        self._leaves_gather = leaves_gather
        self.left_to_gather: list[ShardedGroup] = []
        self._paths = sharded.model.paths
        self._scale = sharded.model.loss_scale

    @in_phase(Phase.UPDATE)
    def make(self, way: Way) -> None:
        """Makes the step. Collective."""
        match way:
            case Way.STREAMED:
                self._sharded.gradients_are = GradientsAre.NOT_KEPT
                self._make_streamed()
            case Way.CHECKED:
                self._sharded.gradients_are = GradientsAre.NOT_KEPT
                if self._sharded.groups[0].memory.launcher is None:
                    self._make_checked_on_host()
                else:
                    self._make_checked_on_gpu()
            case Way.STAGED:
                self._sharded.gradients_are = GradientsAre.ON_OWNERS
                self._make_staged()
            case Way.REPLICATED:
                self._sharded.gradients_are = GradientsAre.WHOLE
                self._make_replicated()

    def _make_streamed(self) -> None:
        sharded, collectives = self._sharded, self._collectives
        if self._early is None:
            sharded.staged = {}
        note_finite(self._optimizer, True)
        self._optimizer.t += 1
        self._count_uninitialized()
        common = CommonSettings(self._operations())
        for group in sharded.groups:
            if isinstance(group, ShardedGroup):
                if group.plan.kind is not Kind.NONE:
                    # No hook has run since the rules were looked at.
                    group.start_step(self._paths, self._sharded.model.rules_are_alike)
                    group.read_rules(self._scale, common)
                    # Without another rank a gradient is its mean, unless it is rounded to be sent.
                    alone = collectives.size == 1 and sharded.sends_as_they_are(group)
                    if not (alone and group.update_by_own_gradients()):
                        self._reduce(group, self.phases.within(Phase.UPDATE, group.update_piece))
                    group.finish_step()
                # What is left there is this rank's own gradient, not the mean.
                group.buffers.clear_gradients()
            else:
                sharded.reduce_whole(group, collectives)
                group.update(self._paths, self._scale)
            if group.plan.kind is not Kind.NONE:
                # Nobody but a whole rule has seen parameters.
                self._gather(group, adopt=group.plan.kind is Kind.WHOLE)

    def _gather(self, group: AnyGroup, adopt: bool = True) -> None:
        """Gives every rank what owners have of a group, or leaves that to others. Collective."""
        if self._leaves_gather and isinstance(group, ShardedGroup):
            if adopt:
                group.buffers.adopt()
            if group.plan.kind is not Kind.NONE:
                self.left_to_gather.append(group)
        else:
            self._sharded.gather(group, self._collectives, adopt)

    def _reduce(self, group: ShardedGroup, consume: Consume) -> None:
        """Gives the mean gradients of a group's shard to who consumes them. Collective."""
        if self._early is None or not self._early.includes(group):
            self._sharded.reduce(group, consume, self._collectives)
            return
        with self.phases.during(Phase.REDUCE):
            for piece, mean in self._early.arrivals(group):
                consume(piece, mean)

    def _reduce_staged(self, gradient: StagedGradient) -> None:
        """Lets the mean gradient of a shard come to its place. Collective."""
        if self._early is None or not self._early.includes(gradient.group):
            self._sharded.reduce(gradient.group, gradient.store_piece, self._collectives)
        else:
            with self.phases.during(Phase.REDUCE):
                self._early.finish(gradient.group)
        gradient.group.buffers.clear_gradients()

    def _make_checked_on_host(self) -> None:
        sharded, optimizer, collectives = self._sharded, self._optimizer, self._collectives
        kept = sharded.keep(collectives)
        note_finite(optimizer, True)
        treatment = Treatment(optimizer, sharded, collectives, self._fused, kept)
        with self.phases.during(Phase.HOOKS):
            if is_loss_scale_dynamic(optimizer):
                self._compare_finite(treatment.not_finite())
            if optimizer.is_safe_to_update():
                treatment.make()
        optimizer.t += 1
        safe = optimizer.is_safe_to_update()
        if safe:
            self._count_uninitialized()
        for gradient in kept:
            group = gradient.group
            updated = safe and group.plan.kind is not Kind.NONE
            if updated:
                group.start_step(self._paths, self._sharded.model.rules_are_alike)
                group.read_rules(self._scale, treatment.waiting)
                gradient.update()
                group.finish_step()
            gradient.forget()
            if updated:
                self._gather(group)

    def _make_checked_on_gpu(self) -> None:
        sharded, optimizer, collectives = self._sharded, self._optimizer, self._collectives
        staged = sharded.stage()
        for gradient in staged.values():
            self._reduce_staged(gradient)
        with self.phases.during(Phase.HOOKS):
            found = sharded.norm_and_nonfinite(collectives)
        launcher = sharded.groups[0].memory.launcher
        assert launcher is not None
        dynamic = is_loss_scale_dynamic(optimizer)
        answer = launcher.fetch(found.both) if dynamic else None
        fetched = sharded.groups[0].memory.mark()
        clipping = self._fused.clipping
        common = CommonSettings(
            operations=self._operations(),
            clip=None if clipping is None else _clip_factor_on_gpu(clipping, found.norm_squared),
            skip=found.nonfinite if dynamic else None,
        )
        groups = [g for g in sharded.sharded_groups if g.plan.kind is not Kind.NONE]
        for index, group in enumerate(sharded.groups):
            if group in groups:
                group.start_step(self._paths)
                group.read_rules(self._scale, common)
                group.update_shard(staged[index].grad)
                group.finish_step()
                self._gather(group)
        if answer is not None:
            collectives.await_device(fetched)
        if answer is not None and bool(answer()[1]):
            self._say_not_finite(sharded.not_finite())
            for group in groups:
                group.undo_count()
        else:
            note_finite(optimizer, True)
            self._count_uninitialized()
        optimizer.t += 1

    def _operations(self) -> Operations:
        """What the update does in the place of hooks, besides clipping by the norm."""
        hooks = (hook for hook in self._fused.hooks if not is_kind(hook, GradientClipping))
        return tuple(operation_of(hook, self._scale) for hook in hooks)

    def _make_staged(self) -> None:
        sharded, collectives = self._sharded, self._collectives
        staged = sharded.stage()
        for index, group in enumerate(sharded.groups):
            if index in staged:
                self._reduce_staged(staged[index])
            else:
                sharded.reduce_whole(group, collectives)
        self._check_finite()
        self._run_hooks("pre")
        self._optimizer.t += 1
        if self._optimizer.is_safe_to_update():
            self._count_uninitialized()
            self._update_staged(list(staged.values()))
            for whole in sharded.whole_groups:
                whole.update(self._paths, self._scale)
        self._run_hooks("post")
        for group in sharded.sharded_groups:
            if self._has_post_hooks():
                group.follow_parameters()
            group.buffers.clear_gradients()
        for group in sharded.groups:
            self._gather(group)

    def _make_replicated(self) -> None:
        sharded, optimizer = self._sharded, self._optimizer
        sharded.staged = {}
        for group in sharded.groups:
            sharded.reduce_whole(group, self._collectives)
            for param in group.buffers.params:
                # Hooks look at it; a rank on which a parameter was not used has not noted it.
                note_loss_scale(param, self._scale)
        self._check_finite()
        self._call_hooks("pre")
        optimizer.t += 1
        if optimizer.is_safe_to_update():
            self._count_uninitialized()
            masters = [group for group in sharded.sharded_groups if MASTER in group.states]
            self._update_replicated([g for g in sharded.sharded_groups if MASTER not in g.states])
            self._update_masters(masters)
            for whole in sharded.whole_groups:
                whole.update(self._paths, self._scale)
                sharded.gather(whole, self._collectives)
        optimizer.reallocate_cleared_grads()
        self._compare_what_hooks_left("hooks of update rules")
        self._call_hooks("post")
        # They have not written to parameters that ranks share.
        if self._has_post_hooks() and not sharded.shares:
            for group in sharded.sharded_groups:
                group.round_parameters()

    @in_phase(Phase.HOOKS)
    def _call_hooks(self, timing: str) -> None:
        with self._sharded.lent(f"{timing} hooks of the optimizer"):
            self._optimizer.call_hooks(timing)
        self._compare_what_hooks_left(f"{timing} hooks")

    def _has_post_hooks(self) -> bool:
        """Whether hooks may have written to parameters after the update."""
        return any(True for _ in hooks_of(self._optimizer, "post"))

    def _compare_what_hooks_left(self, which: str) -> None:
        """Names a hook's work on some ranks alone: what is left must be alike. Collective."""
        if self._looking is None:
            return
        mine = {
            f"{what} of {name}": None if array is None else zlib.crc32(cuda.to_cpu(array).tobytes())
            for name, param in self._sharded.model.initialized.items()
            for what, array in (("gradient", param.grad), ("array", param.array))
        }
        everybodys = self._collectives.all_gather_object(mine)
        for what in mine:
            ranks = [rank for rank, other in enumerate(everybodys) if other[what] != mine[what]]
            if ranks:
                raise RuntimeError(
                    f"a hook has changed something on some ranks alone: after the {which} the "
                    f"{what} is another on rank {ranks[0]} than on rank {self._collectives.rank}. "
                    "Hooks that only some ranks have may look, but not touch. Add them on all "
                    f"ranks: {self._looking}"
                )

    @in_phase(Phase.HOOKS)
    def _check_finite(self) -> None:
        """Looks for gradients that are not finite, on all ranks together, if the scale is dynamic.

        Does what Chainer's ``check_nan_in_grads`` does, on the shard.
        """
        note_finite(self._optimizer, True)
        if is_loss_scale_dynamic(self._optimizer):
            self._collectives.await_device()
            self._compare_finite(list(self._sharded.not_finite()))

    def _compare_finite(self, names: Sequence[str]) -> None:
        """Skips the step if any rank has gradients that are not finite. Collective."""
        if self._collectives.all_reduce_or(int(bool(names))):
            self._say_not_finite(names)

    def _say_not_finite(self, names: Iterable[str]) -> None:
        optimizer = self._optimizer
        note_finite(optimizer, False)
        for name in names:
            warnings.warn(
                f"the mean gradient of {name} is not finite: no step is made (t = {optimizer.t}, "
                f"loss scale {loss_scale_of(optimizer)})",
                stacklevel=6,
            )

    def _count_uninitialized(self) -> None:
        # As in Chainer their rules count the step, and do nothing else.
        for name, param in self._sharded.model.uninitialized.items():
            for _ in range(self._paths[name]):
                param.update()

    @in_phase(Phase.HOOKS)
    def _run_hooks(self, timing: str) -> None:
        registered = list(hooks_of(self._optimizer, timing))
        parts = self._sharded.parts(self._scale) if registered else []
        for _, hook in registered:
            run_hook(hook, parts, self._collectives)

    def _turns(self) -> list[dict[str, int]]:
        """The parameters that are updated at once: a tied one is updated once for each path."""
        return [
            {name: 1 for name, count in self._paths.items() if count > turn}
            for turn in range(max(self._paths.values()))
        ]

    def _update_staged(self, staged: Sequence[StagedGradient]) -> None:
        """Runs the hooks of rules, and the updates, on shards."""
        for turn, times in enumerate(self._turns()):
            for gradient in staged:
                gradient.group.start_step(times)
            grads = [gradient.unscaled(self._scale, again=turn > 0) for gradient in staged]
            # Alike on all ranks: they have compared their hooks.
            hooked = any(
                has_hooks(param.update_rule)
                for gradient in staged
                for param in gradient.group.updated_parameters()
            )
            if hooked:
                self._run_hooks_of_rules("pre", staged, grads)
            for gradient, grad in zip(staged, grads, strict=True):
                gradient.group.read_rules(hooked=hooked)
                gradient.group.update_shard(grad)
                gradient.group.finish_step()
            if hooked:
                self._run_hooks_of_rules("post", staged, grads)
                for gradient in staged:
                    gradient.group.round_masters()

    @in_phase(Phase.HOOKS)
    def _run_hooks_of_rules(
        self, timing: str, staged: Sequence[StagedGradient], grads: Sequence[np.ndarray]
    ) -> None:
        parts = [
            part
            for gradient, grad in zip(staged, grads, strict=True)
            for part in gradient.parts_of_rules(grad, self._scale)
        ]
        parts = self._sharded.in_order_of_hooks(parts)
        run_hooks_of_rules(timing, parts, self._collectives)

    def _update_masters(self, groups: Sequence[ShardedGroup]) -> None:
        """Updates fp32 masters from whole gradients: rules and their hooks see the masters."""
        staged = [StagedGradient(group) for group in groups]
        for gradient in staged:
            gradient.read_parameters()
        self._update_staged(staged)
        for group in groups:
            self._sharded.gather(group, self._collectives)

    def _update_replicated(self, groups: Sequence[ShardedGroup]) -> None:
        """Runs the hooks of rules on whole parameters, and the updates on shards."""
        for turn, times in enumerate(self._turns()):
            for group in groups:
                group.start_step(times)
            updated = {id(param) for group in groups for param in group.updated_parameters()}
            params = [param for param in self._sharded.model.in_order() if id(param) in updated]
            with self._sharded.lent("hooks of update rules"):
                for param in params:
                    if self._scale is not None and turn == 0:
                        # In place, as Chainer does: hooks that come later see the true gradient.
                        param.grad /= self._scale
                    with self.phases.during(Phase.HOOKS):
                        call_hooks_of_rule(param.update_rule, "pre", param)
            if self._sharded.shares:
                # Hooks of other ranks may still read what this one is about to update.
                self._collectives.meet_on_host()
            for group in groups:
                # Hooks may have replaced arrays.
                group.buffers.adopt()
                group.read_rules(hooked=True)
                group.update_by_whole_gradients()
                group.finish_step()
                self._sharded.gather(group, self._collectives)
            with self.phases.during(Phase.HOOKS), self._sharded.lent("hooks of update rules"):
                for param in params:
                    call_hooks_of_rule(param.update_rule, "post", param)


def _clip_factor_on_gpu(hook: GradientClipping, norm_squared: Any) -> Any:
    """What `chainer.optimizer_hooks.GradientClipping` multiplies gradients by, on the device."""
    with np.errstate(all="ignore"):
        return hook.threshold / np.sqrt(norm_squared)
