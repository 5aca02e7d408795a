"""Updates on CPUs as loops compiled by Numba, for float32 and float64.

One pass over memory is all an update takes: the mean over two gradients, what hooks and loss
scaling do to it, and the formula of the rule, element by element. A core is bound by its memory
bandwidth, and strict IEEE arithmetic costs nothing over the fast kind.

What is needed is compiled when it is first needed: a loop for each formula and dtype, with and
without a sum to be formed, with and without anything to be done to the gradient. The machine code
is kept on disk, beside this file or where ``NUMBA_CACHE_DIR`` says.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smorms3_dist.kernels import chainer_rules
from smorms3_dist.kernels.cache import cache_of_numba
from smorms3_dist.kernels.chainer_rules import Constants, Formula, larger, smaller
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.numba_cache import NumbaCache

import numba
import numpy as np
from numba.extending import register_jitable

CACHE = cache_of_numba()

# What is compiled into a loop comes from these files.
_SOURCE = hashlib.sha256(
    b"".join(Path(path).read_bytes() for path in (__file__, chainer_rules.__file__))
).hexdigest()

# The numpy error model divides by zero as IEEE says, and without fastmath nothing is reordered or
# contracted.
_OPTIONS = {"error_model": "numpy", "fastmath": False, "nogil": True}

_inlined = register_jitable(**_OPTIONS)
_inlined(smaller)
_inlined(larger)


def update(
    formula: Formula,
    param: np.ndarray,
    mean: Mean,
    states: Sequence[np.ndarray],
    constants: Constants,
    preparation: Constants | None = None,
) -> None:
    """Applies a formula to one contiguous range in place, once.

    Args:
        formula: What is done with each element.
        param: The parameters; written. All arrays are one-dimensional, contiguous, of one length
            and one dtype, to which all numbers are converted.
        mean: The mean gradient, only read; its scale counts only where there is a sum to be scaled.
        states: The states of the formula, in its order; written.
        constants: The constants of the formula, in its order.
        preparation: What is done to the mean gradient first, in this order: it is multiplied by
            the first number; the parameter times the second is added; it is divided by the third;
            the parameter times the fourth is added. ``None`` for nothing of it. Where the second
            or the fourth is 0, nothing is added.
    """
    # Scalars of the arrays' own dtype: a Python float would widen the whole loop to float64.
    scalar = param.dtype.type
    first, second, scale = mean
    _loop_of(formula)(
        param,
        first,
        second,
        scalar(scale),
        None if preparation is None else tuple(map(scalar, preparation)),
        tuple(states),
        tuple(map(scalar, constants)),
    )


@_inlined
def _gradient(i, param, first, second, scale, preparation):  # type: ignore[no-untyped-def]
    d = first[i]
    if second is not None:
        d = (d + second[i]) * scale
    if preparation is not None:
        factor, decay, divisor, own_decay = preparation
        nothing = param.dtype.type(0)
        d = d * factor
        d = d + decay * param[i] if decay != nothing else d
        d = d / divisor
        d = d + own_decay * param[i] if own_decay != nothing else d
    return d


def _loop_over_0_states(apply: Callable[..., Any]) -> Callable[..., None]:
    def loop(param, first, second, scale, preparation, states, constants):  # type: ignore[no-untyped-def]
        for i in range(param.size):
            d = _gradient(i, param, first, second, scale, preparation)
            param[i] = apply(d, param[i], *constants)

    return loop


def _loop_over_1_state(apply: Callable[..., Any]) -> Callable[..., None]:
    def loop(param, first, second, scale, preparation, states, constants):  # type: ignore[no-untyped-def]
        (a,) = states
        for i in range(param.size):
            d = _gradient(i, param, first, second, scale, preparation)
            param[i], a[i] = apply(d, param[i], a[i], *constants)

    return loop


def _loop_over_2_states(apply: Callable[..., Any]) -> Callable[..., None]:
    def loop(param, first, second, scale, preparation, states, constants):  # type: ignore[no-untyped-def]
        a, b = states
        for i in range(param.size):
            d = _gradient(i, param, first, second, scale, preparation)
            param[i], a[i], b[i] = apply(d, param[i], a[i], b[i], *constants)

    return loop


def _loop_over_3_states(apply: Callable[..., Any]) -> Callable[..., None]:
    def loop(param, first, second, scale, preparation, states, constants):  # type: ignore[no-untyped-def]
        a, b, c = states
        for i in range(param.size):
            d = _gradient(i, param, first, second, scale, preparation)
            param[i], a[i], b[i], c[i] = apply(d, param[i], a[i], b[i], c[i], *constants)

    return loop


_LOOPS = (_loop_over_0_states, _loop_over_1_state, _loop_over_2_states, _loop_over_3_states)


@functools.cache
def _loop_of(formula: Formula) -> Callable[..., None]:
    loop = _LOOPS[len(formula.states)](_inlined(formula.arithmetic))
    dispatcher = numba.njit(**_OPTIONS)(loop)
    dispatcher._cache = NumbaCache(CACHE, _SOURCE, formula.arithmetic.__name__)
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
    loops = []
    for loop in (_narrow, _round, _is_rounded):
        loops.append(numba.njit(**_OPTIONS)(loop))
        loops[-1]._cache = NumbaCache(CACHE, _SOURCE, loop.__name__)
    return Rounding(*loops)
