"""Which hooks can run on a shard, and how.

A hook that treats each element by itself runs on the segments that a rank owns. Chainer's two hooks
that need norms get them from all ranks: by one exchange of partial sums of squares. Everything
else needs whole gradients.

A user's hook says that it treats each element by itself by an attribute ``is_elementwise = True``,
as Chainer's update rules do. It then receives (rule, parameter) like any hook that Chainer calls
for each parameter, where the parameter may be a part of one, flattened.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.hooks.views import ParameterView, WholeParameter
from smorms3_dist.layout import Segment

import chainer
import numpy as np
from chainer.backend import get_array_module
from chainer.optimizer_hooks import (
    GradientClipping,
    GradientHardClipping,
    GradientLARS,
    GradientNoise,
    Lasso,
    WeightDecay,
)
from chainer.optimizer_hooks.gradient_noise import exponential_decay_noise


class Values(NamedTuple):
    """The values of a segment, as flat views.

    Attributes:
        array: The parameter's.
        grad: The gradient's.
    """

    array: np.ndarray
    grad: np.ndarray


class Part(NamedTuple):
    """What a rank holds of one parameter while hooks run.

    Attributes:
        name: The parameter.
        rule: Its update rule.
        views: What hooks are called with: the segments that this rank owns, long ones in pieces
            that stay in the cache; or the parameter itself, if every rank has it.
        values: The segments in one, for norms; or the parameter itself.
        owners: The segments of all ranks, with their owners; empty if every rank has the whole.
    """

    name: str
    rule: chainer.UpdateRule | None
    views: Sequence[ParameterView]
    values: Sequence[Values | WholeParameter]
    owners: Sequence[tuple[int, Segment]]


def of(hookable: Any, timing: str | None = None) -> Iterator[tuple[str, Any]]:
    """The hooks of an optimizer or of an update rule by name, in the order of their calls.

    Args:
        hookable: Where Chainer keeps them; ``None`` before ``setup``.
        timing: ``'pre'``, ``'post'``, or ``None`` for both.
    """
    if hookable is not None and timing != "post":
        yield from hookable._pre_update_hooks.items()
    if hookable is not None and timing != "pre":
        yield from hookable._post_update_hooks.items()


def any_of(hookable: Any) -> bool:
    """Whether there is a hook at all."""
    return bool(hookable._pre_update_hooks or hookable._post_update_hooks)


def runs_on_shards(hook: Any, of_rule: bool) -> bool:
    """Whether a hook can run on the segments that a rank owns.

    Args:
        hook: The hook.
        of_rule: Whether it is registered with an update rule, not with the optimizer.
    """
    if _is(hook, GradientClipping):
        return not of_rule
    if not (of_rule or getattr(hook, "call_for_each_param", False)):
        return False
    if _is(hook, GradientNoise):
        # Another function may look at the shape.
        return hook.noise_func is exponential_decay_noise
    return (
        _is(hook, WeightDecay)
        or _is(hook, Lasso)
        or _is(hook, GradientHardClipping)
        or _is(hook, GradientLARS)
        or getattr(hook, "is_elementwise", False) is True
    )


def _is(hook: Any, kind: type) -> bool:
    # By what is called: a subclass that does the same is the same.
    return type(hook).__call__ is kind.__call__


class FusedHooks(NamedTuple):
    """The hooks of an optimizer, where the fused update can do what they do.

    Attributes:
        clipping: The gradient clipping, or ``None``.
        decay: The weight decay, which comes after it, or ``None``.
    """

    clipping: GradientClipping | None = None
    decay: WeightDecay | None = None


def fused(hookable: Any, hookables_of_rules: Iterable[Any]) -> FusedHooks | None:
    """Finds out whether the fused update can do what all hooks do.

    Args:
        hookable: Where the optimizer keeps its hooks.
        hookables_of_rules: Where the update rules keep theirs; each may have a weight decay.

    Returns:
        The hooks of the optimizer, or ``None`` if there is any hook that has to be called.
    """
    hooks = [hook for _, hook in of(hookable, "pre")]
    clipping = hooks.pop(0) if hooks and _is(hooks[0], GradientClipping) else None
    decay = hooks.pop(0) if hooks and _is(hooks[0], WeightDecay) else None
    if hooks or any(of(hookable, "post")):
        return None
    for of_rule in hookables_of_rules:
        others = list(of_rule._pre_update_hooks.values())
        if of_rule._post_update_hooks or others[1:] or not all(_is(h, WeightDecay) for h in others):
            return None
    return FusedHooks(clipping, decay)


def decay_of(rule: chainer.UpdateRule) -> float:
    """The rate of a rule's weight decay, 0 for none; its hooks must be fusible."""
    return sum((hook.rate for hook in rule._hookable._pre_update_hooks.values()), 0.0)


def run(hook: Any, parts: Sequence[Part], collectives: Collectives) -> None:
    """Runs one hook of the optimizer on what this rank holds. Collective.

    Args:
        hook: A hook that `runs_on_shards`.
        parts: The parameters in the order of ``optimizer.target.params()``; one that several paths
            lead to occurs once a path.
        collectives: The ranks.
    """
    if _is(hook, GradientClipping):
        _clip(hook, parts, collectives)
        return
    for turn in _turns(parts):
        _run_each([(hook, part) for part in turn], collectives)


