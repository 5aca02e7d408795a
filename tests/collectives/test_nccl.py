"""Collectives over NCCL, with NCCL and CuPy replaced by a stand-in that works on real pointers."""

from __future__ import annotations

import sys
from typing import Any

from smorms3_dist.collectives import nccl
from smorms3_dist.collectives.nccl import NcclCollectives, NcclError
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import FlatLayout, GroupLayout, ParameterSpec, Piece
from smorms3_dist.sharding.buffers import FlatBuffers

import chainer
import collective_checks
import device_checks
import fake_cupy
import numpy as np
import pytest
from rank_threads import ThreadCollectives, _Meeting, run_ranks

WORLD_SIZES = [1, 2, 3, 4]


@pytest.fixture(autouse=True)
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.fixture
def memory(cupy: Any, host_launcher: Any) -> CudaMemory:
    return CudaMemory(0, cupy, host_launcher)


def reduced(
    collectives: NcclCollectives, group: GroupLayout, memory: CudaMemory
) -> tuple[list[Piece], dict[int, list[tuple[int, np.ndarray]]]]:
    """What this rank receives: the pieces, and by slot the means of its segments."""
    pieces: list[Piece] = []
    means: dict[int, list[tuple[int, np.ndarray]]] = {}

    def consume(piece: Piece, mean: Mean) -> None:
        pieces.append(piece)
        for segment in piece.segments:
            part = mean.part(segment.start_s - piece.start_s, segment.stop_s - piece.start_s)
            means.setdefault(segment.slot.index, []).append(
                (segment.start_p, part.evaluated().copy())
            )

    gradients = collective_checks.values(group, collectives.rank)
    buffers = device_checks.make_buffers(group, gradients, memory)
    with buffers.gradients():
        collectives.reduce_scatter(group, buffers, consume)
    return pieces, means


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("bucket_bytes", "dtype"), [(1 << 30, "float32"), (40_000, "float64"), (8_000, "float32")]
)
def test_reduce_scatter_gives_the_mean_of_the_own_shard(
    bucket_bytes: int, dtype: str, world_size: int, memory: CudaMemory
) -> None:
    group = device_checks.make_group(world_size, dtype, bucket_bytes)

    def run(host: ThreadCollectives) -> None:
        collectives = NcclCollectives(host, memory)
        for _ in range(2):
            pieces, means = reduced(collectives, group, memory)
            assert len(pieces) == len(group.buckets)
            shard = group.shards[host.rank]
            assert sum(map(len, means.values())) == len(shard.segments)
            for index, parts in means.items():
                expected = collective_checks.expected_mean(group, world_size, index)
                for start, part in parts:
                    np.testing.assert_array_equal(part, expected[start : start + part.size])
        others = sum(shard.size for shard in group.shards) - group.shards[host.rank].size
        sent = collectives.bytes_sent["reduce_scatter"]
        assert sent == 2 * others * group.dtype.itemsize

    run_ranks(world_size, run)


