"""The kernel for CPUs: what it is called with, and which of the two runs here."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence

from smorms3_dist.kernels import reference
from smorms3_dist.kernels.mean import Mean

import numpy as np

_logger = logging.getLogger(__name__)


Kernel = Callable[[np.ndarray, Mean, Sequence[np.ndarray], float, float], None]
"""``kernel(param, mean, states, lr, eps)`` updates one contiguous range in place, once.

The states are ``mem``, ``g``, ``g2``. They and the parameters are written; the mean gradient is
read, and its scale counts only where there is a sum to be scaled. All arrays are one-dimensional,
contiguous, of one length and one dtype, to which the largest step and ``eps`` are converted."""


def select_kernel(dtype: np.dtype, rank: int = 0) -> Kernel:
    """Chooses the fastest kernel for arrays of a dtype in host memory.

    That is Numba's for float32 and float64; NumPy's for float16, which Numba does not know on CPUs,
    and where Numba is not installed, which rank 0 says once.
    """
    if dtype != np.float16:
        if importlib.util.find_spec("numba") is not None:
            from smorms3_dist.kernels import cpu

            return cpu.smorms3
        if rank == 0:
            _say_that_numba_is_missing()
    return reference.smorms3


@functools.cache
def _say_that_numba_is_missing() -> None:
    _logger.warning(
        "Numba is not installed: SMORMS3 updates run in NumPy, with the same results but about "
        "four times slower. To compile them: pip install numba"
    )
