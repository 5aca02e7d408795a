"""As much of NCCL, as CuPy has it, as the collectives on GPUs use: ranks are threads.

Operations work on what pointers point to: a wrong offset or count gives wrong values here, too.
They happen when the work of their stream is done, which is as late as it may be, and after all that
was to be done before on the streams of all ranks: without a wait they read too soon, or are read
too soon.
"""

from __future__ import annotations

import collections
import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import fake_streams
import numpy as np
from kernel_checks import bfloat16, of_bfloat16

# bfloat16 is passed on as its bits.
_TYPES = {0: np.int8, 6: np.float16, 7: np.float32, 8: np.float64, 9: np.uint16}
# CuPy has no words for the newest statuses, and looks for them.
_WORDS = {1: "unhandled cuda error", 2: "unhandled system error", 3: "internal error",
          4: "invalid argument", 5: "invalid usage", 6: "remote process exited"}  # fmt: skip


class NcclError(RuntimeError):
    """As CuPy's: for a status that it does not know it cannot be made."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"NCCL_ERROR_{status}: {_WORDS[status]}")


def _at(ptr: int, count: int, dtype: Any) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(ptr), dtype)


class _Operation:
    """One collective of all ranks of a world."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._sent: dict[int, np.ndarray] = {}
        # By rank: its stream, and how much of its work is done when the operation is.
        self.streams: dict[int, tuple[Any, int]] = {}

    def run(self, rank: int, take: Callable[[], Any], put: Callable[[Sequence[Any]], None]) -> None:
        """A rank's part; ends when all ranks have come."""
        with fake_streams.changed:
            self._sent[rank] = take()
            fake_streams.changed.notify_all()
            while len(self._sent) < self._size:
                for other, (stream, given) in list(self.streams.items()):
                    if other not in self._sent and not stream.is_at_work:
                        stream.do_until(given)
                        break
                else:
                    fake_streams.wait_for_change("NCCL waits for a rank")
            put([self._sent[other] for other in range(self._size)])


class NcclCommunicator:
    """NCCL's collectives between threads, by pointer."""

    worlds: dict[bytes, dict[int, _Operation]] = collections.defaultdict(dict)  # noqa: RUF012

    def __init__(
        self, size: int, unique: bytes, rank: int, current_gpu: Callable[[], int] = lambda: 0
    ) -> None:
        self._current_gpu = current_gpu
        self._gpu = current_gpu()
        self._operations = self.worlds[unique]
        self._count = 0
        self.rank = rank
        self.size = size
        self.error = 0
        self.aborted = False

    def _start(
        self, pointer: int, take: Callable[[], Any], put: Callable[[Sequence[Any]], None]
    ) -> None:
        assert self._current_gpu() == self._gpu, "another GPU is the current one"
        stream = fake_streams.stream_at(pointer)
        with fake_streams.changed:
            operation = self._operations.setdefault(self._count, _Operation(self.size))
            if stream.late:
                operation.streams[self.rank] = stream, stream.given + 1
            self._count += 1
            stream.do(lambda: operation.run(self.rank, take, put))

    def reduceScatter(
        self, send: int, receive: int, count: int, kind: int, op: int, stream: int
    ) -> None:
        assert op == 0

        def add(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            if kind != 9:
                return first + second
            return bfloat16(of_bfloat16(first) + of_bfloat16(second))

        def put(parts: Sequence[np.ndarray]) -> None:
            with np.errstate(all="ignore"):
                total = functools.reduce(add, parts)
            _at(receive, count, _TYPES[kind])[...] = total[self.rank * count :][:count]

        self._start(stream, lambda: _at(send, count * self.size, _TYPES[kind]).copy(), put)

    def allGather(self, send: int, receive: int, count: int, kind: int, stream: int) -> None:
        def put(parts: Sequence[np.ndarray]) -> None:
            _at(receive, count * self.size, _TYPES[kind])[...] = np.concatenate(parts)

        self._start(stream, lambda: _at(send, count, _TYPES[kind]).copy(), put)

    def allReduce(
        self, send: int, receive: int, count: int, kind: int, op: int, stream: int
    ) -> None:
        assert op == 0

        def put(parts: Sequence[np.ndarray]) -> None:
            with np.errstate(all="ignore"):
                _at(receive, count, _TYPES[kind])[...] = sum(parts)

        self._start(stream, lambda: _at(send, count, _TYPES[kind]).copy(), put)

    def bcast(self, ptr: int, count: int, kind: int, root: int, stream: int) -> None:
        def put(parts: Sequence[np.ndarray]) -> None:
            _at(ptr, count, _TYPES[kind])[...] = parts[root]

        self._start(stream, lambda: _at(ptr, count, _TYPES[kind]).copy(), put)

    def check_async_error(self) -> None:
        if self.error:
            raise NcclError(self.error)

    def abort(self) -> None:
        self.aborted = True
