"""The comparison of GPU memory with ChainerMN's: its numbers without a GPU, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import gpu_memory
from smorms3_dist.device.memory import CudaMemory

import pytest
from fresh import passes
from test_cupy import CACHE, NULL_DEVICE, needs_cupy

MIB = 2**20

# NCCL's functions need a driver.
TRAIN = f"""{NULL_DEVICE}
import json
import smorms3_dist, chainermn.nccl, cupy
from mpi4py import MPI

class Nccl:
    def __init__(self, *arguments):
        pass
    def __getattr__(self, name):
        return lambda *arguments: None

for module in chainermn.nccl, cupy.cuda.nccl:
    module.NcclCommunicator = Nccl
    module.groupStart = module.groupEnd = lambda: None
from benchmarks.peers import gpu_memory
rows = []
for system in gpu_memory.SYSTEMS:
    rank = gpu_memory.train(system, MPI.COMM_WORLD, 2_000_000, steps=2)
    rows.append({{'system': system, 'ranks': [rank]}})
print(json.dumps(rows))
null_device.leave()
"""


@needs_cupy
def test_both_systems_take_the_memory_of_their_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(CACHE))
    rows = json.loads(passes(tmp_path, TRAIN, "-W", "ignore").splitlines()[-1])
    assert [row["system"] for row in rows] == list(gpu_memory.TITLES)
    in_use = {}
    for row in rows:
        (rank,) = row["ranks"]
        assert rank["parameters"] == pytest.approx(2e6, rel=1e-3)
        assert rank["steps"]["pool"] >= rank["steps"]["in_use"]
        in_use[row["system"]] = rank["steps"]["in_use"] / rank["parameters"]
    # Parameters, gradients and states are 20 bytes on one rank. Here gradients are read where they
    # lie. There, gradients have two buffers, parameters one for their broadcast.
    assert in_use["smorms3_dist"] == pytest.approx(20, rel=0.02)
    assert in_use["pure_nccl"] == pytest.approx(32, rel=0.02)
    assert len(gpu_memory.markdown(rows)) == 6


def test_a_part_of_the_states_is_expected_and_the_table_has_the_largest_of_the_ranks() -> None:
    buckets = 2 * CudaMemory.bucket_bytes
    assert gpu_memory.expected(1000, 1) == 20_000
    assert gpu_memory.expected(1000, 4) == 11_000 + buckets

    def rank(in_use: int) -> dict[str, Any]:
        phase = {"in_use": in_use * MIB, "pool": 50 * MIB, "device": 60 * MIB}
        return {"parameters": MIB, "set_up": phase | {"in_use": 9 * MIB}, "steps": phase}

    rows = [
        {"system": "smorms3_dist", "ranks": [rank(30), rank(32)]},
        {"system": "pure_nccl", "ranks": [rank(40)]},
    ]
    *_, ours, theirs = gpu_memory.markdown(rows)
    assert ours.endswith("| 2 | 24, 32.0 | 134, 142.0 | 1, 9.0 | 42, 50.0 | 52, 60.0 |")
    assert theirs.endswith("| 1 | 32, 40.0 |  | 1, 9.0 | 42, 50.0 | 52, 60.0 |")
