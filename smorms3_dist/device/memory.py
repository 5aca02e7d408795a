"""Host memory and the memory of GPUs: how each is allocated, laid out, and computed in.

Everything above this room works on arrays of either kind alike; what differs is gathered here.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any

from smorms3_dist.kernels.tables import KernelLauncher
from smorms3_dist.layout import ALIGNMENT, BUCKET_BYTES, GPU_BUCKET_BYTES, gpu_bucket_bytes
from smorms3_dist.phases import HOST_CLOCK, TimeSource
from smorms3_dist.references import holders

import numpy as np

GRADIENTS, PARAMETERS, STATES, RECEIVED = 0, 1, 2, 5
"""Places within a page of host memory, where the arrays of an update start: see `offset_of`."""


def offset_of(place: int) -> int:
    """Bytes from the start of a page to a place in it.

    An update reads and writes five or six arrays at once, and a cache puts what has the same offset
    within a page into the same few lines. With all of them at one offset, as arrays of powers of
    two are, an update takes more than twice the time. Chainer's own gradients mostly start with a
    page.
    """
    return place * 5 * ALIGNMENT


class Memory(abc.ABC):
    """One kind of memory.

    Attributes:
        dense: Whether shards are laid out without gaps.
        bucket_bytes: Largest size of a bucket, where there are few ranks.
        block: Elements that hooks and rules are given at once.
        exact: Whether updates give the results of a CPU bit for bit.
        launcher: What launches the kernels of a GPU, or ``None``.
        page: The bytes within which it matters where arrays start: see `offset_of`.
    """

    dense: bool
    bucket_bytes: int
    block: int
    exact: bool = True
    launcher: KernelLauncher | None = None
    page: int = ALIGNMENT

    @abc.abstractmethod
    def zeros(self, size: int, dtype: np.dtype, what: str, place: int = GRADIENTS) -> Any:
        """Makes a one-dimensional array of zeros that starts at a multiple of `ALIGNMENT` bytes.

        Args:
            size: Elements.
            dtype: Of each.
            what: What it is for, as an error says it.
            place: Where in a page it starts, in host memory.

        Raises:
            MemoryError: If there is no memory for it; names the bytes, what they are for, and the
                host or GPU.
        """

    @abc.abstractmethod
    def empty(self, size: int, dtype: np.dtype, what: str, place: int = GRADIENTS) -> Any:
        """Makes a one-dimensional array without values; see `zeros`."""

    def apart(self, view: Any) -> Any:
        """The same elements as an array that whatever is made of it refers to, as its memory."""
        return view

    def is_seen_otherwise(self, array: Any) -> bool:
        """Whether something sees an array of `apart`, by its memory, and does not refer to it."""
        return False

    def bucket_bytes_of(self, world_size: int) -> int:
        """Largest size of a bucket."""
        return self.bucket_bytes

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, this is where arrays are made and computed with, as in CUDA's current GPU."""
        return contextlib.nullcontext()

    def mark(self) -> Any:
        """Marks what the current stream has been given so far, for `follow`; on a GPU."""
        return None

    def follow(self, mark: Any) -> None:
        """Lets the current stream wait for what was marked; the host does not wait."""
        return

    def has_come(self, mark: Any) -> bool:
        """Whether what was marked is done, so that nobody has to follow any more."""
        return True

    def clock(self) -> TimeSource:
        """Tells what the phases of a step take there."""
        return HOST_CLOCK

    def bytes_on_gpu(self) -> int:
        """Bytes of a GPU that this process has; 0 where the memory is the host's."""
        return 0

    def location(self) -> tuple[str, str]:
        """The host, and the address of the GPU on its bus: the same for ranks that share one."""
        return running_host(), ""


class HostMemory(Memory):
    """Host memory. Blocks stay in the caches of a core."""

    dense = True
    bucket_bytes = BUCKET_BYTES
    page = 4096
    block = 1 << 16

    def zeros(self, size: int, dtype: np.dtype, what: str, place: int = GRADIENTS) -> np.ndarray:
        """See `Memory.zeros`."""
        return self._allocate(np.zeros, size, dtype, what, place)

    def empty(self, size: int, dtype: np.dtype, what: str, place: int = GRADIENTS) -> np.ndarray:
        """See `Memory.empty`."""
        return self._allocate(np.empty, size, dtype, what, place)

    def apart(self, view: np.ndarray) -> np.ndarray:
        """See `Memory.apart`. Views of views refer to what no array is a view of."""
        return np.asarray(view.data)

    def _allocate(
        self, make: Callable[..., Any], size: int, dtype: np.dtype, what: str, place: int
    ) -> np.ndarray:
        nbytes = size * np.dtype(dtype).itemsize
        # What is smaller than a page wastes none for its place.
        modulus = self.page if nbytes >= self.page else ALIGNMENT
        try:
            raw = make(nbytes + modulus, np.uint8)
        except MemoryError as error:
            raise _out_of_host_memory(nbytes, what, _MORE_RANKS, error) from error
        start = (offset_of(place) - raw.ctypes.data) % modulus
        return raw[start : start + nbytes].view(dtype)


