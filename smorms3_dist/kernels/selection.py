"""Whether loops on this CPU are compiled, which Numba has to be there for."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from smorms3_dist.kernels.cpu import Rounding

_logger = logging.getLogger(__name__)


def compiled_update(dtype: np.dtype, rank: int = 0) -> Callable[..., None] | None:
    """`smorms3_dist.kernels.cpu.update`, if it can be had for arrays of a dtype in host memory.

    Numba does not know float16 on CPUs. Where it cannot be used, rank 0 says so once.
    """
    if dtype == np.float16:
        return None
    try:
        from smorms3_dist.kernels import cpu
    except ImportError as error:
        if rank == 0:
            missing = getattr(error, "name", None) == "numba"
            _say_once("is not installed" if missing else f"cannot be imported ({error})")
        return None
    cpu.CACHE.warns |= rank == 0
    return cpu.update


def compiled_store(dtype: np.dtype) -> Callable[..., None] | None:
    """`smorms3_dist.kernels.cpu.store`, where `compiled_update` can be had."""
    if compiled_update(dtype) is None:
        return None
    from smorms3_dist.kernels import cpu

    return cpu.store


def compiled_scale(dtype: np.dtype) -> Callable[..., None] | None:
    """`smorms3_dist.kernels.cpu.scale`, where `compiled_update` can be had."""
    if compiled_update(dtype) is None:
        return None
    from smorms3_dist.kernels import cpu

    return cpu.scale


@functools.cache
def compiled_rounding() -> Rounding | None:
    """The loops that round to bfloat16, if they can be had; the same in NumPy is slower."""
    try:
        from smorms3_dist.kernels import cpu
    except ImportError:
        return None
    return cpu.rounding()


@functools.cache
def _say_once(problem: str) -> None:
    _logger.warning(
        "Numba %s: updates run in NumPy, SMORMS3 in blocks and all other rules by Chainer's own "
        "code, with the same results but several times slower. To compile them: pip install "
        "--upgrade numba",
        problem,
    )
