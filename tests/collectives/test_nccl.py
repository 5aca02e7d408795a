"""Collectives over NCCL, with NCCL and CuPy replaced by a stand-in that works on real pointers."""

from __future__ import annotations

import random
from typing import Any

from smorms3_dist.collectives import nccl_buckets, nccl_waiting
from smorms3_dist.collectives.beside import OnStream
from smorms3_dist.collectives.nccl import NcclCollectives
from smorms3_dist.collectives.nccl_waiting import NcclError
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.layout import FlatLayout, ParameterSpec

import collective_checks
import device_checks
import fake_cupy
import fake_nccl
import fake_streams
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_threads import Meeting, ThreadCollectives, run_ranks


@pytest.fixture
def memory(cupy: Any, host_launcher: Any) -> CudaMemory:
    return CudaMemory(0, cupy, host_launcher)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("check", device_checks.CHECKS)
def test_results_are_those_of_the_host(
    check: Any, world_size: int, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It sums float16 in float16, as NCCL does.
    monkeypatch.setattr(device_checks, "DTYPES", ("float32", "float64"))
    run_ranks(world_size, lambda host: check(NcclCollectives(host, memory), host, memory))


@given(seed=st.integers(0, 2**32 - 1), often=st.sampled_from([0.1, 0.5, 0.9]))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_results_are_the_same_in_any_order_of_the_work_of_streams(
    seed: int, often: float, memory: CudaMemory
) -> None:
    draw = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_streams.Stream, "luck", lambda: draw.random() < often)
        patch.setattr(device_checks, "DTYPES", ("float32",))

        def check(host: ThreadCollectives) -> None:
            collectives = NcclCollectives(host, memory)
            device_checks.check_reduce_scatter(collectives, host, memory)
            device_checks.check_all_gather(collectives, host, memory)

        run_ranks(2 + seed % 2, check)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("bfloat16", 1.6e-2)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_may_be_sent_in_16_bits_without_a_sum_out_of_range(
    world_size: int, dtype: str, error: float, memory: CudaMemory
) -> None:
    specs = [ParameterSpec("/a", (300,), "float32")]
    group = FlatLayout(specs, world_size, 1 << 30, dense=False).groups[0]

    def run(host: ThreadCollectives) -> None:
        collectives = NcclCollectives(host, memory, communication_dtype=dtype)
        buffers = device_checks.make_buffers(group, [np.full(300, 60000, "f")], memory)
        shard = group.shards[host.rank]
        result = np.zeros(shard.size, "f")
        device_checks.reduce(collectives, buffers, result)
        for segment in shard.segments:
            np.testing.assert_allclose(result[segment.range_s], 60000, rtol=error)
        others = sum(other.size for other in group.shards) - shard.size
        assert collectives.bytes_sent["reduce_scatter"] == 2 * others

    run_ranks(world_size, run)


@pytest.mark.parametrize("communication_dtype", [None, "float32"])
def test_float16_of_many_ranks_is_summed_in_float32(
    communication_dtype: str | None, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl_buckets, "MAX_RANKS_IN_FLOAT16", 2)
    group = FlatLayout([ParameterSpec("/a", (300,), "float16")], 3, 1 << 30, dense=False).groups[0]
    # Their sum is out of range; a part of one is lost in a sum in float16.
    large, small = 60000.0, 6e-5
    expected = np.float16((2 * large + small) / 3), np.float16((3 * small - 2e-7) / 3)

    def run(host: ThreadCollectives) -> None:
        collectives = NcclCollectives(host, memory, communication_dtype=communication_dtype)
        for turn, values in enumerate([(large, large, small), (small, small, small - 2e-7)]):
            grads = [np.full(300, values[host.rank], np.float16)]
            buffers = device_checks.make_buffers(group, grads, memory)
            shard = group.shards[host.rank]
            result = np.zeros(shard.size, np.float16)
            device_checks.reduce(collectives, buffers, result)
            for segment in shard.segments:
                np.testing.assert_array_equal(result[segment.range_s], expected[turn])

    run_ranks(3, run)


def test_a_communicator_that_is_there_is_used_and_odd_dtypes_are_refused(
    cupy: Any, memory: CudaMemory
) -> None:
    host = ThreadCollectives(0, Meeting(1, 1.0))
    ready = fake_nccl.NcclCommunicator(1, b"ready", 0)
    collectives = NcclCollectives(host, memory, nccl_comm=ready)
    collectives.broadcast(cupy.zeros(3, "f"))
    assert collectives._link.comm is ready
    with pytest.raises(
        ValueError, match="communication_dtype must be None or one of float32, float16,"
    ):
        NcclCollectives(host, memory, communication_dtype="int8")


