"""Memory that is missing: what the error says, and that nothing was changed before it."""

from __future__ import annotations

import functools
import socket
import threading
import types
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.collectives import connect as collectives
from smorms3_dist.device.memory import CudaMemory, HostMemory, Memory
from smorms3_dist.sharding import model

import chainer
import fake_cupy
import models
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks

TOO_MUCH = 1 << 55
FLOAT32 = np.dtype(np.float32)
HOST = socket.gethostname()
SHAPES = {"a": (3, 5), "c": (7,), "g": (40, 3)}
DTYPES = {"a": "float16", "g": "float16"}
MISSING = "has no 144,115,188,075,855,872 bytes for the test"


@pytest.mark.parametrize("method", ["zeros", "empty"])
def test_the_host_or_a_gpu_says_what_is_missing(method: str, cupy: Any) -> None:
    message = rf"^host {HOST} {MISSING} \([\d,]+ are free\): .*allocate.*start more ranks"
    with pytest.raises(MemoryError, match=message):
        getattr(HostMemory(), method)(TOO_MUCH, FLOAT32, "the test")
    message = rf"^GPU 0 of host {HOST} {MISSING} \(12,345 are free\): .*allocate.*If CuPy's memory"
    with pytest.raises(MemoryError, match=message + " pool has a limit, raise that"):
        getattr(CudaMemory(0, cupy, None), method)(TOO_MUCH, FLOAT32, "the test")


def test_whoever_is_on_another_gpu_lets_the_current_streams_of_both_wait(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[int] = []

    def current_stream() -> Any:
        number = fake_cupy.Device.current()
        return types.SimpleNamespace(wait_event=lambda mark: followed.append(number))

    monkeypatch.setattr(cupy.cuda, "get_current_stream", current_stream)
    memory = CudaMemory(0, cupy, None)  # type: ignore[arg-type]
    memory.follow(None)
    assert followed == [0]
    with fake_cupy.Device(1):
        memory.follow(None)
    assert followed == [0, 1, 0]


def test_page_locked_memory_says_what_is_missing(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = CudaMemory(0, cupy, None)  # type: ignore[arg-type]
    message = rf"^host {HOST} {MISSING} \(page-locked\) \([\d,]+ are free\): status 2. Start fewer"
    with pytest.raises(MemoryError, match=f"{message} ranks on this host"):
        memory.pinned(TOO_MUCH, FLOAT32, "the test")
    assert memory.pinned(0, FLOAT32, "nothing").shape == (0,)
    # No more of it is page-locked than was asked for.
    array = memory.pinned((1 << 20) + 1, FLOAT32, "the test")
    assert isinstance(array.base, fake_cupy.PinnedMemory) and len(array.base) == array.nbytes

    def fail(size: int) -> None:
        raise fake_cupy.CUDARuntimeError(100)

    monkeypatch.setattr(cupy.cuda, "PinnedMemory", fail)
    with pytest.raises(fake_cupy.CUDARuntimeError, match="status 100"):
        memory.pinned(1, FLOAT32, "the test")


def counted(memory: Memory, counter: Any) -> Memory:
    """Counts the allocations of a rank; one of them asks for too much."""

    def allocate(make: Any, size: int, *rest: Any) -> Any:
        counter.count += 1
        return make(TOO_MUCH if counter.count == counter.fails_at else size, *rest)

    for name in ("zeros", "empty", "pinned"):
        if hasattr(memory, name):
            setattr(memory, name, functools.partial(allocate, getattr(memory, name)))
    return memory


def snapshot(optimizer: Any) -> list[tuple[str, bytes, dict[str, bytes], bytes]]:
    """The parameters, and the states of their rules."""
    return [
        (
            name,
            param.array.tobytes(),
            {key: np.asarray(state).tobytes() for key, state in param.update_rule.state.items()},
            b"" if param.dtype == np.float32 else param.update_rule._fp32_param.array.tobytes(),
        )
        for name, param in sorted(optimizer.target.namedparams())
    ]


def trained(rank: int) -> Any:
    """An optimizer of Chainer's that has made a step, on a model of this rank's own."""
    optimizer = chainer.optimizers.SMORMS3()
    optimizer.use_fp32_update()
    optimizer.setup(models.Model(SHAPES, DTYPES, seed=rank))
    models.set_gradients(optimizer.target, rank, 1)
    optimizer.update()
    return optimizer


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("transport", ["host", "staged", "nccl"])
def test_a_setup_without_enough_memory_changes_nothing_on_any_rank(
    transport: str, failing: int, cupy: Any, host_launcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threading.local()
    monkeypatch.setattr(model, "memory_of", lambda device, exact: here.memory)
    why = None if transport == "nccl" else "the test wants so"
    monkeypatch.setattr(collectives, "_without_nccl", lambda *_: why)
    expected = trained(0).target

    def run(comm: ThreadCollectives, turn: int) -> str | None:
        counter = types.SimpleNamespace(count=0, fails_at=None)
        memory = HostMemory() if transport == "host" else CudaMemory(0, cupy, host_launcher)
        here.memory = counted(memory, counter)
        optimizer = trained(comm.rank)
        if transport != "host":
            for param in optimizer.target.params():
                param.array = param.array.view(fake_cupy.DeviceArray)
        before = snapshot(optimizer)
        sharded = create_multi_node_optimizer(optimizer, comm)
        counter.fails_at = turn if comm.rank == failing else None
        message = None
        try:
            sharded.update()
        except MemoryError as error:
            message = str(error)
            assert snapshot(optimizer) == before
            assert sharded.layout is None
            counter.fails_at = None
            sharded.update()
        models.assert_same_bits(sharded.target, expected)
        assert all(param.update_rule.state is None for param in sharded.target.params())
        return message

    messages = []
    for turn in range(1, 100):
        ours, theirs = run_ranks(2, lambda comm, turn=turn: run(comm, turn))
        assert ours == theirs
        if ours is None:
            break
        assert ours.startswith(f"rank {failing}: ")
        assert " bytes for " in ours
        messages.append(ours)
    said = "\n".join(messages)
    for what in (
        "the flat buffer of float16 parameters",
        "the flat buffer of float32 parameters",
        "the states mem, g, g2 of SMORMS3Rule",
        "the states mem, g, g2, fp32_param of SMORMS3Rule",
        *{
            "host": (),
            "staged": ("packed gradients", "gradients to be sent", "parameters on their way"),
            "nccl": ("a bucket of gradients in float16", "a bucket of gradients in float32"),
        }[transport],
    ):
        assert f"bytes for {what}" in said