def test_two_buckets_are_all_the_memory_that_it_takes(memory: CudaMemory) -> None:
    group = device_checks.make_group(3, "float32", 20_000)
    largest = max(bucket.part_size * 3 for bucket in group.buckets)
    for dtype, expected in (
        (None, 2 * 4 * largest),
        ("float16", 2 * 2 * largest + 4 * largest // 3),
    ):
        collectives = NcclCollectives(ThreadCollectives(0, _Meeting(3, 1.0)), memory, dtype)
        collectives.prepare(group)
        assert sum(buffer.nbytes for buffer in collectives._buffers.values()) == expected


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("bfloat16", 1.6e-2)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_may_be_sent_in_16_bits_without_a_sum_out_of_range(
    world_size: int, dtype: str, error: float, memory: CudaMemory
) -> None:
    group = FlatLayout(
        [ParameterSpec("/a", (300,), "float32")], world_size, 1 << 30, dense=False
    ).groups[0]

    def run(host: ThreadCollectives) -> None:
        collectives = NcclCollectives(host, memory, communication_dtype=dtype)
        param = chainer.Parameter(np.zeros(300, "f"))
        param.grad = np.full(300, 60000, "f")
        buffers = FlatBuffers(group, [param], memory)

        def consume(piece: Piece, mean: Mean) -> None:
            for segment in piece.segments:
                part = mean.part(
                    segment.start_s - piece.start_s, segment.stop_s - piece.start_s
                ).evaluated()
                assert part.dtype == np.float32
                np.testing.assert_allclose(part, 60000, rtol=error)

        with buffers.gradients():
            collectives.reduce_scatter(group, buffers, consume)
        others = sum(shard.size for shard in group.shards) - group.shards[host.rank].size
        assert collectives.bytes_sent["reduce_scatter"] == 2 * others

    run_ranks(world_size, run)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("bucket_bytes", [1 << 30, 20_000])
def test_all_gather_in_place(bucket_bytes: int, world_size: int, memory: CudaMemory) -> None:
    group = device_checks.make_group(world_size, "float32", bucket_bytes)

    def run(host: ThreadCollectives) -> None:
        collectives = NcclCollectives(host, memory)
        flat = np.zeros(group.size, "f").view(fake_cupy.DeviceArray)
        expected = np.empty(group.size, "f")
        for bucket in group.buckets:
            for rank in range(world_size):
                expected[bucket.part_of(rank)] = rank + 1
            flat[bucket.part_of(host.rank)] = host.rank + 1
        collectives.all_gather(flat, group.buckets)
        np.testing.assert_array_equal(flat, expected)
        sent = collectives.bytes_sent["all_gather"]
        assert sent == flat.nbytes // world_size * (world_size - 1)

    run_ranks(world_size, run)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_broadcast_of_device_and_of_host_memory(dtype: str, memory: CudaMemory) -> None:
    def run(host: ThreadCollectives) -> None:
        collectives = NcclCollectives(host, memory)
        for kind in (np.ndarray, fake_cupy.DeviceArray):
            for root in range(3):
                array = np.full(7, host.rank, dtype).view(kind)
                collectives.broadcast(array, root)
                np.testing.assert_array_equal(array, np.full(7, root))

    run_ranks(3, run)


def test_flags_and_objects_go_over_the_host(memory: CudaMemory) -> None:
    def run(host: ThreadCollectives) -> None:
        collective_checks.check_flags_and_objects(NcclCollectives(host, memory))

    run_ranks(3, run)


def test_a_communicator_that_is_there_is_used(cupy: Any, memory: CudaMemory) -> None:
    def run(host: ThreadCollectives) -> None:
        ready = fake_cupy.NcclCommunicator(1, b"ready", 0)
        collectives = NcclCollectives(host, memory, nccl_comm=ready)
        collectives.broadcast(cupy.zeros(3, "f"))
        assert collectives._comm is ready

    run_ranks(1, run)


@pytest.mark.parametrize("how", ["error", "stuck"])
def test_a_collective_that_fails_or_does_not_end_raises_and_gives_up(
    how: str, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl, "ABORT_LIMIT_S", 1.0)

    def run(host: ThreadCollectives) -> None:
        collectives = NcclCollectives(host, memory, timeout_s=0.05)
        group = device_checks.make_group(1, "float32", 1 << 30)
        reduced(collectives, group, memory)
        if how == "error":
            collectives._comm.error = 3
            message = "rank 0: a collective on the GPU failed with NCCL's status 3"
        else:
            monkeypatch.setattr(fake_cupy.Event, "stuck", True)
            message = "rank 0: a collective on the GPU did not end within 0.05 s"
        with pytest.raises(NcclError, match=message):
            reduced(collectives, group, memory)
        assert collectives._comm.aborted

    run_ranks(1, run)


def test_a_communication_dtype_that_is_none_is_refused(memory: CudaMemory) -> None:
    def run(host: ThreadCollectives) -> None:
        with pytest.raises(ValueError, match="communication_dtype must be None, 'float16' or"):
            NcclCollectives(host, memory, communication_dtype="int8")

    run_ranks(1, run)
