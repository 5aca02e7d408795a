"""As much of CuPy, in host memory, as the collectives on GPUs use: ranks are threads.

Pointers are real, and NCCL's operations work on what they point to: a wrong offset or count gives
wrong values here, too; they do everything at once.

Streams that are made here are as late as they may be. What they are given (copies, assignments to
arrays, arithmetic into an array) happens when somebody waits for it, on the host or on another
stream: without the wait, or in memory that was used again too soon, it gives wrong values. CuPy's
own stream, which is the current one unless a test says otherwise, does everything at once.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import threading
import types
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import rank_threads
from kernel_checks import bfloat16, of_bfloat16

STRICT = False
"""Whether assignments to device memory never take arrays in host memory, as with CuPy. Some tests
make parameters in host memory and let the package put them on the GPU."""


class PinnedMemory(bytearray):
    """Page-locked memory: what asynchronous copies need."""


def is_pinned(array: np.ndarray) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, PinnedMemory)


class DeviceArray(np.ndarray):
    """An array that has a pointer where CuPy's have it, and obeys the current stream."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self.ctypes.data, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": data, "version": 3}

    def get(
        self, stream: Stream | None = None, out: np.ndarray | None = None, blocking: bool = True
    ) -> np.ndarray:
        if out is None:
            out = np.empty(self.shape, self.dtype)
        _check_host_array(out, self)
        source = _plain(self)
        stream = _current() if stream is None else stream
        if not blocking:
            assert is_pinned(out), "the copy would not be asynchronous"
        stream.do(lambda: np.copyto(out, source))
        if blocking:
            stream.synchronize()
        return out

    def set(self, array: np.ndarray, stream: Stream | None = None) -> None:
        _check_host_array(array, self)
        # Memory that is not pinned is read before the call returns.
        source = array if is_pinned(array) else array.copy()
        target = _plain(self)
        (_current() if stream is None else stream).do(lambda: np.copyto(target, source))

    def __setitem__(self, key: Any, value: Any) -> None:
        target = _plain(self)
        if isinstance(value, np.ndarray):
            strict = STRICT or _current().late
            assert isinstance(value, DeviceArray) or not strict, "not device memory"
            value = _plain(value)

        def assign() -> None:
            target[key] = value

        _current().do(assign)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        given = options.pop("out", ())
        plain = [_plain(value) for value in inputs]
        if given:
            options["out"] = tuple(map(_plain, given))

        def compute() -> Any:
            return getattr(ufunc, method)(*plain, **options)

        stream = _current()
        if not given and not stream.late:
            result = compute()
            return result.view(DeviceArray) if isinstance(result, np.ndarray) else result
        assert given, "what is not computed yet cannot be returned"
        for value in (*inputs, *given):
            host = isinstance(value, np.ndarray) and not isinstance(value, DeviceArray)
            assert not (stream.late and host), "not device memory"
        stream.do(compute)
        return given[0]


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, DeviceArray) else value


def _check_host_array(host: np.ndarray, device: np.ndarray) -> None:
    assert type(host) is np.ndarray, "not host memory"
    assert host.flags.c_contiguous and device.flags.c_contiguous
    assert host.shape == device.shape and host.dtype == device.dtype


_streams = threading.local()
_working = threading.RLock()


def _current() -> Stream:
    return getattr(_streams, "stack", [main])[-1]


class Stream:
    """A stream that does what it is given as late as it may."""

    ptr = 0
    late = True

    def __init__(self, non_blocking: bool = False) -> None:
        self._queue: collections.deque[Callable[[], Any]] = collections.deque()
        self._done = 0

    def __enter__(self) -> Stream:
        _streams.stack = [*getattr(_streams, "stack", [main]), self]
        return self

    def __exit__(self, *_: Any) -> None:
        _streams.stack = _streams.stack[:-1]

    def do(self, work: Callable[[], Any]) -> None:
        with _working:
            self._queue.append(work)

    @property
    def given(self) -> int:
        """How many things it has been given so far."""
        with _working:
            return self._done + len(self._queue)

    def do_until(self, given: int) -> None:
        """Does the first so many of the things that it was given."""
        with _working, np.errstate(all="ignore"):
            while self._done < given:
                self._queue[0]()
                self._queue.popleft()
                self._done += 1

    def synchronize(self) -> None:
        self.do_until(self.given)

    def wait_event(self, event: Event) -> None:
        stream, given = event.recorded()
        self.do(lambda: stream.do_until(given))


