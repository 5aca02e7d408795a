"""As much of CuPy, in host memory, as the collectives over NCCL use: ranks are threads.

Pointers are real, and NCCL's operations work on what they point to: a wrong offset or count gives
wrong values here, too. Streams and events do everything at once.
"""

from __future__ import annotations

import ctypes
import threading
import types
import uuid
from typing import Any

import numpy as np


class _Memory:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class DeviceArray(np.ndarray):
    """An array that has a pointer where CuPy's have it."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return _Memory(self.ctypes.data)

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            return np.array(self)
        assert type(out) is np.ndarray, "not host memory"
        assert out.flags.c_contiguous
        out[...] = self
        return out

    def set(self, array: np.ndarray) -> None:
        assert type(array) is np.ndarray, "not host memory"
        self[...] = array


class Stream:
    """A stream that waits for nothing."""

    ptr = 0

    def __init__(self, non_blocking: bool = False) -> None:
        self.waited: list[Event] = []

    def wait_event(self, event: Event) -> None:
        assert event.recorded, "nobody records this event"
        self.waited.append(event)


class Event:
    """An event that has happened as soon as it is recorded, unless the test says otherwise."""

    stuck = False

    def __init__(self, disable_timing: bool = False) -> None:
        self.recorded = False

    def record(self, stream: Stream) -> None:
        self.recorded = True

    @property
    def done(self) -> bool:
        return not self.stuck


_TYPES = {0: np.int8, 6: np.float16, 7: np.float32, 8: np.float64}


def _at(ptr: int, count: int, dtype: Any) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(ptr), dtype)


class _World:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.shown: list[Any] = [None] * size


class NcclCommunicator:
    """NCCL's collectives between threads, by pointer."""

    worlds: dict[bytes, _World] = {}  # noqa: RUF012

    def __init__(self, size: int, unique: bytes, rank: int) -> None:
        self.rank = rank
        self.world = self.worlds.setdefault(unique, _World(size))
        self.size = size
        self.error = 0
        self.aborted = False

    def _meet(self, value: Any) -> list[Any]:
        self.world.shown[self.rank] = value
        self.world.barrier.wait()
        shown = list(self.world.shown)
        self.world.barrier.wait()
        return shown

    def reduceScatter(
        self, send: int, receive: int, count: int, kind: int, op: int, stream: int
    ) -> None:
        assert op == 0
        mine = _at(send, count * self.size, _TYPES[kind])
        inputs = [given.copy() for given in self._meet(mine)]
        with np.errstate(all="ignore"):
            total = inputs[0]
            for other in inputs[1:]:
                total = total + other
        _at(receive, count, _TYPES[kind])[...] = total[self.rank * count :][:count]
        self.world.barrier.wait()

    def allGather(self, send: int, receive: int, count: int, kind: int, stream: int) -> None:
        parts = [part.copy() for part in self._meet(_at(send, count, _TYPES[kind]))]
        self.world.barrier.wait()
        _at(receive, count * self.size, _TYPES[kind])[...] = np.concatenate(parts)
        self.world.barrier.wait()

    def bcast(self, ptr: int, count: int, kind: int, root: int, stream: int) -> None:
        values = self._meet(_at(ptr, count, _TYPES[kind]))[root].copy()
        self.world.barrier.wait()
        _at(ptr, count, _TYPES[kind])[...] = values
        self.world.barrier.wait()

    def check_async_error(self) -> int:
        return self.error

    def abort(self) -> None:
        self.aborted = True


def module() -> Any:
    """The module ``cupy``."""
    cupy = types.ModuleType("cupy")
    nccl = types.SimpleNamespace(
        NCCL_SUM=0,
        NCCL_CHAR=0,
        NCCL_FLOAT16=6,
        NCCL_FLOAT32=7,
        NCCL_FLOAT64=8,
        NcclCommunicator=NcclCommunicator,
        get_unique_id=lambda: uuid.uuid4().bytes,
        groupStart=lambda: None,
        groupEnd=lambda: None,
    )
    main = Stream()
    cupy.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        nccl=nccl, Stream=Stream, Event=Event, get_current_stream=lambda: main
    )
    for name in ("zeros", "empty"):
        make = getattr(np, name)
        setattr(cupy, name, lambda size, dtype, make=make: make(size, dtype).view(DeviceArray))
    return cupy
