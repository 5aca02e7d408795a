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

from smorms3_dist.chainer_internals import has_hooks, hooks_of

import chainer
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


def describe(name: str, hook: Any) -> str:
    """A hook in words that ranks can compare: its name, its class, the numbers of Chainer's own."""
    kind = type(hook)
    numbers = ""
    if kind.__module__.startswith("chainer."):
        own = vars(hook).items()
        numbers = ", ".join(f"{key}={n!r}" for key, n in own if isinstance(n, int | float))
    return f"{name!r} ({kind.__name__}{numbers and ' with '}{numbers})"


class FusedHooks(NamedTuple):
    """The hooks of an optimizer, that the fused update can carry out: clipping, then decay."""

    clipping: GradientClipping | None = None
    decay: WeightDecay | None = None


def fused_hooks(optimizer: Any, rules: Iterable[chainer.UpdateRule]) -> FusedHooks | None:
    """Finds out whether the fused update can do what all hooks do.

    Args:
        optimizer: The Chainer optimizer.
        rules: The update rules that have hooks; each may have a weight decay.

    Returns:
        The hooks of the optimizer, or ``None`` if there is any hook that has to be called.
    """
    hooks = [hook for _, hook in hooks_of(optimizer, "pre")]
    clipping = hooks.pop(0) if hooks and is_kind(hooks[0], GradientClipping) else None
    decay = hooks.pop(0) if hooks and _is_plain_decay(hooks[0]) else None
    if hooks or any(hooks_of(optimizer, "post")):
        return None
    for rule in rules:
        of_rule = [hook for _, hook in hooks_of(rule, "pre")]
        if any(hooks_of(rule, "post")) or of_rule[1:]:
            return None
        if not all(map(_is_plain_decay, of_rule)):
            return None
    return FusedHooks(clipping, decay)


def _is_plain_decay(hook: Any) -> bool:
    # Another number, say one of NumPy's, would widen the arithmetic.
    return is_kind(hook, WeightDecay) and type(hook.rate) in (int, float)


def weight_decay_of(rule: chainer.UpdateRule) -> float:
    """The rate of a rule's weight decay, 0 for none; its hooks must be fusible."""
    # Asked for every parameter in every step, most of which have no hook.
    return sum(hook.rate for _, hook in hooks_of(rule, "pre")) if has_hooks(rule) else 0.0
