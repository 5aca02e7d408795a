"""The SMORMS3 update as one loop compiled by Numba, for float32 and float64.

One pass over memory is all it takes: a core is bound by its memory bandwidth, and strict IEEE
arithmetic costs nothing over the fast kind. The machine code is kept on disk, beside this file or
where ``NUMBA_CACHE_DIR`` says.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.kernels.cache import cache_of_numba
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.numba_cache import NumbaCache

import numba
import numpy as np

CACHE = cache_of_numba()

_SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # The numpy error model divides by zero as IEEE says, and without fastmath nothing is reordered
    # or contracted.
    dispatcher = numba.njit(error_model="numpy", fastmath=False, nogil=True)(function)
    dispatcher._cache = NumbaCache(CACHE, _SOURCE, function.__name__)
    return dispatcher


@_compiled
def _step(d, m, g, g2, one, lr, eps):  # type: ignore[no-untyped-def]
    r = one / (m + one)
    keep = one - r
    step = r * d
    mean = keep * g + step
    square = keep * g2 + step * d
    x = mean * mean / (square + eps)
    # numpy.minimum: the first operand if it is smaller or nan, else the second.
    bound = x if x < lr or x != x else lr
    change = d * bound / (math.sqrt(square) + eps)
    return change, one + m * (one - x), mean, square


@_compiled
def _update(param, grad, mem, g, g2, one, lr, eps):  # type: ignore[no-untyped-def]
    for i in range(param.size):
        change, mem[i], g[i], g2[i] = _step(grad[i], mem[i], g[i], g2[i], one, lr, eps)
        param[i] -= change


@_compiled
def _update_with_mean(  # type: ignore[no-untyped-def]
    param, grad, other, scale, mem, g, g2, one, lr, eps
):
    for i in range(param.size):
        d = (grad[i] + other[i]) * scale
        change, mem[i], g[i], g2[i] = _step(d, mem[i], g[i], g2[i], one, lr, eps)
        param[i] -= change


def smorms3(
    param: np.ndarray, mean: Mean, states: Sequence[np.ndarray], lr: float, eps: float
) -> None:
    """See `smorms3_dist.kernels.selection.Kernel`."""
    # Scalars of the arrays' own dtype: a Python float would widen the whole loop to float64.
    scalar = param.dtype.type
    constants = scalar(1), scalar(lr), scalar(eps)
    grad, other, scale = mean
    if other is None:
        _update(param, grad, *states, *constants)
    else:
        _update_with_mean(param, grad, other, scalar(scale), *states, *constants)
