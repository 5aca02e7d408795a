"""What collectives on the memory of a GPU must do, whoever carries them: by threads and by MPI.

The stand-in for CuPy works as late as it may, on the current stream too: what is read too soon, or
overwritten too soon, is wrong. Results are compared with those of the host's collectives, by bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.device.memory import CudaMemory, HostMemory, Memory
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import FlatLayout, GroupLayout, ParameterSpec, Piece
from smorms3_dist.sharding.buffers import FlatBuffers

import chainer
import collective_checks
import fake_cupy
import fake_streams
import numpy as np

DTYPES = collective_checks.DTYPES
BUCKETS = (1 << 30, 20_000)
STEPS = 3
# Of this parameter, rank 1 has no gradient.
UNUSED = 8


class Counting(CudaMemory):
    """Notes what is allocated, and its bytes."""

    def __init__(self, cupy: Any, launcher: Any = None) -> None:
        super().__init__(0, cupy, launcher)
        self.on_device: list[tuple[str, int]] = []
        self.on_host: list[tuple[str, int]] = []

    def zeros(self, size: int, dtype: np.dtype, what: str, place: int = 0) -> Any:
        self.on_device.append((what, size * np.dtype(dtype).itemsize))
        return super().zeros(size, dtype, what, place)

    def empty(self, size: int, dtype: np.dtype, what: str = "", place: int = 0) -> Any:
        self.on_device.append((what, size * np.dtype(dtype).itemsize))
        return super().empty(size, dtype, what, place)

    def pinned(self, size: int, dtype: np.dtype, what: str) -> np.ndarray:
        self.on_host.append((what, size * np.dtype(dtype).itemsize))
        return super().pinned(size, dtype, what)


def make_group(world_size: int, dtype: str, bucket_bytes: int) -> GroupLayout:
    shapes = enumerate(collective_checks.SHAPES)
    specs = [ParameterSpec(f"/p{i}", shape, dtype) for i, shape in shapes]
    return FlatLayout(specs, world_size, bucket_bytes, dense=False).groups[0]


def on_device(array: np.ndarray) -> Any:
    return array.copy().view(fake_cupy.DeviceArray)


def garbage(size: int, dtype: Any) -> Any:
    return on_device(np.full(size, np.nan, dtype))


@contextmanager
def late() -> Iterator[Any]:
    """Makes the current stream a late one."""
    with fake_streams.Stream() as compute:
        yield compute


def _gradients(group: GroupLayout, rank: int, step: int) -> list[np.ndarray | None]:
    grads: list[Any] = [np.roll(each, step) for each in collective_checks.values(group, rank)]
    if rank == 1:
        grads[UNUSED] = None
    return grads


def make_buffers(group: GroupLayout, grads: list[Any], memory: Memory) -> FlatBuffers:
    params = []
    for slot, grad in zip(group.slots, grads, strict=True):
        param = chainer.Parameter(np.zeros(slot.shape, group.dtype))
        param.grad = None if grad is None else grad.reshape(slot.shape)
        params.append(param)
    return FlatBuffers(group, params, memory)


def reduce(collectives: Collectives, buffers: FlatBuffers, result: np.ndarray) -> None:
    """Writes what this rank receives of the mean into an array of its shard's size."""

    def consume(piece: Piece, mean: Mean) -> None:
        assert mean.first.dtype == result.dtype
        if isinstance(result, fake_cupy.DeviceArray):
            assert mean.second is None, "kernels on GPUs take one array"
        mean.evaluate(result[piece.start_s : piece.stop_s])

    with buffers.gradients():
        collectives.reduce_scatter(buffers.layout, buffers, consume)


