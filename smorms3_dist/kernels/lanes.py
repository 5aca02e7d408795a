"""The sums of `smorms3_dist.kernels.running_dot`, compiled by Numba, rounded as OpenBLAS does."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from smorms3_dist.kernels.cache import cache_of_numba
from smorms3_dist.kernels.numba_cache import NumbaCache

import numba
import numpy as np
from numba.extending import register_jitable

_STRICT: Any = {"error_model": "numpy", "fastmath": False, "nogil": True}
# A product and its sum become one operation with one rounding, as in the kernels of OpenBLAS.
_CONTRACTED: Any = {**_STRICT, "fastmath": {"contract"}}


@register_jitable(**_CONTRACTED)
def add_to_lanes(values, start, size, state):  # type: ignore[no-untyped-def]
    """Adds elements from ``start`` on, of an array of ``size``, to the lanes in ``state``."""
    lanes = state.size // 2
    end = size // lanes * lanes
    stop = min(max(end - start, 0), values.size)
    i = 0
    while i < stop and (start + i) % lanes:
        state[(start + i) % lanes] += values[i] * values[i]
        i += 1
    while i + lanes <= stop:
        part = values[i : i + lanes]
        for lane in range(lanes):
            state[lane] += part[lane] * part[lane]
        i += lanes
    while i < stop:
        state[(start + i) % lanes] += values[i] * values[i]
        i += 1
    while i < values.size:
        state[lanes + (start + i - end)] = values[i]
        i += 1


@register_jitable(**_CONTRACTED)
def sum_of_lanes(lanes, rest):  # type: ignore[no-untyped-def]
    """Adds up lanes, and the elements behind the last multiple of them."""
    register = 32 // lanes.itemsize
    half = register // 2
    done = 0
    sums = np.empty(half, lanes.dtype)
    if lanes.size == 8 * register:
        four = np.empty(4 * register, lanes.dtype)
        for i in range(4 * register):
            lane = i // register * 2 * register + i % register
            four[i] = lanes[lane] + lanes[lane + register]
        if rest.size >= 4 * register:
            done = 4 * register
            for i in range(done):
                four[i] += rest[i] * rest[i]
        for i in range(half):
            low = four[i] + four[i + register] + four[i + 2 * register] + four[i + 3 * register]
            j = i + half
            high = four[j] + four[j + register] + four[j + 2 * register] + four[j + 3 * register]
            sums[i] = low + high
    else:
        for i in range(half):
            a, b = i, i + half
            first = (lanes[a] + lanes[b]) + (lanes[a + register] + lanes[b + register])
            a, b = a + 2 * register, b + 2 * register
            sums[i] = first + ((lanes[a] + lanes[b]) + (lanes[a + register] + lanes[b + register]))
    total = sums[0] + sums[1]
    if half == 4:
        total = total + (sums[2] + sums[3])
    return _with_rest(total, rest[done:])


@register_jitable(**_CONTRACTED)
def _with_rest(total, rest):  # type: ignore[no-untyped-def]
    if rest.itemsize == 8:
        for i in range(rest.size):
            total += rest[i] * rest[i]
        return total
    dot = 0.0
    for i in range(rest.size):
        dot += np.float64(_square(rest[i]))
    return dot + np.float64(total)


@register_jitable(**_STRICT)
def _square(value):  # type: ignore[no-untyped-def]
    return value * value


@functools.cache
def compiled(function: Any) -> Any:
    """Compiles a function of this module, which may be in the cache."""
    dispatcher = numba.njit(**_CONTRACTED)(function)
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    dispatcher._cache = NumbaCache(cache_of_numba(), source, function.__name__)
    return dispatcher
