"""The kernel for CPUs: what it is called with, and which of the two runs here."""

from __future__ import annotations

import functools
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
    and where Numba cannot be used, which rank 0 says once.
    """
    if dtype == np.float16:
        return reference.smorms3
    try:
        from smorms3_dist.kernels import cpu
    except ImportError as error:
        if rank == 0:
            missing = getattr(error, "name", None) == "numba"
            _say_once("is not installed" if missing else f"cannot be imported ({error})")
        return reference.smorms3
    cpu.CACHE.warns |= rank == 0
    return cpu.smorms3


@functools.cache
def _say_once(problem: str) -> None:
    _logger.warning(
        "Numba %s: SMORMS3 updates run in NumPy, with the same results but about four times "
        "slower. To compile them: pip install --upgrade numba",
        problem,
    )
