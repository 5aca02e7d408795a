"""As much of CuPy, in host memory, as the collectives on GPUs use: ranks are threads.

Pointers are real. NCCL's operations are `fake_nccl`'s.

What arrays are told to do (copies, assignments, arithmetic into an array) the current stream does:
see `fake_streams`.
"""

from __future__ import annotations

import functools
import threading
import types
import uuid
from typing import Any, ClassVar

import fake_nccl
import fake_streams
import numpy as np
from fake_streams import current, keep_alive, main  # noqa: F401

STRICT = False
"""Whether assignments to device memory never take arrays in host memory, as with CuPy. Some tests
make parameters in host memory and let the package put them on the GPU."""


POOL_BYTES = 1 << 20
"""What its pool has of a GPU."""


class PinnedMemory(bytearray):
    """Page-locked memory: what asynchronous copies need."""

    def __init__(self, size: int) -> None:
        Device.used.add(Device.current())
        try:
            super().__init__(size)
        except MemoryError:
            raise CUDARuntimeError(2) from None


def is_pinned(array: np.ndarray) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, PinnedMemory)


class Device:
    """One of two GPUs. Every thread has a current one, 0 until it says otherwise."""

    compute_capability = "90"
    used: ClassVar[set[int]] = set()
    """Those on which anything was made, or whose stream somebody has asked for."""
    _own = threading.local()

    def __init__(self, number: int | None = None) -> None:
        self.id = self.current() if number is None else number
        assert self.id in (0, 1)

    @classmethod
    def current(cls) -> int:
        return getattr(cls._own, "stack", [0])[-1]

    def __enter__(self) -> Device:
        self._own.stack = [*getattr(self._own, "stack", [0]), self.id]
        return self

    def __exit__(self, *_: Any) -> None:
        self._own.stack = self._own.stack[:-1]


fake_streams.Stream.current_gpu = staticmethod(Device.current)


class DeviceArray(np.ndarray):
    """An array that has a pointer where CuPy's have it, and obeys the current stream.

    It is computed with where it is: CuPy refuses it elsewhere, or brings it there without a word.
    """

    def __array_finalize__(self, other: Any) -> None:
        self.device_id = getattr(other, "device_id", Device.current())

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data, mem=object())

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self.ctypes.data, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": data, "version": 3}

    def get(
        self,
        stream: fake_streams.Stream | None = None,
        out: np.ndarray | None = None,
        blocking: bool = True,
    ) -> np.ndarray:
        if out is None:
            out = np.empty(self.shape, self.dtype)
        _check_host_array(out, self)
        source = _plain(self)
        stream = current() if stream is None else stream
        if not blocking:
            assert is_pinned(out), "the copy would not be asynchronous"
        stream.do(lambda: np.copyto(out, source))
        if blocking:
            stream.synchronize()
        return out

    def set(self, array: np.ndarray, stream: fake_streams.Stream | None = None) -> None:
        _check_host_array(array, self)
        # Memory that is not pinned is read before the call returns.
        source = array if is_pinned(array) else array.copy()
        target = _plain(self)
        (current() if stream is None else stream).do(lambda: np.copyto(target, source))

    def __setitem__(self, key: Any, value: Any) -> None:
        _check_device(self, value)
        target = _plain(self)
        if isinstance(value, np.ndarray):
            strict = STRICT or current().late
            assert isinstance(value, DeviceArray) or not strict, "not device memory"
            value = _plain(value)

        def assign() -> None:
            target[key] = value

        current().do(assign)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        given = options.pop("out", ())
        _check_device(*inputs, *given)
        plain = [_plain(value) for value in inputs]
        if given:
            options["out"] = tuple(map(_plain, given))

        def compute() -> Any:
            return getattr(ufunc, method)(*plain, **options)

        stream = current()
        if not given and not stream.late:
            result = compute()
            return result.view(DeviceArray) if isinstance(result, np.ndarray) else result
        assert given, "what is not computed yet cannot be returned"
        for value in (*inputs, *given):
            host = isinstance(value, np.ndarray) and not isinstance(value, DeviceArray)
            assert not (stream.late and host), "not device memory"
        stream.do(compute)
        return given[0]


