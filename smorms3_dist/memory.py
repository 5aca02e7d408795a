"""Where the arrays of a model are, host memory or a GPU's, and what follows from that.

Everything above this room works on arrays of either kind alike. What differs is gathered here: how
memory is allocated, how shards are laid out in it, and which kernels pack and update it.
"""

from __future__ import annotations

import abc
import functools
import socket
from typing import Any

from smorms3_dist.fused import CudaFused, Fused, HostFused
from smorms3_dist.kernels.tables import Launcher
from smorms3_dist.layout import ALIGNMENT, BUCKET_BYTES

import numpy as np
from chainer.backends.cuda import GpuDevice


class Memory(abc.ABC):
    """One kind of memory.

    Attributes:
        dense: Whether shards are laid out without gaps.
        bucket_bytes: Largest size of a bucket.
        block: Elements that hooks and rules are given at once.
        launcher: What launches the kernels of a GPU, or ``None``.
    """

    dense: bool
    bucket_bytes: int
    block: int
    launcher: Launcher | None = None

    @abc.abstractmethod
    def zeros(self, size: int, dtype: np.dtype) -> Any:
        """A one-dimensional array of zeros that starts at a multiple of `ALIGNMENT` bytes."""

    @abc.abstractmethod
    def empty(self, size: int, dtype: np.dtype) -> Any:
        """A one-dimensional array without values."""

    def place(self) -> tuple[str, str]:
        """The host, and where on it: the same for processes that share a GPU."""
        return socket.gethostname(), ""

    @abc.abstractmethod
    def fused(self, dtype: np.dtype, rank: int) -> Fused:
        """The fused SMORMS3 update of arrays of a dtype there."""


class HostMemory(Memory):
    """Host memory. Blocks stay in the caches of a core."""

    dense = True
    bucket_bytes = BUCKET_BYTES
    block = 1 << 16

    def zeros(self, size: int, dtype: np.dtype) -> np.ndarray:
        """See `Memory.zeros`."""
        raw = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size * dtype.itemsize].view(dtype)

    def empty(self, size: int, dtype: np.dtype) -> np.ndarray:
        """See `Memory.empty`."""
        return np.empty(size, dtype)

    def fused(self, dtype: np.dtype, rank: int) -> Fused:
        """See `Memory.fused`."""
        return HostFused(dtype, rank)


class CudaMemory(Memory):
    """The memory of a GPU. Shards are aligned as buckets are, and nothing is cut into blocks.

    Args:
        device_id: The GPU.
        xp: The module that makes arrays there: ``cupy``.
        launcher: Launches the kernels.
        exact: Whether these contract nothing into fused multiply-adds.
    """

    dense = False
    # Two of them are all the memory that gradients need besides their own.
    bucket_bytes = 1 << 26
    block = 1 << 62

    def __init__(self, device_id: int, xp: Any, launcher: Launcher, exact: bool = False) -> None:
        self._device_id = device_id
        self._exact = exact
        self._xp = xp
        self.launcher: Launcher = launcher

    def __reduce__(self) -> tuple[Any, ...]:
        # Compiled kernels stay where they are.
        return _cuda_memory, (self._device_id, self._exact)

    def zeros(self, size: int, dtype: np.dtype) -> Any:
        """See `Memory.zeros`; CuPy's allocations start at multiples of 512 bytes."""
        return self._xp.zeros(size, dtype)

    def empty(self, size: int, dtype: np.dtype) -> Any:
        """See `Memory.empty`."""
        return self._xp.empty(size, dtype)

    def place(self) -> tuple[str, str]:
        """See `Memory.place`."""
        return place_of_gpu(self._device_id)

    def fused(self, dtype: np.dtype, rank: int) -> Fused:
        """See `Memory.fused`."""
        return CudaFused(self.launcher)


def place_of_gpu(device_id: int) -> tuple[str, str]:
    """The host, and where a GPU of it is on its bus: the same for processes that share it."""
    import cupy

    return socket.gethostname(), str(cupy.cuda.runtime.deviceGetPCIBusId(device_id))


def memory_of(device: Any, exact: bool = False) -> Memory:
    """The memory of a Chainer device.

    Args:
        device: Chainer's device of host memory or of a GPU.
        exact: Whether kernels on a GPU contract nothing into fused multiply-adds, so that they give
            the results of a CPU bit for bit.

    Raises:
        RuntimeError: If the GPU cannot be used, or is too old.
    """
    return _cuda_memory(device.device.id, exact) if isinstance(device, GpuDevice) else HostMemory()


@functools.cache
def _cuda_memory(device_id: int, exact: bool) -> CudaMemory:
    from smorms3_dist.kernels.cuda import CupyLauncher

    import cupy

    with cupy.cuda.Device(device_id):
        return CudaMemory(device_id, cupy, CupyLauncher(exact), exact)
