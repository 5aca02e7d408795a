"""Collectives on GPUs through host memory; the stand-in for CuPy works as late as it may."""

from __future__ import annotations

import itertools
from typing import Any

from smorms3_dist.collectives import base, through_host
from smorms3_dist.collectives.base import Reducer
from smorms3_dist.collectives.through_host import ThroughHostCollectives
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import Piece

import collective_checks
import device_checks
import fake_cupy
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes many pieces and chunks of small arrays."""
    monkeypatch.setattr(base, "PIECE_BYTES", base.SMALLEST_PIECE_BYTES)
    monkeypatch.setattr(through_host, "CHUNK_BYTES", 10_000)


@pytest.fixture
def memory() -> CudaMemory:
    # Nothing is launched here.
    return CudaMemory(0, fake_cupy.module(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("check", device_checks.CHECKS)
def test_results_are_those_of_the_host(
    check: Any, world_size: int, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(self: ThreadCollectives, value: Any, show: Any = ThreadCollectives._show) -> Any:
        assert not isinstance(value, fake_cupy.DeviceArray), "the host sees a device pointer"
        return show(self, value)

    def reduce(self: Reducer, parts: Any, reduce: Any = Reducer.__call__) -> Mean:
        assert {type(part) for part in parts} == {np.ndarray}, "the host sees a device pointer"
        return reduce(self, parts)

    monkeypatch.setattr(ThreadCollectives, "_show", show)
    monkeypatch.setattr(Reducer, "__call__", reduce)
    run_ranks(world_size, lambda host: check(ThroughHostCollectives(host, memory), host, memory))


@pytest.mark.parametrize("world_size", [1, 3])
def test_memory_is_bounded_and_allocated_once_when_it_is_prepared(world_size: int) -> None:
    def run(host: ThreadCollectives) -> None:
        memory = device_checks.Counting(fake_cupy.module())
        collectives = ThroughHostCollectives(host, memory)
        group = device_checks.make_group(world_size, "float32", 1 << 30)
        collectives.prepare(group)
        allocated = memory.on_device + memory.on_host
        assert dict(allocated)["mean gradients"] <= base.SMALLEST_PIECE_BYTES
        if world_size > 1:
            sizes = [size for what, size in allocated if what.startswith("parameters")]
            assert sizes == [through_host.CHUNK_BYTES] * 3
            assert group.size * 4 > 3 * through_host.CHUNK_BYTES
        flat = fake_cupy.DeviceArray(group.size, np.float32)
        flat[...] = 0
        for _ in range(2):
            collectives.all_gather(flat, group.buckets)
            collectives.broadcast(flat)
            gradients = collective_checks.Gradients(
                [v.view(fake_cupy.DeviceArray) for v in collective_checks.values(group, host.rank)]
            )
            collectives.reduce_scatter(group, gradients, lambda piece, mean: None)
        assert memory.on_device + memory.on_host == allocated

    run_ranks(world_size, run)


class Noted(collective_checks.Gradients):
    """Gradients that note when their own rank reads them."""

    def __init__(self, grads: list[Any], log: list[Any], rank: int) -> None:
        super().__init__(grads)
        self.log, self.rank = log, rank

    def read_piece(self, owner: int, piece: Piece, scratch: np.ndarray) -> np.ndarray:
        if owner == self.rank:
            self.log.append(("fetched", piece.start_s))
        return super().read_piece(owner, piece, scratch)


def test_the_next_piece_leaves_the_gpu_before_the_last_is_consumed(memory: CudaMemory) -> None:
    def run(host: ThreadCollectives) -> None:
        log: list[Any] = []
        group = device_checks.make_group(2, "float32", 1 << 30)
        values = collective_checks.values(group, host.rank)
        gradients = Noted([v.view(fake_cupy.DeviceArray) for v in values], log, host.rank)
        ThroughHostCollectives(host, memory).reduce_scatter(
            group, gradients, lambda piece, mean: log.append(("consumed", piece.start_s))
        )
        starts = [piece.start_s for piece in host.pieces(group)[host.rank]]
        assert len(starts) > 3
        for start, following in itertools.pairwise(starts):
            assert log.index(("fetched", following)) < log.index(("consumed", start))

    run_ranks(2, run)
