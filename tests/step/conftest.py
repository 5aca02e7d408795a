"""A stand-in for a GPU."""

from __future__ import annotations

import sys
from typing import Any

from smorms3_dist.collectives import connect as collectives
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.sharding import model

import fake_cupy
import models
import pytest
from stand_in_gpu import TRANSPORTS, set_gradients_on_gpu

WITHOUT_NCCL = {"nccl": None, "staged": "the test wants so"}


@pytest.fixture(params=TRANSPORTS)
def gpu(request: Any, host_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> CudaMemory:
    """Makes models take the way of GPUs, over one or the other transport."""
    cupy = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(fake_cupy, "STRICT", True)
    memory = CudaMemory(0, cupy, host_launcher)
    monkeypatch.setattr(models, "set_gradients", set_gradients_on_gpu)
    monkeypatch.setattr(model, "memory_of", lambda device, exact: memory)
    monkeypatch.setattr(collectives, "_without_nccl", lambda *_: WITHOUT_NCCL[request.param])
    # Several buckets, some of them without parameters of some ranks.
    monkeypatch.setattr(CudaMemory, "bucket_bytes", 30_000)
    memory.transport = TRANSPORTS[request.param]  # type: ignore[attr-defined]
    return memory
