"""Collectives on the memory of GPUs through host memory, for MPI libraries that know no CUDA.

Such a library must never see a device pointer. Each piece is copied to the host, exchanged there
and summed there; the mean goes back to the GPU. Sums are in the order of the ranks, as always on
the host, so results are those of the host's collectives bit for bit.

Copies run on two streams, one for each direction, from and to page-locked memory that is allocated
once: while the host exchanges one range, the next comes from the GPU and the one before it goes
back. Both streams start after what the current stream has been given, which in turn waits for what
they bring. The host waits for nothing but the range that it needs next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from smorms3_dist.collectives.base import Collectives, Consume, DeviceCollectives, Gradients
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import Bucket, GroupLayout, Piece

import numpy as np

CHUNK_BYTES = 1 << 24
"""What is gathered or broadcast at once; three of them are page-locked."""

# One comes from the GPU, one is exchanged, one goes back; or is still being sent.
_BUFFERS = 3


class ThroughHostCollectives(DeviceCollectives):
    """Collectives on device memory through those of the same ranks on host memory."""

    def __init__(self, host: Collectives, memory: CudaMemory) -> None:
        super().__init__(host)
        self.bytes_sent = host.bytes_sent
        self._memory = memory
        self._to_host = memory.stream()
        self._to_device = memory.stream()
        self._chunks = [
            _Pinned(memory, self._to_device, "parameters on their way between ranks")
            for _ in range(_BUFFERS)
        ]
        self._reductions: dict[np.dtype, _Reduction] = {}

    def prepare(self, group: GroupLayout) -> None:
        """See `Collectives.prepare`."""
        self._reduction(group.dtype)
        if self.size > 1:
            for chunk in self._chunks:
                chunk.fit(min(CHUNK_BYTES, group.size * group.dtype.itemsize))

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `Collectives.reduce_scatter`."""
        reduction = self._reduction(group.dtype)
        pieces = self._host.pieces(group)
        if self.size == 1:
            for piece in pieces[0]:
                packed = reduction.incoming[0].on_device[: piece.size]
                consume(piece, Mean(gradients.read_piece(0, piece, packed)))
            return
        compute = self._follow_compute()
        incoming = itertools.cycle(reduction.incoming)

        def consume_on_device(piece: Piece, mean: Mean) -> None:
            buffer = next(incoming)
            on_device = buffer.on_device[: piece.size]
            buffer.pinned.wait()
            on_host = buffer.pinned.array(piece.size, group.dtype)
            mean.evaluate(on_host)
            self._to_device.wait_event(buffer.consumed)
            buffer.pinned.send([(on_host, on_device)], self._to_device)
            compute.wait_event(buffer.pinned.copied)
            consume(piece, Mean(on_device))
            buffer.consumed.record(compute)

        self._host.reduce_scatter(
            group,
            _GradientsOnHost(gradients, pieces, reduction.outgoing, self.rank),
            consume_on_device,
        )

    def all_gather(self, flat: Any, buckets: Sequence[Bucket]) -> None:
        """See `Collectives.all_gather`."""
        if self.size == 1:
            return
        compute = self._follow_compute()
        chunks = list(_cut(buckets, max(CHUNK_BYTES // flat.itemsize // self.size, 1)))

        def fetch(index: int) -> None:
            start, stop = chunks[index].range_of(self.rank)
            own = self.rank * chunks[index].size
            pinned = self._chunks[index % _BUFFERS]
            array = pinned.array(chunks[index].size * self.size, flat.dtype)
            pinned.fetch(flat[start:stop], array[own : own + stop - start], self._to_host)

        for index in _one_ahead(len(chunks), fetch):
            chunk = chunks[index]
            pinned = self._chunks[index % _BUFFERS]
            array = pinned.array(chunk.size * self.size, flat.dtype)
            pinned.wait()
            self._host.all_gather(array, [Bucket(0, array.size, chunk.size)])
            others = chunk.others(self.rank, self.size)
            copies = [(array[on_host], flat[on_device]) for on_host, on_device in others]
            pinned.send(copies, self._to_device)
        compute.wait_event(self._memory.event(self._to_device))

    def broadcast(self, array: Any, root: int = 0) -> None:
        """See `Collectives.broadcast`; also of arrays in host memory."""
        if not hasattr(array, "__cuda_array_interface__"):
            self._host.broadcast(array, root)
            return
        if self.size == 1:
            return
        compute = self._follow_compute()
        flat = array.reshape(-1)
        step = CHUNK_BYTES // flat.itemsize
        chunks = [flat[start : start + step] for start in range(0, flat.size, step)]
        at_root = self.rank == root

        def fetch(index: int) -> None:
            if not at_root:
                return
            pinned = self._chunks[index % _BUFFERS]
            on_host = pinned.array(chunks[index].size, flat.dtype)
            pinned.fetch(chunks[index], on_host, self._to_host)

        for index in _one_ahead(len(chunks), fetch):
            chunk = chunks[index]
            pinned = self._chunks[index % _BUFFERS]
            on_host = pinned.array(chunk.size, flat.dtype)
            pinned.wait()
            self._host.broadcast(on_host, root)
            if not at_root:
                pinned.send([(on_host, chunk)], self._to_device)
        compute.wait_event(self._memory.event(self._to_device))

    def _reduction(self, dtype: np.dtype) -> _Reduction:
        reduction = self._reductions.get(dtype)
        if reduction is None:
            memory, limit = self._memory, self._host.piece_limit(dtype)
            outgoing = [
                _Outgoing(memory, dtype, limit, self._to_host)
                for _ in range(self.size if self.size > 1 else 0)
            ]
            incoming = [
                _Incoming(
                    _Pinned(memory, self._to_device, "mean gradients"),
                    memory.empty(limit, dtype, "mean gradients"),
                    memory.event(self._to_device),
                )
                for _ in range(2)
            ]
            for way in incoming if self.size > 1 else ():
                way.pinned.fit(limit * dtype.itemsize)
            reduction = self._reductions[dtype] = _Reduction(outgoing, incoming)
        return reduction

    def _follow_compute(self) -> Any:
        """Lets copies wait for what the current stream has been given; returns that stream."""
        compute = self._memory.current_stream()
        now = self._memory.event(compute)
        self._to_host.wait_event(now)
        self._to_device.wait_event(now)
        return compute


def _one_ahead(count: int, fetch: Callable[[int], None]) -> Iterator[int]:
    """Counts, with what comes next fetched already."""
    for index in range(count):
        if index == 0:
            fetch(0)
        if index + 1 < count:
            fetch(index + 1)
        yield index


class _Chunk(NamedTuple):
    """The same range of every rank's part of a bucket."""

    bucket: Bucket
    start: int
    size: int

    def range_of(self, rank: int) -> tuple[int, int]:
        """The range of the flat buffer that ``rank`` owns of it."""
        start = self.bucket.part_of(rank).start + self.start
        return start, start + self.size

    def others(self, rank: int, world_size: int) -> Iterator[tuple[slice, slice]]:
        """What the others own: ranges of the gathered chunk, and of the flat buffer."""
        for first, last in (
            # Whole parts are one behind the other in the flat buffer, too.
            ((0, rank), (rank + 1, world_size))
            if self.size == self.bucket.part_size
            else ((other, other + 1) for other in range(world_size) if other != rank)
        ):
            if first < last:
                start, _ = self.range_of(first)
                size = (last - first) * self.size
                yield slice(first * self.size, last * self.size), slice(start, start + size)


def _cut(buckets: Sequence[Bucket], limit: int) -> Iterator[_Chunk]:
    for bucket in buckets:
        for start in range(0, bucket.part_size, limit):
            yield _Chunk(bucket, start, min(limit, bucket.part_size - start))


class _Pinned:
    """Page-locked memory, and the event that ends the last copy from or into it."""

    def __init__(self, memory: CudaMemory, stream: Any, what: str) -> None:
        self._memory = memory
        self._what = what
        self._raw = np.empty(0, np.uint8)
        self.copied = memory.event(stream)

    def fit(self, nbytes: int) -> None:
        """Enlarges the memory to so many bytes, unless it has them."""
        if self._raw.size < nbytes:
            # What is freed may be given to others, under a copy that still goes on.
            self.wait()
            self._raw = self._memory.pinned(nbytes, np.dtype(np.uint8), self._what)

    def array(self, size: int, dtype: np.dtype) -> np.ndarray:
        """The beginning of the memory, as an array."""
        nbytes = size * dtype.itemsize
        self.fit(nbytes)
        return self._raw[:nbytes].view(dtype)

    def wait(self) -> None:
        """Lets the host wait for the last copy."""
        self.copied.synchronize()

    def fetch(self, on_device: Any, on_host: np.ndarray, stream: Any) -> None:
        """Starts a copy into a part of the memory, after the last copy."""
        stream.wait_event(self.copied)
        on_device.get(stream=stream, out=on_host, blocking=False)
        self.copied.record(stream)

    def send(self, copies: Sequence[tuple[np.ndarray, Any]], stream: Any) -> None:
        """Starts copies from parts of the memory to the device."""
        for on_host, on_device in copies:
            on_device.set(on_host, stream=stream)
        self.copied.record(stream)


class _Incoming(NamedTuple):
    """The way of a mean to the device."""

    pinned: _Pinned
    on_device: Any
    consumed: Any  # The event after which `on_device` may be overwritten.


class _Reduction(NamedTuple):
    """The memory of the reduce-scatters of one dtype."""

    outgoing: list[_Outgoing]  # By owner.
    incoming: list[_Incoming]  # To be taken in turn.


class _Outgoing:
    """The way of this rank's gradients of one owner's pieces to the host, one piece ahead.

    A piece stays valid while the next one is read and the one after that is copied.
    """

    def __init__(self, memory: CudaMemory, dtype: np.dtype, limit: int, stream: Any) -> None:
        self._dtype = dtype
        self._stream = stream
        self._packed = memory.empty(limit, dtype, "packed gradients")
        self._buffers = [_Pinned(memory, stream, "gradients to be sent") for _ in range(_BUFFERS)]
        for buffer in self._buffers:
            buffer.fit(limit * dtype.itemsize)

    def start(self, owner: int, pieces: Sequence[Piece], gradients: Gradients) -> None:
        """Starts with the first of the pieces."""
        self._owner, self._pieces, self._gradients = owner, pieces, gradients
        self._read = self._fetched = 0
        self._fetch()

    def _fetch(self) -> None:
        if self._fetched == len(self._pieces):
            # These collectives live as long as the communicator, gradients as an optimizer.
            del self._gradients
            return
        piece = self._pieces[self._fetched]
        pinned = self._buffers[self._fetched % _BUFFERS]
        # Packed on the stream of the copies as well, so that one buffer is enough.
        with self._stream:
            on_device = self._gradients.read_piece(self._owner, piece, self._packed[: piece.size])
        pinned.fetch(on_device, pinned.array(piece.size, self._dtype), self._stream)
        self._fetched += 1

    def read(self, piece: Piece) -> np.ndarray:
        """Gives the next piece, and starts with the one after it."""
        assert piece.start_s == self._pieces[self._read].start_s, "pieces are read in their order"
        self._fetch()
        pinned = self._buffers[self._read % _BUFFERS]
        self._read += 1
        pinned.wait()
        return pinned.array(piece.size, self._dtype)


class _GradientsOnHost:
    """A rank's gradients, copied to the host ahead of their use."""

    def __init__(
        self,
        gradients: Gradients,
        pieces: Sequence[Sequence[Piece]],
        outgoing: Sequence[_Outgoing],
        rank: int,
    ) -> None:
        self._outgoing = outgoing
        self.dtype = gradients.dtype
        # The own piece is needed last: what others wait for goes first.
        for step in range(1, len(pieces) + 1):
            owner = (rank + step) % len(pieces)
            outgoing[owner].start(owner, pieces[owner], gradients)

    def read_piece(self, owner: int, piece: Piece, scratch: np.ndarray) -> np.ndarray:
        """See `Gradients.read_piece`; never packed into ``scratch``."""
        return self._outgoing[owner].read(piece)

    def pack_bucket(self, bucket: Bucket, out: np.ndarray, scale: float) -> None:
        """See `Gradients.pack_bucket`; the host's collectives read pieces."""
        raise NotImplementedError("collectives on host memory read pieces")