def test_optimizers_of_one_communicator_share_it_and_buckets_on_any_stream(
    cupy: Any, host_launcher: Any
) -> None:
    group = FlatLayout([ParameterSpec("/a", (300,), "float32")], 2, 1 << 30, dense=False).groups[0]

    def run(host: ThreadCollectives) -> None:
        memory = device_checks.Counting(cupy, host_launcher)
        both = [NcclCollectives(host, memory) for _ in range(2)]
        results = [np.zeros(group.shards[host.rank].size, "f") for _ in both]
        computes, kept = [], []
        for collectives, result, value in zip(both, results, (1.0, 10.0), strict=True):
            grads = [device_checks.on_device(np.full(300, value * (1 + host.rank), "f"))]
            buffers = device_checks.make_buffers(group, grads, memory)
            with device_checks.late() as compute:
                device_checks.reduce(collectives, buffers, result.view(fake_cupy.DeviceArray))
            computes.append(compute)
            kept.append(buffers)
        for compute in reversed(computes):
            compute.synchronize()
        for segment in group.shards[host.rank].segments:
            for result, mean in zip(results, (1.5, 15.0), strict=True):
                assert set(result[segment.range_s].tolist()) == {mean}
        assert both[0]._communicator() is both[1]._communicator()
        assert len([what for what, _ in memory.on_device if "bucket" in what]) == 1

    run_ranks(2, run)


FAILURES = {
    # status of NCCL, of CUDA's event: what is said
    "NCCL fails": (6, None, "failed: NCCL_ERROR_6: remote process exited"),
    "NCCL fails with what CuPy has no words for": (8, None, "failed with NCCL's status 8"),
    "the GPU fails": (0, 700, "cannot end, since GPU 0 of host .* has failed .status 700."),
    "another rank has died": (0, 600, "did not end within 0.05 s: another rank has died or is"),
    "all is well": (0, None, None),
    "NCCL is at work": (7, None, None),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_collective_that_fails_or_does_not_end_raises_at_once_and_gives_up(
    failure: str, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl_waiting, "ABORT_LIMIT_S", 1.0)
    error, status, message = FAILURES[failure]

    host = ThreadCollectives(0, Meeting(1, 1.0))
    timeout_s = 0.05 if status == 600 else 600.0
    collectives = NcclCollectives(host, memory, timeout_s=timeout_s)
    group = device_checks.make_group(1, "float32", 1 << 30)
    buffers = device_checks.make_buffers(group, collective_checks.values(group, 0), memory)
    result = np.zeros(group.size, "f")
    device_checks.reduce(collectives, buffers, result)
    collectives._link.comm.error = error
    monkeypatch.setattr(fake_streams.Event, "status", status)
    if message is None:
        device_checks.reduce(collectives, buffers, result)
    else:
        with pytest.raises(NcclError, match=f"rank 0: a collective on the GPU {message}"):
            device_checks.reduce(collectives, buffers, result)
    assert collectives._link.comm.aborted == (message is not None)


def test_the_host_waits_for_a_groups_own_gradients_alone(memory: CudaMemory) -> None:
    """The gradients of another group may still have to be computed, in the same step."""
    host = ThreadCollectives(0, Meeting(1, 1.0))
    collectives = NcclCollectives(host, memory, timeout_s=0.05)
    with device_checks.late() as compute:
        groups = [device_checks.make_group(1, "float32", 1 << 30) for _ in range(2)]
        for group in groups:
            with fake_streams.main:
                grads = list(map(device_checks.on_device, collective_checks.values(group, 0)))
                buffers = device_checks.make_buffers(group, grads, memory)
            result = device_checks.garbage(group.size, "f")
            done = compute._done
            device_checks.reduce(collectives, buffers, result)
            assert compute._done == done, "somebody has waited for the GPU"
        compute.synchronize()


def test_a_stream_beside_the_training_waits_for_what_comes_before_and_is_waited_for(
    memory: CudaMemory,
) -> None:
    ranks = NcclCollectives(ThreadCollectives(0, Meeting(1, 60.0)), memory)
    channel = ranks.open_side_channel()
    assert isinstance(channel, OnStream)
    before, beside, after = (device_checks.garbage(3, "f") for _ in range(3))
    with device_checks.late() as compute:
        for value in (1.0, 2.0):
            before[...] = device_checks.on_device(np.full(3, value, "f"))

            def work(given: Any) -> None:
                assert given is ranks
                beside[...] = before

            channel.start(work)
            # It has every chance to come too early, and then to come too late.
            if value == 1.0:
                channel._stream.synchronize()
                assert beside.tolist() == [value] * 3
            channel.finish()
            after[...] = beside
        compute.synchronize()
    assert after.tolist() == [2.0] * 3