class _Main(Stream):
    """A stream that does everything at once."""

    late = False

    def do(self, work: Callable[[], Any]) -> None:
        work()


main = _Main()


class Event:
    """An event that has happened as soon as anybody asks, unless the test says otherwise."""

    stuck = False

    def __init__(self, disable_timing: bool = False) -> None:
        self._recorded: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        self._recorded = stream, stream.given

    def recorded(self) -> tuple[Stream, int]:
        assert self._recorded is not None, "nobody records this event"
        return self._recorded

    def synchronize(self) -> None:
        stream, given = self.recorded()
        stream.do_until(given)

    @property
    def done(self) -> bool:
        if not self.stuck:
            self.synchronize()
        return not self.stuck


# bfloat16 is passed on as its bits.
_TYPES = {0: np.int8, 6: np.float16, 7: np.float32, 8: np.float64, 9: np.uint16}


def _at(ptr: int, count: int, dtype: Any) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(ptr), dtype)


class NcclCommunicator:
    """NCCL's collectives between threads, by pointer."""

    worlds: dict[bytes, rank_threads.Meeting] = {}  # noqa: RUF012

    def __init__(self, size: int, unique: bytes, rank: int) -> None:
        meeting = self.worlds.setdefault(unique, rank_threads.Meeting(size, 30))
        self._ranks = rank_threads.ThreadCollectives(rank, meeting)
        self.rank = rank
        self.size = size
        self.error = 0
        self.aborted = False

    def _copies(self, ptr: int, count: int, kind: int) -> list[np.ndarray]:
        """What lies there on all ranks, before any of them overwrites it."""
        return self._ranks.all_gather_object(_at(ptr, count, _TYPES[kind]).copy())

    def reduceScatter(
        self, send: int, receive: int, count: int, kind: int, op: int, stream: int
    ) -> None:
        assert op == 0

        def add(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            if kind != 9:
                return first + second
            return bfloat16(of_bfloat16(first) + of_bfloat16(second))

        with np.errstate(all="ignore"):
            total = functools.reduce(add, self._copies(send, count * self.size, kind))
        _at(receive, count, _TYPES[kind])[...] = total[self.rank * count :][:count]

    def allGather(self, send: int, receive: int, count: int, kind: int, stream: int) -> None:
        parts = self._copies(send, count, kind)
        _at(receive, count * self.size, _TYPES[kind])[...] = np.concatenate(parts)

    def allReduce(
        self, send: int, receive: int, count: int, kind: int, op: int, stream: int
    ) -> None:
        assert op == 0
        parts = self._copies(send, count, kind)
        with np.errstate(all="ignore"):
            _at(receive, count, _TYPES[kind])[...] = sum(parts)

    def bcast(self, ptr: int, count: int, kind: int, root: int, stream: int) -> None:
        _at(ptr, count, _TYPES[kind])[...] = self._copies(ptr, count, kind)[root]

    def check_async_error(self) -> int:
        return self.error

    def abort(self) -> None:
        self.aborted = True


class Device(contextlib.nullcontext):
    """A GPU; the only one."""

    id = 0
    compute_capability = "90"

    def __init__(self, number: int = 0) -> None:
        assert number == 0
        super().__init__(self)


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def alloc_pinned_memory(size: int) -> PinnedMemory:
    try:
        return PinnedMemory(size)
    except MemoryError:
        raise CUDARuntimeError(2) from None


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
        NcclCommunicator=NcclCommunicator,
        get_unique_id=lambda: uuid.uuid4().bytes,
        groupStart=lambda: None,
        groupEnd=lambda: None,
    )
    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        memGetInfo=lambda: (12345, 1 << 30),
        deviceGetPCIBusId=lambda number: f"0000:0{number}:00.0",
    )
    cupy.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        nccl=nccl,
        runtime=runtime,
        Device=Device,
        Stream=Stream,
        Event=Event,
        alloc_pinned_memory=alloc_pinned_memory,
        get_current_stream=_current,
    )
    for name in ("zeros", "empty"):
        make = getattr(np, name)
        setattr(cupy, name, lambda size, dtype, make=make: make(size, dtype).view(DeviceArray))
    return cupy