def check_reduce_scatter(collectives: Collectives, host: Collectives, memory: CudaMemory) -> None:
    rank = collectives.rank
    for dtype, bucket_bytes in itertools.product(DTYPES, BUCKETS):
        group = make_group(collectives.size, dtype, bucket_bytes)
        size = group.shards[rank].size
        first = _gradients(group, rank, 0)
        grads = [None if grad is None else garbage(grad.size, dtype) for grad in first]
        buffers = make_buffers(group, grads, memory)
        results = [garbage(size, dtype) for _ in range(STEPS)]
        before = collectives.bytes_sent["reduce_scatter"]
        with late() as compute:
            for step, result in enumerate(results):
                for grad, values in zip(grads, _gradients(group, rank, step), strict=True):
                    if grad is not None:
                        grad[...] = on_device(values)
                reduce(collectives, buffers, result)
                for grad in grads:
                    if grad is not None:
                        grad[...] = np.nan
            compute.synchronize()
        sent = collectives.bytes_sent["reduce_scatter"] - before
        others = sum(shard.size for shard in group.shards) - size
        assert sent == STEPS * others * group.dtype.itemsize
        for step, result in enumerate(results):
            expected = np.full(size, np.nan, dtype)
            buffers = make_buffers(group, _gradients(group, rank, step), HostMemory())
            reduce(host, buffers, expected)
            for segment in group.shards[rank].segments:
                assert np.isfinite(expected[segment.range_s]).any() or not segment.size
                mine = np.asarray(result[segment.range_s])
                assert mine.tobytes() == expected[segment.range_s].tobytes()
            # Gaps within a piece are zeros; those between pieces nobody writes.
            owned = np.zeros(size, bool)
            for segment in group.shards[rank].segments:
                owned[segment.range_s] = True
            gaps = np.asarray(result)[~owned]
            assert np.all((gaps == 0) | np.isnan(gaps))


def check_all_gather(collectives: Collectives, host: Collectives, memory: CudaMemory) -> None:
    for dtype, bucket_bytes in itertools.product(DTYPES, BUCKETS):
        group = make_group(collectives.size, dtype, bucket_bytes)
        flat = garbage(group.size, dtype)
        seen = [garbage(group.size, dtype) for _ in range(STEPS)]
        before = collectives.bytes_sent["all_gather"]
        with late() as compute:
            for step in range(STEPS):
                for bucket in group.buckets:
                    part_f = bucket.part_of(collectives.rank)
                    flat[part_f] = _expected(group, dtype, step)[part_f]
                collectives.all_gather(flat, group.buckets)
                # Read when the next gathering has been asked for.
                seen[step][...] = flat
                flat[...] = np.nan
            compute.synchronize()
        sent = collectives.bytes_sent["all_gather"] - before
        assert sent == STEPS * flat.nbytes // collectives.size * (collectives.size - 1)
        for step in range(STEPS):
            np.testing.assert_array_equal(seen[step], _expected(group, dtype, step))


def _expected(group: GroupLayout, dtype: str, step: int) -> Any:
    return on_device((np.arange(group.size) % 1021 + 1024 * step).astype(dtype))


def check_broadcast(collectives: Collectives, host: Collectives, memory: CudaMemory) -> None:
    # What is in host memory may be counted by the host's.
    counters = {id(counter): counter for counter in (collectives.bytes_sent, host.bytes_sent)}
    before = sum(counter["broadcast"] for counter in counters.values())
    sent = 0
    for dtype in DTYPES:
        for root in range(collectives.size):
            for shape in ((), (3, 7), (1031, 5), (0,)):
                array = garbage(int(np.prod(shape)), dtype).reshape(shape)
                seen = garbage(array.size, dtype).reshape(shape)
                expected = np.full(shape, root + 1, dtype)
                with late() as compute:
                    array[...] = on_device(np.full(shape, collectives.rank + 1, dtype))
                    collectives.broadcast(array, root)
                    seen[...] = array
                    array[...] = np.nan
                    compute.synchronize()
                np.testing.assert_array_equal(seen, expected)
                on_host = np.full(shape, collectives.rank + 1, dtype)
                collectives.broadcast(on_host, root)
                np.testing.assert_array_equal(on_host, expected)
                if root == collectives.rank:
                    sent += 2 * array.nbytes * (collectives.size - 1)
    assert sum(counter["broadcast"] for counter in counters.values()) - before == sent


def check_flags_and_objects(collectives: Collectives, host: Collectives, memory: Any) -> None:
    collective_checks.check_flags_and_objects(collectives)


CHECKS = (check_reduce_scatter, check_all_gather, check_broadcast, check_flags_and_objects)
