"""Runs hooks on what a rank owns, with norms of whole parameters where Chainer takes them.

Norms take one exchange of partial sums of squares. Hooks that need nothing from other ranks are
called with views of the segments (`smorms3_dist.hooks.views`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smorms3_dist.chainer_internals import hooks_of
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.hooks.parts import Part
from smorms3_dist.hooks.recognition import is_kind

import numpy as np
from chainer.backend import get_array_module
from chainer.optimizer_hooks import GradientClipping, GradientLARS


def run_hook(hook: Any, parts: Sequence[Part], collectives: Collectives) -> None:
    """Runs one hook of the optimizer, which `runs_on_shards`, on what this rank holds. Collective.

    Parts are in the order of ``optimizer.target.params()``, one that several paths lead to once a
    path.
    """
    if is_kind(hook, GradientClipping):
        _clip(hook, parts, collectives)
        return
    for turn in _turns(parts):
        _run_each([(hook, part) for part in turn], collectives)


def run_hooks_of_rules(timing: str, parts: Sequence[Part], collectives: Collectives) -> None:
    """Runs the hooks of the update rules on what this rank holds. Collective."""
    waiting = [
        (part, [hook for _, hook in hooks_of(part.rule, timing)])
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
    by_norms = [part for hook, part in calls if is_kind(hook, GradientLARS) and _has_array(part)]
    norms: Iterator[tuple[np.floating, np.floating]] = iter(())
    if by_norms:
        weights = _squares(by_norms, "array", collectives)
        grads = _squares(by_norms, "grad", collectives)
        norms = zip(weights, grads, strict=True)
    for hook, part in calls:
        if not is_kind(hook, GradientLARS):
            for view in part.views:
                hook(part.rule, view.param)
                view.settle()
        elif _has_array(part):
            _scale_by_lars(hook, part, *next(norms))


def _has_array(part: Part) -> bool:
    return bool(part.owners) or any(view.param.array is not None for view in part.views)


def clip_factor(
    hook: GradientClipping, parts: Sequence[Part], collectives: Collectives
) -> np.floating | None:
    """What `chainer.optimizer_hooks.GradientClipping` multiplies gradients by. Collective.

    Returns:
        The factor; ``None`` if the norm of the gradients is small enough.
    """
    parts = [part for part in parts if _has_array(part)]
    norm = np.sqrt(sum(_squares(parts, "grad", collectives)))
    with np.errstate(divide="ignore"):
        rate = hook.threshold / norm
    return None if rate >= 1 else rate


def _clip(hook: GradientClipping, parts: Sequence[Part], collectives: Collectives) -> None:
    """What `chainer.optimizer_hooks.GradientClipping` does, on shards."""
    factor = clip_factor(hook, parts, collectives)
    if factor is None:
        return
    for part in parts:
        for values in part.values if _has_array(part) else ():
            grad = values.grad
            grad *= factor


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
        parts: The parameters, as far as this rank holds them.
        which: ``'array'`` or ``'grad'``.
        collectives: Reaches the other ranks.

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
    sizes = [sum(s.size for owner, s in part.owners if owner == rank) for rank in (0, 1)]
    root = 0 if sizes[0] >= sizes[1] else 1
    own = [getattr(values, which) for values in part.values]
    if collectives.rank != root:
        for values in own:
            collectives.broadcast(values, collectives.rank)
        return None
    whole = np.empty_like(own[0], shape=size)
    mine = iter(own)
    for owner, segment in part.owners:
        target = whole[segment.range_p]
        if owner == root:
            target[...] = next(mine)
        else:
            collectives.broadcast(target, owner)
    return whole
