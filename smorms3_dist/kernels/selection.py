"""Whether updates on this CPU are compiled, which Numba has to be there for."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable

import numpy as np

_logger = logging.getLogger(__name__)


def compiled_update(dtype: np.dtype, rank: int = 0) -> Callable[..., None] | None:
    """`smorms3_dist.kernels.cpu.update`, if it can be had for arrays of a dtype in host memory.

    Numba does not know float16 on CPUs. Where it is not installed, rank 0 says so once.
    """
    if dtype == np.float16:
        return None
    if importlib.util.find_spec("numba") is not None:
        from smorms3_dist.kernels import cpu

        return cpu.update
    if rank == 0:
        _say_that_numba_is_missing()
    return None


@functools.cache
def _say_that_numba_is_missing() -> None:
    _logger.warning(
        "Numba is not installed: updates run in NumPy, SMORMS3 in blocks and all other rules by "
        "Chainer's own code, with the same results but several times slower. To compile them: "
        "pip install numba"
    )