def run_of_rules(timing: str, parts: Sequence[Part], collectives: Collectives) -> None:
    """Runs the hooks of the update rules on what this rank holds. Collective.

    Args:
        timing: ``'pre'`` or ``'post'``.
        parts: The parameters that are updated, in their order, each once.
        collectives: The ranks.
    """
    waiting = [
        (part, [hook for _, hook in of(part.rule._hookable, timing)])
        for part in parts
        if part.rule is not None
    ]
    while waiting := [(part, hooks) for part, hooks in waiting if hooks]:
        _run_each([(hooks.pop(0), part) for part, hooks in waiting], collectives)


def _turns(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts of which none occurs twice, in their order, until there are no more."""
    while parts:
        turn: dict[str, Part] = {}
        again = []
        for part in parts:
            if part.name in turn:
                again.append(part)
            else:
                turn[part.name] = part
        yield list(turn.values())
        parts = again


def _run_each(calls: Sequence[tuple[Any, Part]], collectives: Collectives) -> None:
    """Calls hooks with one parameter each; no parameter occurs twice."""
    by_norms = [part for hook, part in calls if _is(hook, GradientLARS) and _has_array(part)]
    norms: Iterator[tuple[np.floating, np.floating]] = iter(())
    if by_norms:
        weights = _squares(by_norms, "array", collectives)
        grads = _squares(by_norms, "grad", collectives)
        norms = zip(weights, grads, strict=True)
    for hook, part in calls:
        if not _is(hook, GradientLARS):
            for view in part.views:
                hook(part.rule, view.param)
                view.settle()
        elif _has_array(part):
            _scale_by_lars(hook, part, *next(norms))


def _has_array(part: Part) -> bool:
    return bool(part.owners) or any(view.param.array is not None for view in part.views)


def _clip(hook: GradientClipping, parts: Sequence[Part], collectives: Collectives) -> None:
    """What `chainer.optimizer_hooks.GradientClipping` does, on shards."""
    parts = [part for part in parts if _has_array(part)]
    norm = np.sqrt(sum(_squares(parts, "grad", collectives)))
    with np.errstate(divide="ignore"):
        rate = hook.threshold / norm
    if rate >= 1:
        return
    for part in parts:
        for values in part.values:
            grad = values.grad
            grad *= rate


def _scale_by_lars(
    hook: GradientLARS, part: Part, weights: np.floating, grads: np.floating
) -> None:
    """What `chainer.optimizer_hooks.GradientLARS` does, on shards."""
    weight_norm, grad_norm = np.sqrt(weights), np.sqrt(grads)
    with np.errstate(divide="ignore", invalid="ignore"):
        local_rate = weight_norm / (hook.eps + grad_norm + hook.weight_decay * weight_norm)
    # A number, not an array of none: CuPy would take that for one in host memory.
    rate = np.where(weight_norm > hook.threshold, local_rate, 1.0)[()]
    for view in part.views:
        grad = view.grad
        grad += hook.weight_decay * view.array
        grad *= rate


def _squares(parts: Sequence[Part], which: str, collectives: Collectives) -> list[np.floating]:
    """Sums of squares of whole parameters (or gradients), the same on all ranks. Collective.

    Args:
        parts: The parameters.
        which: ``'array'`` or ``'grad'``.
        collectives: The ranks.

    A parameter that lies in one segment is summed there, as Chainer sums it. One that lies in
    several is summed by parts; but on one or two ranks it is brought together and summed whole:
    results are then those of ChainerMN bit for bit.
    """
    mine: dict[int, np.floating] = {}
    for index, part in enumerate(parts):
        if len(part.owners) > 1 and collectives.size <= 2:
            whole = _bring_together(part, which, collectives)
            if whole is not None:
                mine[index] = whole.dot(whole)
        elif part.values:
            squares = [own.dot(own) for own in map(operator.attrgetter(which), part.values)]
            mine[index] = squares[0] if len(squares) == 1 else _sum(squares)
    everybodys = collectives.all_gather_object(_on_host(mine))
    sums = []
    for index, part in enumerate(parts):
        if not part.owners:
            sums.append(mine[index])
            continue
        terms = [squares[index] for squares in everybodys if index in squares]
        sums.append(terms[0] if len(terms) == 1 else _sum(terms))
    return sums


def _on_host(values: Mapping[int, Any]) -> dict[int, np.floating]:
    """Numbers that may be on a GPU, fetched from there at once."""
    on_gpu: dict[str, list[int]] = {}
    for index, value in values.items():
        if hasattr(value, "get"):
            on_gpu.setdefault(value.dtype.str, []).append(index)
    fetched = dict(values)
    for indices in on_gpu.values():
        stacked = get_array_module(values[indices[0]]).stack([values[index] for index in indices])
        fetched.update(zip(indices, stacked.get(), strict=True))
    return fetched


def _sum(terms: Sequence[np.floating]) -> np.floating:
    return terms[0].dtype.type(sum(float(term) for term in terms))


def _bring_together(part: Part, which: str, collectives: Collectives) -> np.ndarray | None:
    """All values of a parameter, on the rank that owns most of it; ``None`` elsewhere."""
    size = sum(segment.size for _, segment in part.owners)
    held = [sum(s.size for owner, s in part.owners if owner == rank) for rank in (0, 1)]
    place = 0 if held[0] >= held[1] else 1
    own = [getattr(values, which) for values in part.values]
    if collectives.rank != place:
        for values in own:
            collectives.broadcast(values, collectives.rank)
        return None
    whole = get_array_module(own[0]).empty(size, own[0].dtype)
    mine = iter(own)
    for owner, segment in part.owners:
        target = whole[segment.start : segment.stop]
        if owner == place:
            target[...] = next(mine)
        else:
            collectives.broadcast(target, owner)
    return whole
