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

from smorms3_dist.kernels import selection

import numpy as np

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
        from smorms3_dist.kernels.lanes import add_to_lanes, compiled

        compiled(add_to_lanes)(values, start, self.size, self.state)
        self.filled = start + values.size

    def result(self) -> np.floating:
        """The dot of the whole array."""
        from smorms3_dist.kernels.lanes import compiled, sum_of_lanes

        lanes = self.state.size // 2
        rest = self.state[lanes : lanes + self.size % lanes]
        return self.state.dtype.type(compiled(sum_of_lanes)(self.state[:lanes], rest))


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
