"""The order of a step: reduction, hooks, update of the own shard, gathering.

What happens, and when, is Chainer's: check of the gradients, pre hooks, ``t``, for each parameter
the division by the loss scale, hooks of its rule and the update, post hooks. A step takes one of
four ways. *Streamed*: nothing wants to see gradients but weight decay, which the update carries
out itself, and each piece of the mean is used for the update as soon as it is there. *Checked*, on
GPUs: the mean gradient of the shard is kept until its norm is known and whether it is finite; the
update does the rest, and the host waits for nothing on the way. *Staged*: hooks or dynamic loss
scaling see the mean gradient of the shard. *Replicated*: hooks see the whole mean gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.hooks import running as hooks
from smorms3_dist.kernels.segments import MASTER, CommonSettings
from smorms3_dist.kernels.tables import KernelLauncher
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.rules import Kind
from smorms3_dist.sharding.sharded_model import ShardedModel
from smorms3_dist.sharding.staged_gradient import StagedGradient

import chainer
import numpy as np
from chainer.optimizer_hooks import GradientClipping


class Step:
    """One step of an optimizer, which all ranks make in the same way.

    Args:
        optimizer: The Chainer optimizer.
        shards: Its model, laid out over the ranks.
        collectives: The ranks.
    """

    def __init__(
        self, optimizer: chainer.GradientMethod, shards: ShardedModel, collectives: Collectives
    ) -> None:
        self._optimizer = optimizer
        self._shards = shards
        self._collectives = collectives
        self._paths = shards.model.paths
        self._scale = shards.model.loss_scale

    def sharded(self, fused: hooks.FusedHooks | None, keep_gradients: bool) -> None:
        """Makes a step in which a rank sees the gradients of its own shard at most. Collective.

        Args:
            fused: The hooks, if the fused update can do what they do.
            keep_gradients: Whether the gradients of the shard are wanted afterwards.
        """
        memory = self._shards.updates[0].buffers.memory
        if fused is None or keep_gradients:
            self.staged()
        elif fused.clipping is None and not self._optimizer._loss_scaling_is_dynamic:
            self.streamed(fused)
        elif memory.launcher is None or (fused.clipping is not None and memory.exact):
            # Chainer's norms to the last bit are those of its own arithmetic.
            self.staged()
        else:
            self.checked(fused, memory.launcher)

    def streamed(self, fused: hooks.FusedHooks) -> None:
        """Makes a step in which nothing sees gradients. Collective."""
        shards, collectives = self._shards, self._collectives
        shards.staged = {}
        shards.kept = False
        self._optimizer._loss_scaling_isnan = False
        self._optimizer.t += 1
        self._count_uninitialized()
        extras = CommonSettings(decay=self._decay(fused))
        for update in shards.updates:
            if isinstance(update, ShardedGroup):
                if update.plan.kind is not Kind.NONE:
                    update.start_step(self._paths, self._scale, extras)
                    shards.reduce(update, update.update_piece, collectives)
                    update.finish_step()
                # What is left there is this rank's own gradient, not the mean.
                update.buffers.clear_gradients()
            else:
                shards.reduce_whole(update, collectives)
                update.update(self._paths, self._scale)
            if update.plan.kind is not Kind.NONE:
                shards.gather(update, collectives)

    def checked(self, fused: hooks.FusedHooks, launcher: KernelLauncher) -> None:
        """Makes a step whose norm and check stay on the GPU. Collective."""
        shards, optimizer, collectives = self._shards, self._optimizer, self._collectives
        staged = shards.stage()
        shards.kept = False
        for gradient in staged.values():
            shards.reduce(gradient.update, gradient.store_piece, collectives)
            gradient.update.buffers.clear_gradients()
        found = shards.found(collectives)
        dynamic = optimizer._loss_scaling_is_dynamic
        answer = launcher.fetch(found) if dynamic else None
        extras = CommonSettings(
            clip=None if fused.clipping is None else _clip_factor(fused.clipping, found),
            decay=self._decay(fused),
            skip=found[1:] if dynamic else None,
        )
        updates = [u for u in shards.sharded if u.plan.kind is not Kind.NONE]
        for index, update in enumerate(shards.updates):
            if update in updates:
                update.start_step(self._paths, self._scale, extras)
                update.update_shard(staged[index].grad)
                update.finish_step()
                shards.gather(update, collectives)
        optimizer._loss_scaling_isnan = answer is not None and bool(answer()[1])
        if optimizer._loss_scaling_isnan:
            self._say_not_finite(shards.not_finite())
            for update in updates:
                update.take_back_step()
        else:
            self._count_uninitialized()
        optimizer.t += 1

    def _decay(self, fused: hooks.FusedHooks) -> float:
        """What the optimizer's weight decay multiplies parameters by."""
        rate = 0.0 if fused.decay is None else fused.decay.rate
        return rate if self._scale is None else rate * self._scale

    def staged(self) -> None:
        """Makes a step in which hooks see the gradient of the shard. Collective."""
        shards, collectives = self._shards, self._collectives
        staged = shards.stage()
        shards.kept = True
        for index, update in enumerate(shards.updates):
            if index in staged:
                shards.reduce(update, staged[index].store_piece, collectives)
                update.buffers.clear_gradients()
            else:
                shards.reduce_whole(update, collectives)
        self._check_finite()
        self._run_hooks("pre")
        self._optimizer.t += 1
        if self._optimizer.is_safe_to_update():
            self._count_uninitialized()
            self._update_staged(list(staged.values()))
            for whole in shards.whole:
                whole.update(self._paths, self._scale)
        self._run_hooks("post")
        for update in shards.sharded:
            update.buffers.clear_gradients()
        for update in shards.updates:
            shards.gather(update, collectives)

    def replicated(self) -> None:
        """Makes a step in which hooks see the whole gradients. Collective."""
        shards, optimizer = self._shards, self._optimizer
        shards.staged = {}
        shards.kept = False
        for update in shards.updates:
            shards.reduce_whole(update, self._collectives)
            for param in update.buffers.params:
                # Hooks look at it; a rank on which a parameter was not used has not noted it.
                param._loss_scale = self._scale
        self._check_finite()
        optimizer.call_hooks("pre")
        optimizer.t += 1
        if optimizer.is_safe_to_update():
            self._count_uninitialized()
            masters = [update for update in shards.sharded if MASTER in update.states]
            self._update_replicated([u for u in shards.sharded if MASTER not in u.states])
            self._update_masters(masters)
            for whole in shards.whole:
                whole.update(self._paths, self._scale)
                shards.gather(whole, self._collectives)
        optimizer.reallocate_cleared_grads()
        optimizer.call_hooks("post")

    def _check_finite(self) -> None:
        """Looks for gradients that are not finite, on all ranks together, if the scale is dynamic.

        Does what Chainer's ``check_nan_in_grads`` does, on the shard.
        """
        optimizer = self._optimizer
        optimizer._loss_scaling_isnan = False
        if not optimizer._loss_scaling_is_dynamic:
            return
        found = list(self._shards.not_finite())
        if self._collectives.all_reduce_or(int(bool(found))):
            self._say_not_finite(found)

    def _say_not_finite(self, names: Iterable[str]) -> None:
        optimizer = self._optimizer
        optimizer._loss_scaling_isnan = True
        optimizer._loss_scaling_isnan_ever = True
        for name in names:
            warnings.warn(
                f"the mean gradient of {name} is not finite: no step is made (t = {optimizer.t}, "
                f"loss scale {optimizer._loss_scale})",
                stacklevel=5,
            )

    def _count_uninitialized(self) -> None:
        # As in Chainer their rules count the step, and do nothing else.
        for name, param in self._shards.model.uninitialized.items():
            for _ in range(self._paths[name]):
                param.update()

    def _run_hooks(self, timing: str) -> None:
        registered = list(hooks.of(self._optimizer._hookable, timing))
        parts = self._shards.parts(self._scale) if registered else []
        for _, hook in registered:
            hooks.run(hook, parts, self._collectives)

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
                gradient.update.start_step(times, None)
            grads = [gradient.unscaled(self._scale, again=turn > 0) for gradient in staged]
            # Alike on all ranks: they have compared their hooks.
            hooked = any(
                hooks.any_of(param.update_rule._hookable)
                for gradient in staged
                for param in gradient.update.updated_parameters()
            )
            if hooked:
                self._run_hooks_of_rules("pre", staged, grads)
            for gradient, grad in zip(staged, grads, strict=True):
                gradient.update.update_shard(grad)
                gradient.update.finish_step()
            if hooked:
                self._run_hooks_of_rules("post", staged, grads)
                for gradient in staged:
                    gradient.update.round_masters()

    def _run_hooks_of_rules(
        self, timing: str, staged: Sequence[StagedGradient], grads: Sequence[np.ndarray]
    ) -> None:
        parts = [
            part
            for gradient, grad in zip(staged, grads, strict=True)
            for part in gradient.parts_of_rules(grad, self._scale)
        ]
        parts = self._shards.in_order_of_hooks(parts)
        hooks.run_of_rules(timing, parts, self._collectives)

    def _update_masters(self, updates: Sequence[ShardedGroup]) -> None:
        """Updates fp32 masters from whole gradients: rules and their hooks see the masters."""
        staged = [StagedGradient(update) for update in updates]
        for gradient in staged:
            gradient.take_from_parameters()
        self._update_staged(staged)
        for update in updates:
            self._shards.gather(update, self._collectives)

    def _update_replicated(self, updates: Sequence[ShardedGroup]) -> None:
        """Runs the hooks of rules on whole parameters, and the updates on shards."""
        for turn, times in enumerate(self._turns()):
            for update in updates:
                update.start_step(times, None)
            updated = {id(param) for update in updates for param in update.updated_parameters()}
            params = [param for param in self._shards.model.in_order() if id(param) in updated]
            for param in params:
                if self._scale is not None and turn == 0:
                    # In place, as Chainer does: hooks that come later see the true gradient.
                    param.grad /= self._scale
                param.update_rule._hookable.call_hooks("pre", args=(param.update_rule, param))
            for update in updates:
                # Hooks may have replaced arrays.
                update.buffers.adopt()
                with update.buffers.gradients():
                    for segment in (s for piece in update.pieces for s in piece.segments):
                        grad = update.buffers.gradient(segment)
                        if grad is not None:
                            update.update_segment(segment, grad)
                update.finish_step()
                self._shards.gather(update, self._collectives)
            for param in params:
                param.update_rule._hookable.call_hooks("post", args=(param.update_rule, param))


def _clip_factor(hook: GradientClipping, found: Any) -> Any:
    """What `chainer.optimizer_hooks.GradientClipping` multiplies gradients by, on the device."""
    with np.errstate(all="ignore"):
        return hook.threshold / np.sqrt(found[:1])