def apart(shape: Any, dtype: Any, memptr: tuple[Any, int]) -> DeviceArray:
    """An array in memory that belongs to another one; views of it refer to it, as with CuPy."""
    memory, offset = memptr
    assert (memory.pointer, offset) == (memory.owner.ctypes.data, 0)
    array = np.asarray(memoryview(memory.owner)).view(DeviceArray)
    assert (array.shape, array.dtype) == (shape, dtype)
    array.device_id = memory.device_id
    return array


def _check_device(*values: Any) -> None:
    for value in values:
        if isinstance(value, DeviceArray):
            assert value.device_id == Device.current(), "on another GPU than the current one"


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, DeviceArray) else value


def _check_host_array(host: np.ndarray, device: np.ndarray) -> None:
    assert type(host) is np.ndarray, "not host memory"
    assert host.flags.c_contiguous and device.flags.c_contiguous
    assert host.shape == device.shape and host.dtype == device.dtype


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def _current_stream() -> fake_streams.Stream:
    Device.used.add(Device.current())
    return current()


class Random:
    """As much of ``cupy.random``: a generator for each GPU, the same for all ranks."""

    def __init__(self) -> None:
        self._generators = [np.random.RandomState(number) for number in (0, 1)]

    def seed(self, seed: int) -> None:
        Device.used.add(Device.current())
        self._generators[Device.current()].seed(seed)

    def randint(self, low: int, high: int) -> int:
        Device.used.add(Device.current())
        return int(self._generators[Device.current()].randint(low, high))


def alloc_pinned_memory(size: int) -> PinnedMemory:
    """Out of CuPy's pool, which keeps powers of two for ever."""
    return PinnedMemory(1 << (size - 1).bit_length())


def _on_current_gpu(size: int, unique: bytes, rank: int) -> fake_nccl.NcclCommunicator:
    """Makes a communicator of NCCL, which is for the GPU that is current."""
    return fake_nccl.NcclCommunicator(size, unique, rank, Device.current)


def module() -> Any:
    """The module ``cupy``."""
    cupy = types.ModuleType("cupy")
    nccl = types.SimpleNamespace(
        available=True,
        NCCL_SUM=0,
        NCCL_CHAR=0,
        NCCL_FLOAT16=6,
        NCCL_BFLOAT16=9,
        NCCL_FLOAT32=7,
        NCCL_FLOAT64=8,
        NcclCommunicator=_on_current_gpu,
        NcclError=fake_nccl.NcclError,
        get_unique_id=lambda: uuid.uuid4().bytes,
        groupStart=lambda: None,
        groupEnd=lambda: None,
    )
    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        memGetInfo=lambda: (12345, 1 << 30),
        eventQuery=fake_streams.event_query,
        getDeviceCount=lambda: 2,
        deviceGetPCIBusId=lambda number: f"0000:0{number}:00.0",
    )
    cupy.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        nccl=nccl,
        runtime=runtime,
        Device=Device,
        Stream=fake_streams.Stream,
        Event=fake_streams.Event,
        UnownedMemory=lambda pointer, size, owner, device_id: types.SimpleNamespace(
            pointer=pointer, owner=owner, device_id=device_id
        ),
        MemoryPointer=lambda memory, offset: (memory, offset),
        PinnedMemory=PinnedMemory,
        PinnedMemoryPointer=lambda memory, offset: memory,
        alloc_pinned_memory=alloc_pinned_memory,
        get_current_stream=_current_stream,
        get_elapsed_time=fake_streams.elapsed_time,
    )
    cupy.ndarray = apart  # type: ignore[attr-defined]
    cupy.random = Random()  # type: ignore[attr-defined]
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(  # type: ignore[attr-defined]
        total_bytes=lambda: POOL_BYTES
    )

    def allocate(make: Any, size: int, dtype: Any) -> Any:
        Device.used.add(Device.current())
        return keep_alive(make(size, dtype).view(DeviceArray))

    for name in ("zeros", "empty"):
        setattr(cupy, name, functools.partial(allocate, getattr(np, name)))
    return cupy
