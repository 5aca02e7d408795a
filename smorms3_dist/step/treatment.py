"""What hooks do to gradients that are kept on CPUs, up to the last norm; the update does the rest.

A hook that takes norms wants to see gradients after all hooks before it. So these are carried out
in the pass in which squares are summed up: that of the reduction, the first time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smorms3_dist.chainer_internals.optimizers import hooks_of
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.hooks.norms import Begun, clip_factor, lars_rates
from smorms3_dist.hooks.parts import Part
from smorms3_dist.hooks.recognition import (
    FusedHooks,
    is_kind,
    operation_of,
    operations_by_lars,
    takes_norm,
)
from smorms3_dist.kernels.operations import Operation, OperationKind, Operations
from smorms3_dist.kernels.segments import CommonSettings
from smorms3_dist.phases import Phase
from smorms3_dist.sharding.kept_gradient import KeptGradient
from smorms3_dist.sharding.sharded_model import ShardedModel

import chainer
from chainer.optimizer_hooks import GradientClipping


class Treatment:
    """What one step does to its gradients before the update. All methods are collective.

    Attributes:
        waiting: What is still to be done to them, by the update.
    """

    def __init__(
        self,
        optimizer: chainer.GradientMethod,
        sharded: ShardedModel,
        collectives: Collectives,
        fused: FusedHooks,
        kept: Sequence[KeptGradient],
    ) -> None:
        self._optimizer = optimizer
        self._sharded = sharded
        self._collectives = collectives
        self._fused = fused
        self._kept = kept
        self._scale = sharded.model.loss_scale
        # Whether there are means, and whether there are sums of their squares as they are.
        self._is_reduced = self._is_summed = False
        self.waiting = CommonSettings()

    def not_finite(self) -> list[str]:
        """Reduces gradients; names the parameters of which some here is infinite or nan."""
        # Nothing is done to gradients before it is known whether they are finite.
        self._pass(sums=any(map(takes_norm, self._fused.hooks[:1])))
        return [name for gradient in self._kept for name in gradient.not_finite()]

    def make(self) -> None:
        """Reduces gradients, and does to them what is to be done up to the last norm."""
        for hook in self._fused.hooks:
            if takes_norm(hook):
                self._sum()
                if is_kind(hook, GradientClipping):
                    self._clip(hook)
                else:
                    self._scale_by_lars(hook)
            else:
                operation = operation_of(hook, self._scale)
                operations = (*self.waiting.operations, operation)
                self.waiting = self.waiting._replace(operations=operations)
        if self._fused.rules_take_norms:
            self._treat_by_rules()
        if not self._is_reduced:
            # All rules whose hooks take norms are disabled.
            self._pass(sums=False)

    def _sum(self) -> None:
        """Sums squares up, of gradients after all that waits."""
        waits = self.waiting.operations or not self.waiting.are_alike
        if waits or not self._is_summed:
            self._pass(sums=True)

    def _pass(self, sums: bool) -> None:
        """Does what waits."""
        for gradient in self._kept:
            if self._is_reduced:
                gradient.treat(self.waiting, sums)
            else:
                with self._collectives.phases.during(Phase.REDUCE):
                    sent = self._sharded.as_sent(gradient.group)
                    gradient.reduce(sent, self._collectives, self.waiting, sums)
        self._is_reduced, self._is_summed = True, sums
        self.waiting = CommonSettings()

    def _begun(self) -> Begun:
        return {name: dot for gradient in self._kept for name, dot in gradient.sums.items()}

    def _clip(self, hook: GradientClipping) -> None:
        parts = self._sharded.kept_parts()
        factor = clip_factor(hook, parts, self._collectives, self._begun())
        if factor is not None:
            self.waiting = CommonSettings((Operation(OperationKind.SCALE, factor),))

    def _scale_by_lars(self, hook: Any) -> None:
        """Scales parameters that are packed, at once; others wait."""
        # Parameters that nobody owns have no elements.
        parts = [part for part in self._sharded.kept_parts() if part.owners]
        found = self._rates([(hook, part) for part in parts])
        rates = {part.name: rate for (_, part), rate in found}
        scaled = set[str]().union(*(each.scale(hook.weight_decay, rates) for each in self._kept))
        self._is_summed = False
        first = {
            name: operations_by_lars(hook, rate)
            for name, rate in rates.items()
            if name not in scaled
        }
        self.waiting = CommonSettings(first=first)

    def _rates(self, calls: Sequence[tuple[Any, Part]]) -> list[tuple[tuple[Any, Part], Any]]:
        return list(zip(calls, lars_rates(calls, self._collectives, self._begun()), strict=True))

    def _treat_by_rules(self) -> None:
        """Goes on with the hooks of those rules of which some take norms, all rules at once."""
        left = self._hooks_by_norms()
        divided = () if self._scale is None else (Operation(OperationKind.DIVIDE, self._scale),)
        last: dict[str, Operations] = dict.fromkeys(left, divided)
        while by_norm := [name for name, hooks in left.items() if any(map(takes_norm, hooks))]:
            for name in by_norm:
                while not takes_norm(left[name][0]):
                    last[name] += (operation_of(left[name].pop(0), self._scale),)
            self.waiting = self.waiting._replace(last={k: v for k, v in last.items() if v})
            self._sum()
            parts = [part for part in self._sharded.kept_parts() if part.name in by_norm]
            last = dict.fromkeys(left, ())
            for (hook, part), rate in self._rates([(left[p.name].pop(0), p) for p in parts]):
                last[part.name] = operations_by_lars(hook, rate)
        for name, hooks in left.items():
            last[name] += tuple(operation_of(hook, self._scale) for hook in hooks)
        self.waiting = self.waiting._replace(last=last)

    def _hooks_by_norms(self) -> dict[str, list[Any]]:
        """The hooks of rules, by parameter, where some of them take norms."""
        found = {}
        for gradient in self._kept:
            for slot, param in gradient.group.parameters():
                rule = param.update_rule
                if rule is not None and rule.enabled:
                    hooks = [hook for _, hook in hooks_of(rule, "pre")]
                    if any(map(takes_norm, hooks)):
                        found[slot.name] = hooks
        return found
