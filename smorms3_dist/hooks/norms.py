"""Norms of whole parameters and gradients, of what each rank has of them.

A parameter that lies in one segment is summed there, as Chainer sums it. One that lies in several
is summed by parts; but on one or two ranks with the bits that the sum of the whole has: results are
then those of ChainerMN bit for bit. Where NumPy's dot has lanes that are known
(`smorms3_dist.kernels.running_dot`), the ranks fill them one after the other, and send a few
hundred bytes for each parameter that lies on both. Elsewhere the whole parameter is brought
together.
"""

from __future__ import annotations

import logging
import operator
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.hooks.parts import Part
from smorms3_dist.kernels.dots import lanes_of_blas
from smorms3_dist.kernels.running_dot import RunningDot

import numpy as np
from chainer.backend import get_array_module
from chainer.optimizer_hooks import GradientClipping, GradientLARS

_logger = logging.getLogger(__name__)

EXACT_RANKS = 2
"""The largest world size at which sums have the bits that they have in one process."""

Begun = Mapping[str, RunningDot | np.floating]
"""Sums, by parameter, that this rank has of all its segments; or, on one or two ranks, running dots
of those from the first on."""

NOTHING: Begun = types.MappingProxyType({})

_agreed: weakref.WeakKeyDictionary[Collectives, dict[np.dtype, int | None]]
_agreed = weakref.WeakKeyDictionary()


def lanes_on_all_ranks(dtype: np.dtype, collectives: Collectives) -> int | None:
    """How many lanes the dot has on all ranks, ``None`` if it has not the same. Collective."""
    known = _agreed.setdefault(collectives, {})
    if dtype not in known:
        first, *others = collectives.all_gather_object(lanes_of_blas(dtype))
        known[dtype] = first if all(other == first for other in others) else None
        if known[dtype] is None and collectives.rank == 0:
            _logger.info(
                "norms in %s are taken of whole parameters when all gradients are there, which "
                "takes longer: how NumPy's BLAS sums them up is not known. That of NumPy's wheels "
                "(OpenBLAS) with OMP_NUM_THREADS=1 is",
                dtype,
            )
    return known[dtype]


def has_array(part: Part) -> bool:
    """Whether a parameter is initialized."""
    return bool(part.owners) or any(view.param.array is not None for view in part.views)


def clip_factor(
    hook: GradientClipping, parts: Sequence[Part], collectives: Collectives, begun: Begun = NOTHING
) -> np.floating | None:
    """What `chainer.optimizer_hooks.GradientClipping` multiplies gradients by. Collective.

    Args:
        hook: The hook.
        parts: The parameters, as far as this rank holds them, in Chainer's order.
        collectives: Reaches the other ranks.
        begun: What has been summed already.

    Returns:
        The factor; ``None`` if the norm of the gradients is small enough.
    """
    parts = [part for part in parts if has_array(part)]
    norm = np.sqrt(sum(_squares([(part, "grad") for part in parts], collectives, begun)))
    with np.errstate(divide="ignore"):
        rate = hook.threshold / norm
    return None if rate >= 1 else rate


def lars_rates(
    calls: Sequence[tuple[GradientLARS, Part]], collectives: Collectives, begun: Begun = NOTHING
) -> list[np.floating]:
    """What `chainer.optimizer_hooks.GradientLARS` multiplies gradients by. Collective.

    Args:
        calls: Each hook with a parameter, as far as this rank holds it.
        collectives: Reaches the other ranks.
        begun: What has been summed already of gradients.
    """
    # Arrays first: most of what is begun of gradients, another rank goes on with.
    wanted = [(part, which) for which in ("array", "grad") for _, part in calls]
    norms = [np.sqrt(square) for square in _squares(wanted, collectives, begun)]
    rates: list[Any] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for (hook, _), weight, grad in zip(calls, norms, norms[len(calls) :], strict=False):
            local_rate = weight / (hook.eps + grad + hook.weight_decay * weight)
            # A number, not an array of none: CuPy would take that for one in host memory.
            rates.append(np.where(weight > hook.threshold, local_rate, 1.0)[()])
    return rates


def _squares(
    wanted: Sequence[tuple[Part, str]], collectives: Collectives, begun: Begun
) -> list[np.floating]:
    """Sums of squares of whole parameters or gradients, the same on all ranks. Collective.

    Args:
        wanted: Parameters, as far as this rank holds them, each with ``'array'`` or ``'grad'``.
        collectives: Reaches the other ranks.
        begun: What has been summed already of gradients.
    """
    mine: dict[int, np.floating] = {}
    for index, (part, which) in enumerate(wanted):
        known = begun.get(part.name) if which == "grad" else None
        if len(part.owners) > 1 and collectives.size <= EXACT_RANKS:
            whole = _whole_dot(part, which, collectives, known)
            if whole is not None:
                mine[index] = whole
        elif part.values:
            mine[index] = _own_dot(part, which, known)
    everybodys = [mine] if collectives.size == 1 else _exchange(mine, collectives)
    sums = []
    for index, (part, _) in enumerate(wanted):
        if not part.owners:
            sums.append(mine[index])
            continue
        terms = [squares[index] for squares in everybodys if index in squares]
        sums.append(terms[0] if len(terms) == 1 else _sum(terms))
    return sums


def _own_dot(part: Part, which: str, begun: RunningDot | np.floating | None) -> Any:
    """The sum over the segments of this rank."""
    if isinstance(begun, RunningDot):
        return begun.result()
    if begun is not None:
        return begun
    terms = [own.dot(own) for own in map(operator.attrgetter(which), part.values)]
    return terms[0] if len(terms) == 1 else _sum(terms)


def _exchange(mine: Mapping[int, Any], collectives: Collectives) -> list[dict[int, np.floating]]:
    """The sums of all ranks. Numbers that are on a GPU are fetched from there at once."""
    collectives.await_device()
    by_dtype: dict[str, list[int]] = {}
    for index, value in mine.items():
        by_dtype.setdefault(value.dtype.str, []).append(index)
    columns = []
    for indices in by_dtype.values():
        values = get_array_module(mine[indices[0]]).stack([mine[index] for index in indices])
        columns.append((indices, values.get() if hasattr(values, "get") else values))
    return [
        {
            index: value
            for indices, values in theirs
            for index, value in zip(indices, values, strict=True)
        }
        for theirs in collectives.all_gather_object(columns)
    ]


def _sum(terms: Sequence[np.floating]) -> np.floating:
    return terms[0].dtype.type(sum(float(term) for term in terms))


def _whole_dot(part: Part, which: str, collectives: Collectives, begun: Any) -> np.floating | None:
    """The dot of a parameter that lies in several segments; ``None`` on a rank without the end."""
    if which == "array" and part.whole is not None:
        first, _ = part.owners[0]
        return part.whole.dot(part.whole) if first == collectives.rank else None
    dtype = part.dtype
    lanes = None if dtype is None else lanes_on_all_ranks(dtype, collectives)
    if dtype is None or lanes is None:
        whole = _bring_together(part, which, collectives)
        return None if whole is None else whole.dot(whole)
    size = sum(segment.size for _, segment in part.owners)
    dot = begun if isinstance(begun, RunningDot) else RunningDot(size, dtype, lanes)
    own = (getattr(values, which) for values in part.values)
    before: int | None = None
    for owner, segment in part.owners:
        if before is not None and owner != before:
            collectives.broadcast(dot.state, before)
        before = owner
        if owner == collectives.rank:
            values = next(own)
            if dot.filled < segment.stop_p:
                dot.add(values, segment.start_p)
    return dot.result() if before == collectives.rank else None


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
