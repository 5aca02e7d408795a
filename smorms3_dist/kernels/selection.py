"""The kernel for CPUs: its protocol, and which of the two runs here."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Protocol

from smorms3_dist.kernels import reference

import numpy as np

_logger = logging.getLogger(__name__)


class Kernel(Protocol):
    """Updates one contiguous range of parameters and states in place."""

    def __call__(
        self,
        param: np.ndarray,
        grad: np.ndarray,
        other: np.ndarray | None,
        scale: float,
        mem: np.ndarray,
        g: np.ndarray,
        g2: np.ndarray,
        lr: float,
        eps: float,
    ) -> None:
        """Applies one update.

        Args:
            param: Parameters; written.
            grad: Gradients, or part of a sum; read.
            other: If not ``None``, the gradients are ``(grad + other) * scale``; read.
            scale: See ``other``.
            mem: First state; written.
            g: Running mean of the gradients; written.
            g2: Running mean of the squared gradients; written.
            lr: Largest step, converted to the dtype of the arrays.
            eps: Added to the denominators, converted likewise.

        All arrays are one-dimensional, contiguous, of one length and one dtype.
        """


def select_kernel(dtype: np.dtype, rank: int = 0) -> Kernel:
    """Chooses the fastest kernel for arrays of a dtype in host memory.

    Args:
        dtype: float16, float32 or float64.
        rank: Rank 0 says if Numba is missing, once.

    Returns:
        The Numba kernel for float32 and float64; the NumPy kernel for float16, which Numba does not
        know on CPUs, and where Numba is not installed.
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
