"""Trainings as they run on GPUs, on the host: files, comparisons, devices, phases and streams.

See `test_cuda_step.py`.
"""

from __future__ import annotations

import copy
import gc
import pathlib
import sys
import weakref
from collections.abc import Callable
from typing import Any

from smorms3_dist import StepMeter, create_multi_node_optimizer, load_checkpoint, save_checkpoint
from smorms3_dist.collectives.beside import OnStream
from smorms3_dist.collectives.nccl import NcclCollectives
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.sharding import model

import chainer
import fake_cupy
import fake_streams
import models
import numpy as np
import pytest
from chainer import serializers
from rank_threads import ThreadCollectives, run_ranks
from stand_in_gpu import (
    MODES,
    STEPS,
    decay,
    hooked,
    on_gpu,
)


def train_on_gpu(world_size: int, configure: Callable[[Any], None]) -> list[Any]:
    return models.train_sharded(world_size, on_gpu(models.Model), STEPS, configure)


@pytest.mark.parametrize("world_size", [1, 3])
def test_snapshots_of_shards_and_of_whole_states(gpu: Any, world_size: int) -> None:
    expected = train_on_gpu(world_size, decay)

    def run(comm: ThreadCollectives) -> Any:
        link = on_gpu(models.Model)()
        optimizer = models.optimizer_for(link, comm)
        decay(optimizer)
        optimizer.update()
        models.train(optimizer, comm.rank, range(1, 4))
        shard = serializers.npz.serialize(optimizer)
        optimizer.consolidate()
        whole = comm.all_gather_object(
            serializers.npz.serialize(optimizer) if comm.rank == 0 else None
        )[0]
        for saved in (shard, whole):
            assert not any(isinstance(value, fake_cupy.DeviceArray) for value in saved.values())
            twin = on_gpu(models.Model)()
            for name, param in link.namedparams():
                dict(twin.namedparams())[name].array[...] = param.array
            other = models.optimizer_for(twin, comm)
            decay(other)
            serializers.NpzDeserializer(saved).load(other)
            models.train(other, comm.rank, range(4, 6))
            assert other.t == 5
            models.assert_same_bits(twin, expected[0].target)

    run_ranks(world_size, run)


@pytest.mark.parametrize("world_size", [1, 3])
def test_checkpoints_go_to_hosts_and_back(
    gpu: Any, world_size: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = train_on_gpu(world_size, decay)

    def save(comm: ThreadCollectives) -> None:
        optimizer = saved[comm.rank]
        optimizer.communicator = comm
        save_checkpoint(tmp_path, optimizer)

    def load(comm: ThreadCollectives, make_model: Callable[[], chainer.Link]) -> Any:
        optimizer = models.optimizer_for(make_model(), comm)
        load_checkpoint(tmp_path, optimizer)
        return optimizer

    run_ranks(world_size, save)
    loaded = run_ranks(2, lambda comm: load(comm, on_gpu(models.Model)))
    monkeypatch.undo()
    loaded_on_host = run_ranks(2, lambda comm: load(comm, models.Model))
    states = models.gathered_states(saved)
    for ours in (loaded, loaded_on_host):
        models.assert_same_bits(ours[0].target, saved[0].target)
        for name, theirs in states.items():
            for key, values in theirs.items():
                assert models.bits(models.gathered_states(ours)[name][key]) == models.bits(values)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_compared_and_repaired_on_the_gpu(gpu: Any, world_size: int) -> None:
    dtypes = {"a": "float16", "c": "float64"}

    def run(comm: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm)
        optimizer.setup(on_gpu(lambda: models.Model(dtypes=dtypes))()).use_fp32_update()
        for step in range(3):
            models.set_gradients(optimizer.target, comm.rank, step)
            optimizer.update()
            optimizer.check_sync()
        if comm.rank == 0:
            for param in optimizer.target.params():
                param.array[...] = np.asarray(0.25, param.dtype).view(fake_cupy.DeviceArray)
        with pytest.raises(RuntimeError, match="/a, float16 of shape"):
            optimizer.check_sync()
        optimizer.check_sync(repair=True)
        optimizer.check_sync()
        optimizer.lr = 0.0
        models.set_gradients(optimizer.target, comm.rank, 3)
        optimizer.update()
        optimizer.check_sync()
        for param in optimizer.target.params():
            assert (np.asarray(param.array) == 0.25).all()

    run_ranks(world_size, run)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_that_are_not_finite_are_named_on_the_gpu(gpu: Any, world_size: int) -> None:
    dtypes = {"a": "float16", "c": "float64"}

    def run(comm: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), comm, check_finite="error"
        ).setup(on_gpu(lambda: models.Model(dtypes=dtypes))())
        optimizer.update()
        for name in ("g", "a", "c"):
            models.set_gradients(optimizer.target, comm.rank, 1)
            optimizer.update()
            t, before = optimizer.t, optimizer.target.g.array.tobytes()
            models.set_gradients(optimizer.target, comm.rank, 2)
            if comm.rank == comm.size - 1:
                getattr(optimizer.target, name).grad.reshape(-1).view(np.ndarray)[-1] = np.nan
            with pytest.raises(RuntimeError, match=f"that of /{name} on rank {comm.size - 1} "):
                optimizer.update()
            assert optimizer.t == t and optimizer.target.g.array.tobytes() == before

    run_ranks(world_size, run)


