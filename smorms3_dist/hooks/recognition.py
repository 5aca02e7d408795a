"""Which hooks can run on a shard, and which the update itself can carry out.

A hook that treats each element by itself runs on the segments that a rank owns. Chainer's two hooks
that need norms get them from all ranks (`smorms3_dist.hooks.running`). Everything else needs whole
gradients.

A user's hook says that it treats each element by itself by an attribute ``is_elementwise = True``,
as Chainer's update rules do. It then receives (rule, parameter) like any hook that Chainer calls
for each parameter, where the parameter may be a part of one, flattened.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals.optimizers import has_hooks, hooks_of
from smorms3_dist.kernels.operations import Operation, OperationKind, Operations

import chainer
import numpy as np
from chainer.optimizer_hooks import (
    GradientClipping,
    GradientHardClipping,
    GradientLARS,
    GradientNoise,
    Lasso,
    WeightDecay,
)
from chainer.optimizer_hooks.gradient_noise import exponential_decay_noise


def runs_on_shards(hook: Any, of_rule: bool) -> bool:
    """Whether a hook, of the optimizer or of an update rule, can run on what a rank owns."""
    if is_kind(hook, GradientClipping):
        return not of_rule
    if not (of_rule or getattr(hook, "call_for_each_param", False)):
        return False
    if is_kind(hook, GradientNoise):
        # Another function may look at the shape.
        return hook.noise_func is exponential_decay_noise
    return (
        is_kind(hook, WeightDecay)
        or is_kind(hook, Lasso)
        or is_kind(hook, GradientHardClipping)
        or is_kind(hook, GradientLARS)
        or getattr(hook, "is_elementwise", False) is True
    )


def is_kind(hook: Any, kind: type) -> bool:
    """Whether a hook does what a class of Chainer's does: a subclass that is called alike, too."""
    return type(hook).__call__ is kind.__call__


def takes_norm(hook: Any) -> bool:
    """Whether a hook wants to see all of a gradient before it does anything to it."""
    return is_kind(hook, GradientClipping) or is_kind(hook, GradientLARS)


def describe(name: str, hook: Any) -> str:
    """A hook in words that ranks can compare: its name, its class, the numbers of Chainer's own."""
    kind = type(hook)
    numbers = ""
    if kind.__module__.startswith("chainer."):
        own = vars(hook).items()
        numbers = ", ".join(f"{key}={n!r}" for key, n in own if isinstance(n, int | float))
    return f"{name!r} ({kind.__name__}{numbers and ' with '}{numbers})"


class FusedHooks(NamedTuple):
    """The hooks of an optimizer, which the fused update can carry out.

    Attributes:
        hooks: In their order.
        on_gpu: Whether the kernel for GPUs can, too: a clipping by the norm, a weight decay after
            it, and a weight decay of each rule, if there are any.
        rules_take_norms: Whether hooks of any rule do.
    """

    hooks: tuple[Any, ...] = ()
    on_gpu: bool = True
    rules_take_norms: bool = False

    @property
    def takes_norms(self) -> bool:
        """Whether any of them wants to see all gradients before it does anything."""
        return self.rules_take_norms or any(map(takes_norm, self.hooks))

    @property
    def clipping(self) -> GradientClipping | None:
        """The first clipping by the norm."""
        return next((hook for hook in self.hooks if is_kind(hook, GradientClipping)), None)


def fused_hooks(optimizer: Any, rules: Iterable[chainer.UpdateRule]) -> FusedHooks | None:
    """Finds out whether the fused update can do what all hooks do.

    Args:
        optimizer: The Chainer optimizer.
        rules: The update rules that have hooks.

    Returns:
        The hooks of the optimizer, or ``None`` if there is any hook that has to be called.
    """
    hooks = [hook for _, hook in hooks_of(optimizer, "pre")]
    if any(hooks_of(optimizer, "post")):
        return None
    if not all(is_kind(hook, GradientClipping) or _is_fusible(hook) for hook in hooks):
        return None
    kinds = [type(hook).__call__ for hook in hooks]
    on_gpu, rules_take_norms = kinds in _ON_GPU, False
    for rule in rules:
        of_rule = [hook for _, hook in hooks_of(rule, "pre")]
        if any(hooks_of(rule, "post")) or not all(map(_is_fusible, of_rule)):
            return None
        rules_take_norms = rules_take_norms or any(map(takes_norm, of_rule))
        on_gpu = on_gpu and [type(hook).__call__ for hook in of_rule] in ([], [_DECAY])
    return FusedHooks(tuple(hooks), on_gpu, rules_take_norms)


_CLIPPING, _DECAY = GradientClipping.__call__, WeightDecay.__call__
_ON_GPU = [[], [_CLIPPING], [_DECAY], [_CLIPPING, _DECAY]]

_NUMBERS: dict[type, tuple[str, ...]] = {
    WeightDecay: ("rate",),
    Lasso: ("rate",),
    GradientHardClipping: ("lower_bound", "upper_bound"),
}
_KINDS = {
    WeightDecay: OperationKind.DECAY,
    Lasso: OperationKind.LASSO,
    GradientHardClipping: OperationKind.CLIP,
}


def _class_of(hook: Any) -> type | None:
    """The class of Chainer's whose operation a hook is."""
    return next((kind for kind in _KINDS if is_kind(hook, kind)), None)


def _is_operation(hook: Any) -> bool:
    kind = _class_of(hook)
    return kind is not None and _is_plain(*(getattr(hook, name) for name in _NUMBERS[kind]))


def _is_fusible(hook: Any) -> bool:
    """Whether an update can do what a hook does that is called for each parameter."""
    if is_kind(hook, GradientLARS):
        return _is_plain(hook.weight_decay)
    return _is_operation(hook)


def _is_plain(*numbers: Any) -> bool:
    # Another number, say one of NumPy's, would widen the arithmetic.
    return all(type(number) in (int, float) and number == number for number in numbers)


def operation_of(hook: Any, loss_scale: float | None) -> Operation:
    """The operation that is a hook's, one of `FusedHooks`, on gradients with a loss scale."""
    kind = _class_of(hook)
    assert kind is not None
    numbers = [getattr(hook, name) for name in _NUMBERS[kind]]
    if kind is WeightDecay and loss_scale is not None:
        numbers[0] *= loss_scale
    return Operation(_KINDS[kind], *numbers)


def operations_by_lars(hook: GradientLARS, rate: np.floating) -> Operations:
    """The operations that are a hook's on the gradient of a parameter whose rate is known."""
    return (
        Operation(OperationKind.DECAY, hook.weight_decay),
        Operation(OperationKind.SCALE, rate),
    )


def operations_of(rule: chainer.UpdateRule, loss_scale: float | None) -> Operations:
    """The operations that are the hooks of a rule; its hooks must be fusible."""
    # Asked for every parameter in every step, most of which have no hook.
    if not has_hooks(rule):
        return ()
    return tuple(operation_of(hook, loss_scale) for _, hook in hooks_of(rule, "pre"))
