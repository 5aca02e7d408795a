"""The dot of an array with itself, as NumPy's BLAS rounds it, of parts that come one by one.

Chainer's norms are ``grad.dot(grad)`` of whole parameters. A rank has them in pieces that pass
through its cache, or in part. OpenBLAS sums float32 on x86 in *lanes*: element ``i`` is added, by
a fused multiplication and addition, to lane ``i`` modulo their number, and the lanes are added up
at the end. So lanes can be filled piece by piece, by one rank after the other, and the sum is the
same to the last bit.

Which lanes a BLAS has depends on the processor, and another BLAS may have none. So nobody relies on
them before `lanes_of_blas` has compared sums of many arrays with those of NumPy.
"""

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

# Bytes of the lanes of OpenBLAS: four registers of AVX-512, or of AVX2.
_WIDTHS = (256, 128)
_SIZES = (1, 31, 97, 1000, 1023, 2085, 4133, 5000, 7777, 9001, 12345, 20002, 30061, 40007, 50033)


class RunningDot:
    """The dot of an array with itself, of its parts.

    Args:
        size: Elements of the whole array.
        dtype: Their dtype.
        lanes: How many lanes there are: what `lanes_of_blas` gives.

    Attributes:
        size: Elements of the whole array.
        filled: How many elements have been added.
        state: The lanes, and what comes behind the last multiple of them, which can be sent to
            another rank.
    """

    def __init__(self, size: int, dtype: np.dtype, lanes: int) -> None:
        self.size = size
        self.filled = 0
        self.state = np.zeros(2 * lanes, dtype)

    def add(self, values: np.ndarray, start: int) -> None:
        """Adds a part: elements from ``start`` on, up to where all are filled already."""
        _compiled(add_to_lanes)(values, start, self.size, self.state)
        self.filled = start + values.size

    def result(self) -> np.floating:
        """The dot of the whole array."""
        lanes = self.state.size // 2
        rest = self.state[lanes : lanes + self.size % lanes]
        return self.state.dtype.type(_compiled(_sum_of_lanes)(self.state[:lanes], rest))


@functools.cache
def lanes_of_blas(dtype: np.dtype) -> int | None:
    """How many lanes NumPy's dot has; ``None`` if it has none that are known."""
    if dtype not in (np.float32, np.float64):
        return None
    rng = np.random.RandomState(0)
    arrays = [
        (rng.standard_normal(size) * 10.0 ** rng.randint(-3, 2, size)).astype(dtype)
        for size in _SIZES
    ]
    expected = [array.dot(array) for array in arrays]
    for width in _WIDTHS:
        lanes = width // dtype.itemsize
        if all(_dot(array, lanes) == dot for array, dot in zip(arrays, expected, strict=True)):
            return lanes
    return None


def _dot(array: np.ndarray, lanes: int) -> np.floating:
    """The dot, of two parts."""
    dot = RunningDot(array.size, array.dtype, lanes)
    middle = array.size // 3
    dot.add(array[:middle], 0)
    dot.add(array[middle:], middle)
    return dot.result()


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
def _sum_of_lanes(lanes, rest):  # type: ignore[no-untyped-def]
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
def _compiled(function: Any) -> Any:
    dispatcher = numba.njit(**_CONTRACTED)(function)
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    dispatcher._cache = NumbaCache(cache_of_numba(), source, function.__name__)
    return dispatcher
