"""The dot of an array with itself, as NumPy's BLAS rounds it, of parts that come one by one.

Chainer's norms are ``grad.dot(grad)`` of whole parameters. A rank has them in pieces that pass
through its cache, or in part. OpenBLAS sums on x86 in *lanes*: element ``i`` is added, by a fused
multiplication and addition, to lane ``i`` modulo their number, and the lanes are added up at the
end. So lanes can be filled piece by piece, by one rank after the other, and the sum is the same to
the last bit.
"""

from __future__ import annotations

import numpy as np


class RunningDot:
    """The dot of an array with itself, of its parts.

    Args:
        size: Elements of the whole array.
        dtype: Their dtype.
        lanes: How many lanes there are: what `smorms3_dist.kernels.dots.lanes_of_blas` gives.

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
