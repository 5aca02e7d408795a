"""Buckets of gradients over NCCL: what they are sent as, their memory, and the reduction of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.narrow import BFLOAT16, SENT_AS
from smorms3_dist.kernels.tables import PackedPart, PackTable, name_of_pack
from smorms3_dist.layout import Bucket, GroupLayout

import numpy as np

MAX_RANKS_IN_FLOAT16 = 8
"""NCCL sums float16 in float16, and rounds once a rank: gradients of 1e-5 on 64 ranks come out with
a relative error of 0.11, where a sum in float32 has 0.014. With more ranks float32 is sent."""


class Buckets:
    """The buckets that one rank brings and receives, one after the other.

    Args:
        memory: Of the GPU.
        rank: This rank.
        size: World size.
        communication_dtype: What gradients are sent as; ``None`` for their own dtype.
        allocate: ``allocate(kind, which, size, dtype)`` gives memory.
        turns: How many of them have memory of their own at a time.
    """

    def __init__(
        self,
        memory: CudaMemory,
        rank: int,
        size: int,
        communication_dtype: str | None,
        allocate: Callable[[str, int, int, np.dtype], Any],
        turns: int,
    ) -> None:
        import cupy

        self._nccl = cupy.cuda.nccl
        self._memory = memory
        self._rank = rank
        self._size = size
        self._dtype = None if communication_dtype is None else SENT_AS[communication_dtype]
        self._allocate = allocate
        self._turns = turns
        self._buffers: dict[tuple[str, int, np.dtype], Any] = {}
        # By size.
        self._casts: dict[int, PackTable] = {}

    def prepare(self, group: GroupLayout) -> None:
        """Loads the kernels and allocates the memory of a group; a single rank rarely needs it."""
        sent = self.sent_dtype(group)
        for dtype in {sent, group.dtype}:
            self._memory.launcher.load(name_of_pack(dtype))
        if self._size == 1:
            return
        for index in range(len(group.buckets)):
            self.memory_of(group, index)
        if sent != group.dtype:
            self._received(group)

    def sent_dtype(self, group: GroupLayout) -> np.dtype:
        """What the gradients of a group are sent as."""
        if self._dtype is not None:
            return self._dtype
        many = self._size > MAX_RANKS_IN_FLOAT16
        return np.dtype(np.float32) if many and group.dtype == np.float16 else group.dtype

    def memory_of(self, group: GroupLayout, index: int) -> Any:
        """The memory that a bucket is packed into."""
        largest = max(bucket.part_size for bucket in group.buckets)
        sent = self.sent_dtype(group)
        return self._buffer("packed", index % self._turns, largest * self._size, sent)

    def scale_before(self, group: GroupLayout) -> float:
        """What gradients are multiplied by before they are sent."""
        return 1.0 / self._size if self._divides_before(group) else 1.0

    def reduce(self, comm: Any, bucket: Bucket, packed: Any, stream: Any) -> Any:
        """Sums a bucket over the ranks, on a stream; gives the part of the sum that is this rank's.

        In place: where the own part was packed, its sum comes to be. Collective.
        """
        part = packed[self._rank * bucket.part_size :][: bucket.part_size]
        comm.reduceScatter(
            packed.data.ptr,
            part.data.ptr,
            bucket.part_size,
            type_of(self._nccl, packed.dtype),
            self._nccl.NCCL_SUM,
            stream.ptr,
        )
        return part

    def mean(self, group: GroupLayout, part: Any) -> Mean:
        """The mean that is made of a part, in the group's dtype; valid until the next one."""
        scale = 1.0 if self._divides_before(group) else 1.0 / self._size
        return Mean(self._in_own_dtype(group, part), None, scale)

    def _divides_before(self, group: GroupLayout) -> bool:
        """Of what is or becomes float16, a sum may be out of range, where a mean is not."""
        return np.float16 in (self.sent_dtype(group), group.dtype)

    def _in_own_dtype(self, group: GroupLayout, part: Any) -> Any:
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
            buffer = self._buffers[key] = self._allocate(kind, which, size, dtype)
        return buffer


def type_of(nccl: Any, dtype: np.dtype) -> int:
    """NCCL's number for a dtype."""
    names = {"f2": "FLOAT16", "f4": "FLOAT32", "f8": "FLOAT64", BFLOAT16.str[1:]: "BFLOAT16"}
    return int(getattr(nccl, f"NCCL_{names[np.dtype(dtype).str[1:]]}"))