class CudaMemory(Memory):
    """The memory of a GPU. Shards are aligned as buckets are, and nothing is cut into blocks.

    ``xp`` is ``cupy``, or a stand-in for it.
    """

    dense = False
    # Two of them are all the memory that gradients need besides their own.
    bucket_bytes = GPU_BUCKET_BYTES
    block = 1 << 62

    def __init__(
        self, device_id: int, xp: Any, launcher: KernelLauncher, exact: bool = False
    ) -> None:
        self._device_id = device_id
        self.exact = exact
        self._xp = xp
        self.launcher: KernelLauncher = launcher
        self._clock = EventClock(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Compiled kernels stay where they are.
        return _cuda_memory, (self._device_id, self.exact)

    def zeros(self, size: int, dtype: np.dtype, what: str, place: int = GRADIENTS) -> Any:
        """See `Memory.zeros`; CuPy's allocations start at multiples of 512 bytes."""
        return self._allocate(self._xp.zeros, size, dtype, what)

    def empty(self, size: int, dtype: np.dtype, what: str, place: int = GRADIENTS) -> Any:
        """See `Memory.empty`."""
        return self._allocate(self._xp.empty, size, dtype, what)

    def apart(self, view: Any) -> Any:
        """See `Memory.apart`. It has a memory object of its own, which no other array has."""
        cuda = self._xp.cuda
        memory = cuda.UnownedMemory(view.data.ptr, view.nbytes, view, self._device_id)
        return self._xp.ndarray(view.shape, view.dtype, memptr=cuda.MemoryPointer(memory, 0))

    def is_seen_otherwise(self, array: Any) -> bool:
        """See `Memory.is_seen_otherwise`: as by what ``as_strided`` makes."""
        # The array has the pointer, and the pointer the memory.
        return any(count > 1 for count in holders([array.data, array.data.mem]))

    def _allocate(self, make: Callable[..., Any], size: int, dtype: np.dtype, what: str) -> Any:
        try:
            return make(size, dtype)
        except MemoryError as error:
            with self._xp.cuda.Device(self._device_id):
                free, _ = self._xp.cuda.runtime.memGetInfo()
            where = f"GPU {self._device_id} of host {socket.gethostname()}"
            nbytes = size * np.dtype(dtype).itemsize
            remedy = f"{_MORE_RANKS}. If CuPy's memory pool has a limit, raise that"
            raise _out_of_memory(where, nbytes, what, free, remedy, error) from error

    def pinned(self, size: int, dtype: np.dtype, what: str) -> np.ndarray:
        """Makes an array in page-locked host memory, without values; see `zeros`.

        Copies from and to it need no host, and must end before its memory is given up.
        """
        nbytes = size * np.dtype(dtype).itemsize
        cuda = self._xp.cuda
        try:
            # Not out of CuPy's pool, which keeps powers of two, up to twice as much, for ever.
            raw = cuda.PinnedMemoryPointer(cuda.PinnedMemory(max(nbytes, 1)), 0)
        except cuda.runtime.CUDARuntimeError as error:
            if error.status != _CUDA_ERROR_MEMORY_ALLOCATION:
                raise
            remedy = "Start fewer ranks on this host, or give the job or the container more memory"
            raise _out_of_host_memory(nbytes, f"{what} (page-locked)", remedy, error) from error
        return np.ndarray(size, dtype, buffer=raw)

    def bucket_bytes_of(self, world_size: int) -> int:
        """See `Memory.bucket_bytes_of`."""
        return gpu_bucket_bytes(world_size, self.bucket_bytes)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """See `Memory.current`; threads have a current GPU each."""
        return self._xp.cuda.Device(self._device_id)

    def stream(self) -> Any:
        """Makes a stream that runs beside the others and waits for events alone."""
        return self._xp.cuda.Stream(non_blocking=True)

    def current_stream(self) -> Any:
        """The stream on which CuPy computes at the moment."""
        return self._xp.cuda.get_current_stream()

    def event(self, stream: Any, timed: bool = False) -> Any:
        """Makes an event that happens when a stream has done all that it was given so far."""
        event = self._xp.cuda.Event(disable_timing=not timed)
        event.record(stream)
        return event

    def mark(self) -> Any:
        """See `Memory.mark`: an event."""
        return self.event(self.current_stream())

    def follow(self, mark: Any) -> None:
        """See `Memory.follow`; for whoever is on another GPU, the current stream of this one, too.

        Arrays are copied elsewhere on the GPU where they are.
        """
        self.current_stream().wait_event(mark)
        if self._xp.cuda.Device().id != self._device_id:
            with self.current():
                self.current_stream().wait_event(mark)

    def has_come(self, mark: Any) -> bool:
        """See `Memory.has_come`.

        Raises:
            GpuError: If the GPU has failed.
        """
        return self.has_happened(mark)

    def seconds_between(self, begin: Any, end: Any) -> float:
        """The time between two timed events that have happened."""
        return float(self._xp.cuda.get_elapsed_time(begin, end)) / 1000

    def clock(self) -> TimeSource:
        """See `Memory.clock`."""
        return self._clock

    def bytes_on_gpu(self) -> int:
        """See `Memory.bytes_on_gpu`: what CuPy's pool has taken of it, without NCCL's own."""
        with self.current():
            return int(self._xp.get_default_memory_pool().total_bytes())

    def has_happened(self, event: Any) -> bool:
        """Whether an event has happened.

        Raises:
            GpuError: If the GPU has failed, after which no event happens any more.
        """
        # CuPy's `Event.done` is false then, too.
        status = self._xp.cuda.runtime.eventQuery(event.ptr)
        if status not in (_CUDA_SUCCESS, _CUDA_ERROR_NOT_READY):
            error = self._xp.cuda.runtime.CUDARuntimeError(status)
            where = f"GPU {self._device_id} of host {socket.gethostname()}"
            raise GpuError(
                f"{where} has failed ({error}); CUDA_LAUNCH_BLOCKING=1 shows in which call"
            ) from error
        return status == _CUDA_SUCCESS

    def location(self) -> tuple[str, str]:
        """See `Memory.location`."""
        return location_of_gpu(self._device_id)


class EventClock:
    """The time of a GPU: what it spends in each phase, without the host waiting for it.

    A stamp is an event on the stream that computes. What the GPU does in a phase lies between two
    of them, whenever the host has asked for it. See `smorms3_dist.phases.TimeSource`.

    Args:
        memory: The memory of the GPU.
    """

    waits = True

    def __init__(self, memory: CudaMemory) -> None:
        self._memory = memory

    def stamp(self) -> Any:
        """See `TimeSource.stamp`."""
        with self._memory.current():
            return self._memory.event(self._memory.current_stream(), timed=True)

    def has_happened(self, stamp: Any) -> bool:
        """See `TimeSource.has_happened`."""
        return self._memory.has_happened(stamp)

    def seconds(self, begin: Any, end: Any) -> float:
        """See `TimeSource.seconds`."""
        return self._memory.seconds_between(begin, end)

    def meet_host(self) -> tuple[Any, float]:
        """See `TimeSource.meet_host`."""
        stamp = self.stamp()
        stamp.synchronize()
        return stamp, time.perf_counter()


class GpuError(RuntimeError):
    """A GPU that has failed, until the process ends."""


_MORE_RANKS = (
    "Every rank holds all parameters and 1/N of the optimizer's states: start more ranks on more "
    "memory, or make the model or its batches smaller"
)

# CUDA's numbers; CuPy gives them no names.
_CUDA_SUCCESS, _CUDA_ERROR_MEMORY_ALLOCATION, _CUDA_ERROR_NOT_READY = 0, 2, 600


def _out_of_memory(
    where: str, nbytes: int, what: str, free: int | None, remedy: str, error: Exception
) -> MemoryError:
    known = "" if free is None else f" ({free:,} are free)"
    reason = str(error).rstrip(".")
    return MemoryError(f"{where} has no {nbytes:,} bytes for {what}{known}: {reason}. {remedy}")


def _out_of_host_memory(nbytes: int, what: str, remedy: str, error: Exception) -> MemoryError:
    free = None
    # Where the system tells what processes could still take.
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return _out_of_memory(f"host {socket.gethostname()}", nbytes, what, free, remedy, error)


def location_of_gpu(device_id: int) -> tuple[str, str]:
    """See `Memory.location`."""
    import cupy

    return running_host(), str(cupy.cuda.runtime.deviceGetPCIBusId(device_id))


def running_host() -> str:
    """The same for processes on one host, until it is started again.

    By its name, which two hosts may share, and what Linux drew when it was started, which
    containers on one host share.
    """
    try:
        started = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        started = ""
    return f"{socket.gethostname()} {started}"


def assign(target: Any, values: Any) -> None:
    """Overwrites a contiguous array, wherever it is, with values that may be in host memory."""
    if isinstance(values, np.ndarray) and hasattr(target, "set") and not hasattr(values, "get"):
        target.set(np.ascontiguousarray(values, target.dtype).reshape(target.shape))
    else:
        target[...] = values


def memory_of(device: Any, exact: bool = False) -> Memory:
    """The memory of a Chainer device.

    Kernels on a GPU that are to be exact give the results of a CPU bit for bit.

    Raises:
        RuntimeError: If the GPU cannot be used, or is too old.
    """
    # Not at the top: a plan asks for sizes of memory without Chainer.
    from chainer.backends.cuda import GpuDevice

    return _cuda_memory(device.device.id, exact) if isinstance(device, GpuDevice) else HostMemory()


@functools.cache
def _cuda_memory(device_id: int, exact: bool) -> CudaMemory:
    from smorms3_dist.kernels.cuda import CupyLauncher

    import cupy

    with cupy.cuda.Device(device_id):
        return CudaMemory(device_id, cupy, CupyLauncher(exact), exact)