@pytest.mark.parametrize("double_buffering", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_model_may_be_on_another_gpu_than_the_current_one(
    gpu: Any,
    world_size: int,
    double_buffering: bool,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cupy = sys.modules["cupy"]
    elsewhere = CudaMemory(1, cupy, gpu.launcher)
    monkeypatch.setattr(model, "memory_of", lambda device, exact: elsewhere)
    set_gradients = models.set_gradients

    def set_gradients_there(link: chainer.Link, rank: int, step: int) -> None:
        with fake_cupy.Device(1):
            set_gradients(link, rank, step)

    def make_model() -> chainer.Link:
        with fake_cupy.Device(1):
            return on_gpu(models.Model)()

    monkeypatch.setattr(models, "set_gradients", set_gradients_there)

    def body(optimizer: Any, rank: int) -> None:
        hooked(optimizer)
        for step in range(4):
            models.set_gradients(optimizer.target, rank, step)
            optimizer.update()
            optimizer.check_sync()
        for group in optimizer.sharded_model.groups:
            assert group.buffers.flat.device_id == 1
            assert {state.device_id for state in group.states.values()} == {1}
        optimizer.consolidate()
        serializers.npz.serialize(optimizer)
        saved_on: list[int] = []

        def after_save(step: int, path: pathlib.Path) -> None:
            saved_on.append(fake_cupy.Device.current())

        options: Any = {"objects": {}, "asynchronous": True, "after_save": after_save}
        save_checkpoint(tmp_path, optimizer, **options).wait()
        drawn = draw_there()
        models.set_gradients(optimizer.target, rank, 4)
        optimizer.update()
        load_checkpoint(tmp_path, optimizer)
        if world_size == 1:
            assert draw_there() == drawn and saved_on == [1]
        copied = copy.deepcopy(optimizer).sharded_model
        assert {group.buffers.flat.device_id for group in copied.groups} == {1}
        optimizer.update()
        assert (optimizer.in_flight is not None) is double_buffering
        optimizer.setup(optimizer.target)
        assert fake_cupy.Device.current() == 0

    def draw_there() -> int:
        with fake_cupy.Device(1):
            return cupy.random.randint(0, 1000)

    fake_cupy.Device.used.clear()
    options = {"double_buffering": double_buffering, "gradients": "sharded"}
    models.on_ranks(world_size, body, make_model=make_model, **options)
    assert fake_cupy.Device.used == {1}


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_agree_while_the_gpu_still_computes_gradients(
    gpu: Any, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: dict[int, list[int]] = {rank: [] for rank in range(world_size)}
    exchange = ThreadCollectives.exchange_word

    def note(self: ThreadCollectives, word: int) -> int:
        computed[self.rank].append(fake_streams.current()._done)
        return exchange(self, word)

    monkeypatch.setattr(ThreadCollectives, "exchange_word", note)

    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, [0, 1])
        models.set_gradients(optimizer.target, rank, 2)
        with fake_streams.Stream() as compute:
            for param in optimizer.target.params():
                np.multiply(param.grad, param.grad, out=param.grad)
            computed[rank].clear()
            optimizer.update()
            assert computed[rank] == [0]
            compute.synchronize()

    make_model = on_gpu(models.Model)
    ours = models.on_ranks(world_size, lambda o, r: (body(o, r), o)[1], make_model=make_model)
    models.assert_same_bits(ours[0].target, ours[-1].target)


@pytest.mark.parametrize("gradients", MODES)
def test_phases_are_timed_by_events_that_nobody_waits_for(gpu: CudaMemory, gradients: str) -> None:
    def body(optimizer: Any, rank: int) -> tuple[dict[str, float], list[float]]:
        meter = StepMeter(optimizer)
        optimizer.update()
        meter.read()
        before = optimizer.phases.settle()
        models.train(optimizer, rank, STEPS)
        return meter.read(), before

    for found, before in models.on_ranks(
        2, body, make_model=on_gpu(models.Model), gradients=gradients
    ):
        assert found["smorms3/gpu_bytes"] == fake_cupy.POOL_BYTES
        for phase in ("compute", "agree", "reduce", "update", "gather"):
            assert found[f"smorms3/{phase}_s"] > 0, phase
        assert found["smorms3/layout_s"] == 0 < before[2]


@pytest.mark.parametrize("double_buffering", [False, True])
def test_a_communicator_keeps_nothing_of_an_optimizer_that_is_gone(
    gpu: CudaMemory, double_buffering: bool
) -> None:
    def run(comm: ThreadCollectives) -> tuple[Any, list[Any]]:
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), comm, double_buffering=double_buffering
        ).setup(on_gpu(models.Model)())
        optimizer.update()
        models.train(optimizer, comm.rank, STEPS)
        group = optimizer.sharded_model.groups[0]
        kept = optimizer.target, optimizer.sharded_model, group, group.buffers
        return optimizer.collectives, [weakref.ref(each) for each in kept]

    ranks = run_ranks(2, run)
    gc.collect()
    for collectives, kept in ranks:
        assert type(collectives) is gpu.transport  # type: ignore[attr-defined]
        assert [ref() for ref in kept] == [None] * 4


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_gradients_in_flight_are_reduced_on_a_stream_of_their_own(
    gpu: Any, world_size: int, gradients: str
) -> None:
    """Late as streams are here, an update that did not wait for them would see none."""

    def train(comm: ThreadCollectives, late: bool) -> Any:
        optimizer = models.optimizer_for(
            on_gpu(models.Model)(), comm, gradients=gradients, double_buffering=late
        )
        decay(optimizer)
        models.train(optimizer, comm.rank, [0])
        for step in range(1, 6 + late):
            models.train(optimizer, comm.rank, [step])
            if late:
                assert isinstance(optimizer.collectives, gpu.transport)
                on_stream = isinstance(optimizer._in_flight._channel, OnStream)
                assert on_stream == (gpu.transport is NcclCollectives)
        return optimizer

    late, other = (
        run_ranks(world_size, lambda comm, late=late: train(comm, late)) for late in (True, False)
    )
    for ours, theirs in zip(late, other, strict=True):
        assert ours.t == theirs.t == 5
        models.assert_same_bits(ours.target, theirs.target)
