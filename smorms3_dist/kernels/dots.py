"""How NumPy's BLAS sums up the dot of an array with itself.

Which lanes it has (`smorms3_dist.kernels.running_dot`) depends on the processor, and another BLAS
may have none. So nobody relies on them before sums of many arrays have been compared with those of
NumPy.
"""

from __future__ import annotations

import functools

from smorms3_dist.kernels import selection
from smorms3_dist.kernels.running_dot import RunningDot

import numpy as np

# Bytes of the lanes of OpenBLAS: four registers of AVX-512, or of AVX2.
_WIDTHS = (256, 128)
_SIZES = (1, 31, 97, 1000, 1023, 2085, 4133, 5000, 7777, 9001, 12345, 20002, 30061, 40007, 50033)


@functools.cache
def lanes_of_blas(dtype: np.dtype) -> int | None:
    """How many lanes NumPy's dot has.

    ``None`` if it has none that are known, and where nothing can be compiled that has them.
    """
    if selection.compiled_update(dtype) is None:
        return None
    rng = np.random.RandomState(0)
    arrays = [
        (rng.standard_normal(size) * 10.0 ** rng.randint(-3, 2, size)).astype(dtype)
        for size in _SIZES
    ]
    expected = [dot_of_numpy(array) for array in arrays]
    for width in _WIDTHS:
        lanes = width // dtype.itemsize
        if all(
            dot_in_parts(array, lanes) == dot for array, dot in zip(arrays, expected, strict=True)
        ):
            return lanes
    return None


def dot_of_numpy(array: np.ndarray) -> np.floating:
    """The dot of an array with itself, by NumPy."""
    return array.dot(array)


def dot_in_parts(array: np.ndarray, lanes: int) -> np.floating:
    """The dot of an array with itself, by lanes, of two parts."""
    dot = RunningDot(array.size, array.dtype, lanes)
    middle = array.size // 3
    dot.add(array[:middle], 0)
    dot.add(array[middle:], middle)
    return dot.result()
