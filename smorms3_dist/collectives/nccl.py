"""Collectives over NCCL, on the memory of GPUs.

Buckets, not pieces: each is packed by one kernel, reduce-scattered on a stream of its own while the
one before it is consumed on the stream of the update, and gathered in place. Two buckets are
all the memory that it takes (and a part of one, where they are sent in another dtype), allocated
once for all optimizers of a communicator, which use them in turn.

What is small, or lies in host memory (flags, objects), goes over the host's collectives. A rank
that dies leaves NCCL's operations of the others waiting for ever: so each reduce-scatter first
waits for that of the step before, with a limit, asks CUDA and NCCL for errors, and fails by an
exception if there are any.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from smorms3_dist.collectives.base import (
    Collectives,
    Consume,
    DeviceCollectives,
    Gradients,
    SideChannel,
)
from smorms3_dist.collectives.beside import OnStream
from smorms3_dist.collectives.narrowing import check_dtype
from smorms3_dist.device.memory import CudaMemory, GpuError
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.narrow import BFLOAT16, SENT_AS
from smorms3_dist.kernels.tables import PackedPart, PackTable, name_of_pack
from smorms3_dist.layout import Bucket, GroupLayout

import numpy as np

ABORT_LIMIT_S = 10.0
"""Seconds that NCCL may take to give up a communicator; an abort can itself hang."""

MAX_RANKS_IN_FLOAT16 = 8
"""NCCL sums float16 in float16, and rounds once a rank: gradients of 1e-5 on 64 ranks come out with
a relative error of 0.11, where a sum in float32 has 0.014. With more ranks float32 is sent."""

_POLL_S = 0.0005
_NCCL_IN_PROGRESS = 7


class NcclError(RuntimeError):
    """A collective that failed, or did not end in time."""


class _Link:
    """What all optimizers of a communicator share on their GPUs.

    Attributes:
        comm: NCCL's communicator, once there is one.
        stream: For the collectives.
        used_up: What a stream that is going to write to buffers waits for, once there is something.
    """

    def __init__(self, memory: CudaMemory) -> None:
        self.comm: Any = None
        self.stream = memory.stream()
        self.used_up: Any = None
        # Their owners are the collectives that have asked for them.
        self._buffers: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()

    def buffer(self, memory: CudaMemory, kind: str, which: int, size: int, dtype: np.dtype) -> Any:
        """Device memory of at least so many elements, the same for all who ask for it."""
        key = (kind, which, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            what = f"a bucket of gradients in {dtype} ({kind})"
            buffer = self._buffers[key] = memory.zeros(size, dtype, what)
        return buffer


class NcclCollectives(DeviceCollectives):
    """Collectives over NCCL.

    The NCCL communicator is made at the first collective on GPU memory, on the device that is
    current then, unless one of the same ranks is given. Gradients are sent in the communication
    dtype, if there is one: what is sent as float16 is divided by the world size before, so that a
    mean in range stays in range; bfloat16 has the range of float32. The collectives of a step may
    take ``timeout_s`` seconds after the host has waited for them.

    Raises:
        ValueError: If the communication dtype is not supported.
        RuntimeError: If CuPy, NCCL or a GPU is missing.
    """

    def __init__(
        self,
        host: Collectives,
        memory: CudaMemory,
        communication_dtype: str | None = None,
        timeout_s: float = 600.0,
        nccl_comm: Any = None,
    ) -> None:
        super().__init__(host)
        check_dtype("communication_dtype", communication_dtype)
        import cupy

        self._nccl = cupy.cuda.nccl
        self._dtype = None if communication_dtype is None else SENT_AS[communication_dtype]
        self._timeout_s = timeout_s
        self._memory = memory
        key = "NCCL", memory.location()
        self._link: _Link = host.shared.get(key) or _Link(memory)
        host.shared[key] = self._link
        self._link.comm = nccl_comm or self._link.comm
        self._stream = self._link.stream
        # The last reduce-scatter of each group.
        self._reduced: weakref.WeakKeyDictionary[GroupLayout, Any] = weakref.WeakKeyDictionary()
        self._buffers: dict[tuple[str, int, np.dtype], Any] = {}
        # By size.
        self._casts: dict[int, PackTable] = {}

    def prepare(self, group: GroupLayout) -> None:
        """See `Collectives.prepare`; a single rank rarely needs buckets."""
        sent = self._sent_dtype(group)
        for dtype in {sent, group.dtype}:
            self._memory.launcher.load(name_of_pack(dtype))
        if self.size == 1:
            return
        for index in range(len(group.buckets)):
            self._bucket_memory(group, index)
        if sent != group.dtype:
            self._received(group)

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `Collectives.reduce_scatter`; each bucket is under way while the last is consumed."""
        self._await_last(group)
        comm = self._communicator()
        compute = self._memory.current_stream()
        # Another optimizer may have used the buffers last, on another stream.
        if self._link.used_up is not None:
            compute.wait_event(self._link.used_up)
        dtype = self._sent_dtype(group)
        # Of what is or becomes float16, a sum may be out of range, where a mean is not.
        before, after = 1.0, 1.0 / self.size
        if np.float16 in (dtype, group.dtype):
            before, after = after, before

        def consume_part(index: int, part: Any, done: Any) -> None:
            compute.wait_event(done)
            mean = Mean(self._in_own_dtype(part, group), None, after)
            consume(group.piece_of_bucket(self.rank, index), mean)

        previous: tuple[int, Any, Any] | None = None
        for index, bucket in enumerate(group.buckets):
            packed = self._bucket_memory(group, index)[: bucket.size]
            # In place: where the own part was packed, its sum comes to be.
            part = packed[self.rank * bucket.part_size :][: bucket.part_size]
            # In the order of the compute stream after what was consumed of these buffers before.
            gradients.pack_bucket(bucket, packed, before)
            self._stream.wait_event(self._memory.event(compute))
            comm.reduceScatter(
                packed.data.ptr,
                part.data.ptr,
                bucket.part_size,
                self._type(dtype),
                self._nccl.NCCL_SUM,
                self._stream.ptr,
            )
            done = self._memory.event(self._stream)
            if previous is not None:
                consume_part(*previous)
            previous = index, part, done
        if previous is not None:
            consume_part(*previous)
        self._link.used_up = self._memory.event(compute)
        self._reduced[group] = self._memory.event(self._stream)
        self._count_reduce_scatter(group, dtype.itemsize)

    def open_side_channel(self) -> SideChannel:
        """See `Collectives.open_side_channel`."""
        return OnStream(self, self._memory)

    def all_gather(self, flat: Any, buckets: Sequence[Bucket]) -> None:
        """See `Collectives.all_gather`."""
        with self._between() as comm:
            self._nccl.groupStart()
            for bucket in buckets:
                comm.allGather(
                    flat[bucket.part_of(self.rank)].data.ptr,
                    flat[bucket.start_f :].data.ptr,
                    bucket.part_size,
                    self._type(flat.dtype),
                    self._stream.ptr,
                )
                self.bytes_sent["all_gather"] += bucket.part_size * flat.itemsize * (self.size - 1)
            self._nccl.groupEnd()

    def broadcast(self, array: Any, root: int = 0) -> None:
        """See `Collectives.broadcast`; also of arrays in host memory."""
        if not hasattr(array, "__cuda_array_interface__"):
            self._host.broadcast(array, root)
            return
        with self._between() as comm:
            # As bytes: nothing is computed, so that every dtype can be sent.
            comm.bcast(array.data.ptr, array.nbytes, self._nccl.NCCL_CHAR, root, self._stream.ptr)
        if self.rank == root:
            self.bytes_sent["broadcast"] += array.nbytes * (self.size - 1)

    def all_reduce_sum(self, numbers: Any) -> None:
        """See `DeviceCollectives.all_reduce_sum`; in NCCL's order."""
        with self._between() as comm:
            comm.allReduce(
                numbers.data.ptr,
                numbers.data.ptr,
                numbers.size,
                self._type(numbers.dtype),
                self._nccl.NCCL_SUM,
                self._stream.ptr,
            )

    @contextmanager
    def _between(self) -> Iterator[Any]:
        """Gives the communicator; orders its stream between what is computed before and after."""
        comm = self._communicator()
        compute = self._memory.current_stream()
        self._stream.wait_event(self._memory.event(compute))
        yield comm
        compute.wait_event(self._memory.event(self._stream))

    def _communicator(self) -> Any:
        link = self._link
        if link.comm is None:
            unique = self._nccl.get_unique_id() if self.rank == 0 else None
            unique = self._host.all_gather_object(unique)[0]
            link.comm = self._nccl.NcclCommunicator(self.size, unique, self.rank)
        return link.comm

    def _bucket_memory(self, group: GroupLayout, index: int) -> Any:
        """The memory that a bucket is packed into; two take turns."""
        largest = max(bucket.part_size for bucket in group.buckets)
        return self._buffer("packed", index % 2, largest * self.size, self._sent_dtype(group))

    def _sent_dtype(self, group: GroupLayout) -> np.dtype:
        if self._dtype is not None:
            return self._dtype
        many = self.size > MAX_RANKS_IN_FLOAT16
        return np.dtype(np.float32) if many and group.dtype == np.float16 else group.dtype

    def _in_own_dtype(self, part: Any, group: GroupLayout) -> Any:
        """What was sent in another dtype, in the gradients' own; valid until the next one."""
        if part.dtype == group.dtype:
            return part
        table = self._casts.get(part.size)
        if table is None:
            whole = [PackedPart(0, part.size, 0)]
            table = self._casts[part.size] = PackTable(self._memory.launcher, whole)
        wide = self._received(group)[: part.size]
        table.pack([part], wide)
        return wide

    def _received(self, group: GroupLayout) -> Any:
        largest = max(bucket.part_size for bucket in group.buckets)
        return self._buffer("received", 0, largest, group.dtype)

    def _buffer(self, kind: str, which: int, size: int, dtype: np.dtype) -> Any:
        key = (kind, which, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            buffer = self._link.buffer(self._memory, kind, which, size, dtype)
            self._buffers[key] = buffer
        return buffer

    def _type(self, dtype: np.dtype) -> int:
        names = {"f2": "FLOAT16", "f4": "FLOAT32", "f8": "FLOAT64", BFLOAT16.str[1:]: "BFLOAT16"}
        return int(getattr(self._nccl, f"NCCL_{names[np.dtype(dtype).str[1:]]}"))

    def _await_last(self, group: GroupLayout) -> None:
        """Waits until a group's gradients of the last step were reduced.

        Not for those of other groups: in this step they may have to wait for all of backward.

        Raises:
            NcclError: If the GPU or NCCL reports an error, or they are not reduced in time.
        """
        reduced = self._reduced.get(group)
        if reduced is None:
            return
        deadline = time.monotonic() + self._timeout_s
        try:
            while not self._memory.has_happened(reduced):
                self._check_for_error()
                if time.monotonic() > deadline:
                    raise self._given_up(
                        f"did not end within {self._timeout_s:g} s: another rank has died or is "
                        "elsewhere"
                    )
                time.sleep(_POLL_S)
        except GpuError as error:
            raise self._given_up(f"cannot end, since {error}") from error
        self._check_for_error()

    def _check_for_error(self) -> None:
        try:
            self._link.comm.check_async_error()
        except KeyError as error:
            # CuPy has no words for NCCL's newest statuses.
            status = error.args[0]
            if status != _NCCL_IN_PROGRESS:
                raise self._given_up(f"failed with NCCL's status {status}") from error
        except self._nccl.NcclError as error:
            raise self._given_up(f"failed: {error}") from error

    def _given_up(self, what: str) -> NcclError:
        """Gives the communicator up, in bounded time; tells of it."""
        thread = threading.Thread(target=self._link.comm.abort, daemon=True)
        thread.start()
        thread.join(ABORT_LIMIT_S)
        return NcclError(
            f"rank {self.rank}: a collective on the GPU {what}. The first rank that failed says "
            "why; NCCL_DEBUG=WARN shows NCCL's own messages"
        )
