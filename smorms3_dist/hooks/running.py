"""Runs hooks on what a rank owns, with norms of whole parameters where Chainer takes them.

Hooks that need nothing from other ranks are
called with views of the segments (`smorms3_dist.hooks.views`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from smorms3_dist.chainer_internals.optimizers import hooks_of
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.hooks.norms import clip_factor, has_array, lars_rates
from smorms3_dist.hooks.parts import Part
from smorms3_dist.hooks.recognition import is_kind

import numpy as np
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
    by_norms = [call for call in calls if is_kind(call[0], GradientLARS) and has_array(call[1])]
    rates = iter(lars_rates(by_norms, collectives) if by_norms else ())
    for hook, part in calls:
        if not is_kind(hook, GradientLARS):
            for view in part.views:
                hook(part.rule, view.param)
                view.settle()
        elif has_array(part):
            _scale_by_lars(hook, part, next(rates))


def _clip(hook: GradientClipping, parts: Sequence[Part], collectives: Collectives) -> None:
    """What `chainer.optimizer_hooks.GradientClipping` does, on shards."""
    factor = clip_factor(hook, parts, collectives)
    if factor is None:
        return
    for part in parts:
        for values in part.values if has_array(part) else ():
            grad = values.grad
            grad *= factor


def _scale_by_lars(hook: GradientLARS, part: Part, rate: np.floating) -> None:
    """What `chainer.optimizer_hooks.GradientLARS` does, on shards."""
    for view in part.views:
        grad = view.grad
        grad += hook.weight_decay * view.array
        grad *= rate
