"""Updates on CPUs as loops compiled by Numba, for float32 and float64.

One pass over memory is all an update takes: the mean over two gradients, what hooks and loss
scaling do to it, and the formula of the rule, block by block. A core is bound by its memory
bandwidth, and strict IEEE arithmetic costs nothing over the fast kind.

What is needed is compiled when it is first needed: a loop for each formula and dtype, with and
without a sum to be formed, with and without operations on the gradient. The machine code is kept on
disk, beside this file or where ``NUMBA_CACHE_DIR`` says.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smorms3_dist.kernels import chainer_rules, lanes
from smorms3_dist.kernels.cache import cache_of_numba
from smorms3_dist.kernels.chainer_rules import (
    Constants,
    Formula,
    larger,
    smaller,
    unless_nan,
)
from smorms3_dist.kernels.lanes import add_to_lanes
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.numba_cache import NumbaCache
from smorms3_dist.kernels.operations import OperationKind, Operations
from smorms3_dist.kernels.running_dot import RunningDot

import numba
import numpy as np
from numba.extending import register_jitable

CACHE = cache_of_numba()

# What is compiled into a loop comes from these files.
_SOURCE = hashlib.sha256(
    b"".join(Path(path).read_bytes() for path in (__file__, chainer_rules.__file__, lanes.__file__))
).hexdigest()

# The numpy error model divides by zero as IEEE says, and without fastmath nothing is reordered or
# contracted.
_OPTIONS: Any = {"error_model": "numpy", "fastmath": False, "nogil": True}

_inlined = register_jitable(**_OPTIONS)
_inlined(smaller)
_inlined(larger)
_inlined(unless_nan)

_BLOCK = 1024
"""Elements of a gradient that operations are applied to at once: they stay in the first cache."""

_SCALE = int(OperationKind.SCALE)
_DECAY = int(OperationKind.DECAY)
_LASSO = int(OperationKind.LASSO)
_CLIP = int(OperationKind.CLIP)
_DIVIDE = int(OperationKind.DIVIDE)
_SCALE_IN_FLOAT64 = -1
_IN_LOOP = (_SCALE, _DECAY, _SCALE, _DIVIDE, _DECAY)


def update(
    formula: Formula,
    param: np.ndarray,
    mean: Mean,
    states: Sequence[np.ndarray],
    constants: Constants,
    operations: Operations = (),
) -> None:
    """Applies a formula to one contiguous range in place, once.

    Args:
        formula: What is done with each element.
        param: The parameters; written. All arrays are one-dimensional, contiguous, of one length
            and one dtype, to which all numbers are converted.
        mean: The mean gradient, only read; its scale counts only where there is a sum to be scaled.
        states: The states of the formula, in its order; written.
        constants: The constants of the formula, in its order.
        operations: What is done to the mean gradient first, in this order.
    """
    # Scalars of the arrays' own dtype: a Python float would widen the whole loop to float64.
    scalar = param.dtype.type
    first, second, scale = mean
    few_or_table = _in_loop(operations, param.dtype) if operations else None
    _loop_of(formula, in_blocks=isinstance(few_or_table, np.ndarray))(
        param,
        first,
        second,
        scalar(scale),
        few_or_table,
        tuple(states),
        tuple(map(scalar, constants)),
    )


def store(
    out: np.ndarray,
    mean: Mean,
    param: np.ndarray,
    operations: Operations = (),
    dot: RunningDot | None = None,
    start: int = 0,
) -> None:
    """Writes a mean gradient into an array, after operations, and adds it to a running dot.

    Args:
        out: What is written; may be an array of the mean. Arrays are as those of `update`.
        mean: The mean gradient.
        param: The parameters that the operations see.
        operations: What is done to the mean gradient, in this order.
        dot: The dot of the array that this is a part of; or ``None``.
        start: The first element of the part.
    """
    first, second, scale = mean
    if second is not None and second.ctypes.data == out.ctypes.data:
        first, second = second, first
    if first.ctypes.data != out.ctypes.data:
        out[...] = first
    table = _table(operations, param.dtype)
    state, size = (None, 0) if dot is None else (dot.state, dot.size)
    _stored()(out, second, out.dtype.type(scale), param, table, state, start, size)
    if dot is not None:
        dot.filled = start + out.size


def scale(
    grad: np.ndarray, param: np.ndarray, decay: float, stops: np.ndarray, factors: np.ndarray
) -> None:
    """Adds ``decay * param`` to a gradient, and multiplies each of its ranges by a factor.

    Args:
        grad: What is written. Arrays are as those of `update`.
        param: The parameters.
        decay: In the dtype of the arrays.
        stops: Where the ranges end, one behind the other: int64.
        factors: Of each range one.
    """
    _scaled()(grad, param, param.dtype.type(decay), stops, factors)


@functools.lru_cache(maxsize=64)
def _in_loop(operations: Operations, dtype: np.dtype) -> tuple[np.floating, ...] | np.ndarray:
    """Operations as the loop of an update takes them.

    The most frequent are done within it: a scaling, a decay, a second scaling, a division and a
    second decay, in this order, any of which may be missing. For others there is a table.
    """
    table = _table(operations, dtype)
    # A decay by 0 is one: what is infinite or nan among parameters gets into the gradient.
    numbers = [1.0, np.nan, 1.0, 1.0, np.nan]
    position = 0
    for kind, number, _ in table.tolist():
        while position < len(_IN_LOOP) and _IN_LOOP[position] != kind:
            position += 1
        if position == len(_IN_LOOP):
            return table
        numbers[position] = number
        position += 1
    return tuple(map(dtype.type, numbers))


@functools.lru_cache(maxsize=64)
def _table(operations: Operations, dtype: np.dtype) -> np.ndarray:
    """Operations as numbers: what is done, and with what."""
    rows = [(float(kind), float(number), float(upper)) for kind, number, upper in operations]
    for row, (kind, number, _) in enumerate(operations):
        # As NumPy multiplies an array, in place, by a number with a dtype of its own.
        if kind is OperationKind.SCALE and (np.ones(1, dtype) * number).dtype != dtype:
            rows[row] = (_SCALE_IN_FLOAT64, *rows[row][1:])
    return np.array(rows, np.float64).reshape(-1, 3)


@_inlined
def _apply(operations, d, p):  # type: ignore[no-untyped-def]
    """Applies operations to a block of gradients in place."""
    zero, one = d.dtype.type(0), d.dtype.type(1)
    for row in range(operations.shape[0]):
        kind = int(operations[row, 0])
        exact = operations[row, 1]
        number = d.dtype.type(exact)
        upper = d.dtype.type(operations[row, 2])
        if kind == _SCALE:
            for i in range(d.size):
                d[i] = d[i] * number
        elif kind == _DECAY:
            for i in range(d.size):
                d[i] = d[i] + number * p[i]
        elif kind == _LASSO:
            for i in range(d.size):
                sign = one if p[i] > zero else (-one if p[i] < zero else p[i])
                # Both zeros have the sign 0.
                sign = zero if sign == zero else sign
                d[i] = d[i] + number * sign
        elif kind == _CLIP:
            for i in range(d.size):
                d[i] = smaller(larger(d[i], number), upper)
        elif kind == _SCALE_IN_FLOAT64:
            for i in range(d.size):
                d[i] = d.dtype.type(np.float64(d[i]) * exact)
        else:
            for i in range(d.size):
                d[i] = d[i] / number


@_inlined
def _evaluate(d, second, scale):  # type: ignore[no-untyped-def]
    """Forms a mean in place: where the first summand is."""
    if second is not None:
        for i in range(d.size):
            d[i] = (d[i] + second[i]) * scale


@_inlined
def _part(array, start, stop):  # type: ignore[no-untyped-def]
    return None if array is None else array[start:stop]


def _store(out, second, scale, param, operations, state, offset, size):  # type: ignore[no-untyped-def]
    for start in range(0, out.size, _BLOCK):
        stop = min(start + _BLOCK, out.size)
        d = out[start:stop]
        _evaluate(d, _part(second, start, stop), scale)
        _apply(operations, d, param[start:stop])
        if state is not None:
            add_to_lanes(d, offset + start, size, state)


def _scale(d, p, decay, stops, factors):  # type: ignore[no-untyped-def]
    start = 0
    for k in range(stops.size):
        factor = factors[k]
        for i in range(start, stops[k]):
            d[i] = (d[i] + decay * p[i]) * factor
        start = stops[k]


@_inlined
def _gradient(i, p, first, second, scale, few):  # type: ignore[no-untyped-def]
    d = first[i] if second is None else (first[i] + second[i]) * scale
    if few is not None:
        factor, decay, second_factor, divisor, second_decay = few
        d = d * factor
        d = d if np.isnan(decay) else d + decay * p[i]
        d = d * second_factor
        d = d / divisor
        d = d if np.isnan(second_decay) else d + second_decay * p[i]
    return d


def _over_0_states(apply: Callable[..., Any]) -> Callable[..., None]:
    def loop(p, first, second, scale, few, states, constants):  # type: ignore[no-untyped-def]
        for i in range(p.size):
            d = _gradient(i, p, first, second, scale, few)
            p[i] = apply(d, p[i], *constants)

    return loop


def _over_1_state(apply: Callable[..., Any]) -> Callable[..., None]:
    def loop(p, first, second, scale, few, states, constants):  # type: ignore[no-untyped-def]
        (a,) = states
        for i in range(p.size):
            d = _gradient(i, p, first, second, scale, few)
            p[i], a[i] = apply(d, p[i], a[i], *constants)

    return loop


def _over_2_states(apply: Callable[..., Any]) -> Callable[..., None]:
    def loop(p, first, second, scale, few, states, constants):  # type: ignore[no-untyped-def]
        a, b = states
        for i in range(p.size):
            d = _gradient(i, p, first, second, scale, few)
            p[i], a[i], b[i] = apply(d, p[i], a[i], b[i], *constants)

    return loop


def _over_3_states(apply: Callable[..., Any]) -> Callable[..., None]:
    def loop(p, first, second, scale, few, states, constants):  # type: ignore[no-untyped-def]
        a, b, c = states
        for i in range(p.size):
            d = _gradient(i, p, first, second, scale, few)
            p[i], a[i], b[i], c[i] = apply(d, p[i], a[i], b[i], c[i], *constants)

    return loop


_LOOPS = (_over_0_states, _over_1_state, _over_2_states, _over_3_states)
_PARTS = (
    lambda states, start, stop: (),
    lambda states, start, stop: (states[0][start:stop],),
    lambda states, start, stop: (states[0][start:stop], states[1][start:stop]),
    lambda states, start, stop: (
        states[0][start:stop],
        states[1][start:stop],
        states[2][start:stop],
    ),
)


def _in_blocks(loop: Callable[..., None], parts: Callable[..., Any]) -> Callable[..., None]:
    """A loop that is given gradients block by block, after all operations in a table."""

    def updated(param, first, second, scale, operations, states, constants):  # type: ignore[no-untyped-def]
        block = np.empty(_BLOCK, param.dtype)
        for start in range(0, param.size, _BLOCK):
            stop = min(start + _BLOCK, param.size)
            d, p = block[: stop - start], param[start:stop]
            summand = first[start:stop]
            for i in range(d.size):
                d[i] = summand[i]
            _evaluate(d, _part(second, start, stop), scale)
            _apply(operations, d, p)
            loop(p, d, None, scale, None, parts(states, start, stop), constants)

    return updated


@functools.cache
def _loop_of(formula: Formula, in_blocks: bool) -> Callable[..., None]:
    states = len(formula.states)
    loop = _LOOPS[states](_inlined(formula.arithmetic))
    if in_blocks:
        loop = _in_blocks(_inlined(loop), _inlined(_PARTS[states]))
    return _compiled(loop, f"{formula.arithmetic.__name__} in blocks={in_blocks}")


@functools.cache
def _stored() -> Callable[..., None]:
    return _compiled(_store, _store.__name__)


@functools.cache
def _scaled() -> Callable[..., None]:
    return _compiled(_scale, _scale.__name__)


def _compiled(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    dispatcher = numba.njit(**_OPTIONS)(function)
    dispatcher._cache = NumbaCache(CACHE, _SOURCE, name)
    return dispatcher


# Rounding to bfloat16, by the bits of float32 (uint32).


@_inlined
def _rounded(b):  # type: ignore[no-untyped-def]
    if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        # A nan may have nothing but lower bits: one of those that stay is set.
        return b >> np.uint32(16) | np.uint32(0x40)
    # Half of the last place is added, or a little less where that place is even.
    return (b + np.uint32(0x7FFF) + (b >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)


def _narrow(bits, out):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        out[i] = _rounded(bits[i])


def _round(bits, out):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        out[i] = _rounded(bits[i]) << np.uint32(16)


def _is_rounded(bits, rounded):  # type: ignore[no-untyped-def]
    same = True
    for i in range(bits.size):
        same &= rounded[i] == _rounded(bits[i]) << np.uint32(16)
    return same


class Rounding(NamedTuple):
    """Loops over the bits of float32, one-dimensional and contiguous.

    Attributes:
        narrow: Writes those of bfloat16 (uint16) into an array.
        round: Writes those of the rounded float32 into an array.
        is_rounded: Whether an array has what ``round`` would write.
    """

    narrow: Callable[..., None]
    round: Callable[..., None]
    is_rounded: Callable[..., bool]


@functools.cache
def rounding() -> Rounding:
    """The loops that round to bfloat16."""
    return Rounding(*(_compiled(loop, loop.__name__) for loop in (_narrow, _round, _is_rounded)))
