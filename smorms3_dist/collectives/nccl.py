"""Collectives over NCCL, on the memory of GPUs.

Buckets, not pieces: each is packed by one kernel, reduce-scattered on a stream of its own while the
one before it is consumed on the stream of the update, and gathered in place. Two buckets are
all the memory that it takes (and a part of one, where they are sent in another dtype), allocated
once for all optimizers of a communicator, which use them in turn.

What is small, or lies in host memory (flags, objects), goes over the host's collectives. A rank
that dies leaves NCCL's operations of the others waiting for ever: so each reduce-scatter first
waits for that of the step before, with a limit, asks CUDA and NCCL for errors, and fails by an
exception if there are any. What is reduced during the backward pass is in
`smorms3_dist.collectives.nccl_early`, what is gathered beside the forward pass in `nccl_gather`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from smorms3_dist.collectives.base import (
    Collectives,
    Consume,
    DeviceCollectives,
    EarlyChannel,
    GatherChannel,
    Gradients,
    SideChannel,
)
from smorms3_dist.collectives.beside import OnStream
from smorms3_dist.collectives.narrowing import check_dtype
from smorms3_dist.collectives.nccl_buckets import Buckets, type_of
from smorms3_dist.collectives.nccl_early import NcclEarlyChannel
from smorms3_dist.collectives.nccl_gather import NcclGatherChannel, launch_all_gather
from smorms3_dist.collectives.nccl_waiting import BoundedWait
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.layout import Bucket, GroupLayout

import numpy as np


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
        self._communication_dtype = communication_dtype
        self._bounded = BoundedWait(host.rank, memory, timeout_s)
        self._memory = memory
        key = "NCCL", memory.location()
        self._link: _Link = host.shared.get(key) or _Link(memory)
        host.shared[key] = self._link
        self._link.comm = nccl_comm or self._link.comm
        self._stream = self._link.stream
        # The last reduce-scatter of each group.
        self._reduced: weakref.WeakKeyDictionary[GroupLayout, Any] = weakref.WeakKeyDictionary()
        # One is packed while another is reduced.
        self._buckets = Buckets(
            *(memory, host.rank, host.size, communication_dtype, self._shared_buffer), turns=2
        )

    def prepare(self, group: GroupLayout) -> None:
        """See `Collectives.prepare`."""
        self._buckets.prepare(group)

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `Collectives.reduce_scatter`; each bucket is under way while the last is consumed."""
        self._await_last(group)
        comm = self._communicator()
        buckets, compute = self._buckets, self._memory.current_stream()
        # Another optimizer may have used the buffers last, on another stream.
        if self._link.used_up is not None:
            compute.wait_event(self._link.used_up)

        def consume_part(index: int, part: Any, done: Any) -> None:
            compute.wait_event(done)
            consume(group.piece_of_bucket(self.rank, index), buckets.mean(group, part))

        previous: tuple[int, Any, Any] | None = None
        for index, bucket in enumerate(group.buckets):
            packed = buckets.memory_of(group, index)[: bucket.size]
            # In the order of the compute stream after what was consumed of these buffers before.
            gradients.pack_bucket(bucket, packed, buckets.scale_before(group))
            self._stream.wait_event(self._memory.event(compute))
            part = buckets.reduce(comm, bucket, packed, self._stream)
            done = self._memory.event(self._stream)
            if previous is not None:
                consume_part(*previous)
            previous = index, part, done
        if previous is not None:
            consume_part(*previous)
        self._link.used_up = self._memory.event(compute)
        self._reduced[group] = self._memory.event(self._stream)
        self._count_of(group)

    def _count_of(self, group: GroupLayout) -> None:
        self._count_reduce_scatter(group, self._buckets.sent_dtype(group).itemsize)

    def open_side_channel(self) -> SideChannel:
        """See `Collectives.open_side_channel`."""
        return OnStream(self, self._memory)

    def why_not_beside(self) -> str | None:
        """See `Collectives.why_not_beside`."""
        return None

    def open_early_channel(self) -> EarlyChannel:
        """See `Collectives.open_early_channel`."""
        return NcclEarlyChannel(
            *(self, self._memory, self._new_communicator(), self._bounded),
            self._communication_dtype,
            self._count_of,
        )

    def why_no_gather_channel(self) -> str | None:
        """See `Collectives.why_no_gather_channel`."""
        return None

    def open_gather_channel(self) -> GatherChannel:
        """See `Collectives.open_gather_channel`."""
        return NcclGatherChannel(self, self._memory, self._new_communicator(), self._bounded)

    def all_gather(self, flat: Any, buckets: Sequence[Bucket]) -> None:
        """See `Collectives.all_gather`."""
        with self._between() as comm:
            self._nccl.groupStart()
            for bucket in buckets:
                self.bytes_sent["all_gather"] += launch_all_gather(
                    comm, self.rank, flat, bucket, self._stream
                )
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
                type_of(self._nccl, numbers.dtype),
                self._nccl.NCCL_SUM,
                self._stream.ptr,
            )

    def await_device(self, mark: Any = None) -> None:
        """See `Collectives.await_device`."""
        if self._link.comm is not None:
            self._bounded.wait_for(mark or self._memory.mark(), self._link.comm)

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
            link.comm = self._new_communicator()
        return link.comm

    def _new_communicator(self) -> Any:
        unique = self._nccl.get_unique_id() if self.rank == 0 else None
        unique = self._host.all_gather_object(unique)[0]
        return self._nccl.NcclCommunicator(self.size, unique, self.rank)

    def _shared_buffer(self, kind: str, which: int, size: int, dtype: np.dtype) -> Any:
        return self._link.buffer(self._memory, kind, which, size, dtype)

    def _await_last(self, group: GroupLayout) -> None:
        """Waits until a group's gradients of the last step were reduced.

        Not for those of other groups: in this step they may have to wait for all of backward.

        Raises:
            NcclError: If the GPU or NCCL reports an error, or they are not reduced in time.
        """
        reduced = self._reduced.get(group)
        if reduced is not None:
            self._bounded.wait_for(reduced, self._link.comm)
