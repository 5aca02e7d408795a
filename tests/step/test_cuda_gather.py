"""Parameters gathered beside the next forward pass on GPUs, on the host: nobody reads too soon.

What reads parameters, NCCL and updates are on streams that are as late as they may be, or in random
order. See `test_cuda_overlap.py`.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from smorms3_dist.collectives import nccl_gather
from smorms3_dist.collectives.nccl import NcclCollectives
from smorms3_dist.collectives.nccl_waiting import NcclError
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.optimizer import overlap

import chainer
import fake_cupy
import fake_streams
import models
import numpy as np
import pytest
from chainer import optimizer_hooks
from stand_in_gpu import on_gpu

Seen = dict[str, Any]
STEPS = 4
over_nccl = pytest.mark.parametrize("gpu", ["nccl"], indirect=True)


def _has_happened(event: fake_streams.Event) -> bool:
    stream, given = event.recorded()
    return stream._done >= given


@pytest.fixture(autouse=True)
def as_late_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several buckets; and whoever asks whether they are there does not make them come."""
    monkeypatch.setattr(overlap, "early_gpu_bucket_bytes", lambda size: 10_000 * size)
    monkeypatch.setattr(CudaMemory, "has_come", lambda memory, event: _has_happened(event))


class Reads(chainer.FunctionNode):
    """Lets the current stream read a parameter, on which its gradient depends."""

    def __init__(self, gradient: np.ndarray) -> None:
        super().__init__()
        self.gradient = gradient

    def forward(self, inputs: Any) -> Any:
        self.seen = read(inputs[1])
        return (inputs[0].copy(),)

    def backward(self, indexes: Any, grads: Any) -> Any:
        grad = read(self.gradient.view(fake_cupy.DeviceArray))
        np.add(grad, self.seen, out=grad)
        return grads[0], chainer.Variable(grad)


def read(array: Any) -> Any:
    """What the current stream copies an array to, which is garbage before."""
    copied = np.full(array.shape, np.nan, array.dtype).view(fake_cupy.DeviceArray)
    fake_streams.keep_alive(copied)[...] = array
    return copied


def loss(model: chainer.Link, rank: int, step: int) -> chainer.Variable:
    """Uses the parameters in an order that is not that of their names."""
    total = chainer.Variable(np.zeros((), np.float32))
    for name, param in sorted(model.namedparams(), key=lambda item: item[0] in ("/a", "/c")):
        gradient = models.gradient(name, param, rank, step)
        (total,) = Reads(gradient).apply((total, param))
    return total


def train(optimizer: Any, rank: int, steps: int = STEPS, late: bool = True) -> None:
    with fake_streams.Stream() if late else nullcontext() as compute:
        for step in range(steps):
            optimizer.update(loss, optimizer.target, rank, step)
        if late:
            optimizer.sharded_model.finish_gather()
            compute.synchronize()


def run(
    world: int, body: Callable[[Any, int], Any], finish: bool = True, **options: Any
) -> list[Any]:
    def to_the_end(optimizer: Any, rank: int) -> Any:
        answer = body(optimizer, rank)
        if finish and channel_of(optimizer) is not None:
            channel_of(optimizer).finish()
        return answer

    options = {"make_model": on_gpu(models.Model), "overlap_gather": True, **options}
    return models.on_ranks(world, to_the_end, **options)


def channel_of(optimizer: Any) -> Any:
    return optimizer._overlap_gather._channel


def is_under_way(optimizer: Any) -> bool:
    stream = channel_of(optimizer)._stream
    return bool(stream._done < stream.given)


def same_bits(world: int, body: Callable[[Any, int], Any], **options: Any) -> None:
    """The models are what they are without, bit for bit, and as many bytes are sent."""

    def both(optimizer: Any, rank: int) -> Any:
        body(optimizer, rank)
        assert (channel_of(optimizer) is not None) == optimizer.overlap_gather
        return optimizer.target, dict(optimizer.collectives.bytes_sent)

    beside, within = (
        run(world, both, overlap_gather=wanted, **options) for wanted in (True, False)
    )
    for (ours, sent), (theirs, expected) in zip(beside, within, strict=True):
        models.assert_same_bits(ours, theirs)
        assert sent == expected
    models.assert_alike([ours for ours, _ in beside])


def clipped(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))


@over_nccl
@pytest.mark.parametrize("how", ["plain", "overlap", "clipped", "loss scale"])
def test_parameters_come_out_the_same(gpu: Any, how: str) -> None:
    def body(optimizer: Any, rank: int) -> None:
        if how == "clipped":
            clipped(optimizer)
        if how == "loss scale":
            optimizer.loss_scaling(interval=2, scale=4.0)
        # Norms are computed at once.
        train(optimizer, rank, late=how in ("plain", "overlap"))

    same_bits(3 if how == "plain" else 2, body, overlap=how == "overlap")


@over_nccl
@pytest.mark.parametrize("seed", range(3))
def test_parameters_are_the_same_in_any_order_of_the_work_of_streams(
    gpu: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    often = (0.1, 0.5, 0.9)[seed]
    monkeypatch.setattr(fake_streams.Stream, "luck", lambda: draw.random() < often)
    same_bits(2 + seed % 2, train, overlap=bool(seed % 2))


@functools.cache
def expected() -> Seen:
    """The parameters after two updates."""

    def body(optimizer: Any, rank: int) -> Seen:
        train(optimizer, rank, 2, late=False)
        return models.arrays(optimizer.target)

    return run(2, body, overlap_gather=False)[0]  # type: ignore[no-any-return]


def while_under_way(
    use: Callable[[Any], Any],
    prepare: Callable[[Any], Any] = lambda model: None,
    compute: Callable[[], AbstractContextManager[Any]] = fake_streams.Stream,
) -> Any:
    """Calls ``use(optimizer)`` on rank 1 while no work of the gathering stream is done.

    ``compute`` makes the current stream. ``prepare(model)`` is called before the update, and its
    answer kept.
    """

    def body(optimizer: Any, rank: int) -> Any:
        train(optimizer, rank, 1)
        optimizer.kept = prepare(optimizer.target)
        answer = None
        with compute() as stream:
            optimizer.update(loss, optimizer.target, rank, 1)
            optimizer.collectives.all_gather_object(None)
            if rank == 1:
                assert is_under_way(optimizer)
                answer = use(optimizer)
                if stream is not None:
                    stream.synchronize()
            # Who works first does the work of the others, too.
            optimizer.collectives.all_gather_object(None)
            channel_of(optimizer).finish()
            optimizer.sharded_model.finish_gather()
            assert optimizer.sharded_model.in_flight is None
        return answer

    return run(2, body)[1]


def assert_equal(seen: Seen, values: Seen) -> None:
    assert seen and seen.keys() <= values.keys()
    for name, array in seen.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(values[name]), err_msg=name)


def _of(model: chainer.Link) -> Seen:
    return {name: read(param.array) for name, param in model.namedparams()}


def _on_two_streams(optimizer: Any) -> Seen:
    _of(optimizer.target)
    with fake_streams.Stream() as other:
        seen = _of(optimizer.target)
        other.synchronize()
    return seen


def _in_another_thread(optimizer: Any) -> Seen:
    seen: Seen = {}

    def in_thread() -> None:
        with fake_streams.Stream() as stream:
            seen.update(_of(optimizer.target))
            stream.synchronize()

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    return seen


def _of_flat_buffers(optimizer: Any) -> Seen:
    (group,) = optimizer.sharded_model.groups
    # Somebody else may have come there before.
    with fake_streams.Stream():
        assert group.buffers.flat is not None
    return {
        slot.name: read(group.buffers.flat[slot.start_f : slot.stop_f].reshape(slot.shape))
        for slot in group.layout.slots
    }


def _last_alone(optimizer: Any) -> Seen:
    name = "/c"
    return {name: read(dict(optimizer.target.namedparams())[name].array)}


READERS: dict[str, Callable[[Any], Seen]] = {
    "array": lambda o: _of(o.target),
    "copy": lambda o: _of(o.target.copy()),
    "two streams": _on_two_streams,
    "thread": _in_another_thread,
    "flat buffers": _of_flat_buffers,
    "initializer": lambda o: {"/g": read(o.target.g.initializer)},
    "node": lambda o: {"/g": read(o.target.g.node.data)},
    "last alone": _last_alone,
}


def _as_made_of_its_array(model: Any) -> None:
    model.g.initializer = model.g.node.data = model.g.array


@over_nccl
@pytest.mark.parametrize("name", READERS)
def test_the_stream_of_a_reader_waits(gpu: Any, name: str) -> None:
    assert_equal(while_under_way(READERS[name], _as_made_of_its_array), expected())


def _npz(optimizer: Any) -> Seen:
    file = io.BytesIO()
    chainer.serializers.save_npz(file, optimizer.target)
    file.seek(0)
    return {f"/{name}": array for name, array in np.load(file).items()}


COPIES: dict[str, Callable[[Any], Any]] = {
    "npz": _npz,
    "deepcopy": lambda o: models.arrays(copy.deepcopy(o.target)),
    "pickle": lambda o: models.arrays(pickle.loads(pickle.dumps(o.target))),
    "list": lambda o: {n: copy.deepcopy(p._data)[0] for n, p in o.target.namedparams()},
    "copy of the optimizer": lambda o: models.arrays(copy.deepcopy(o).target),
}


@over_nccl
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_whole_and_without_guards(gpu: Any, name: str) -> None:
    # The current stream is CuPy's own, as where nobody has made one.
    assert_equal(while_under_way(COPIES[name], compute=nullcontext), expected())


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "array": lambda model: model.g.array,
    "view": lambda model: model.g.array.T[1:],
    "variable": lambda model: chainer.Variable(model.g.array),
}


@over_nccl
@pytest.mark.parametrize("name", HOLDERS)
def test_for_what_somebody_holds_the_stream_of_the_update_waits(
    gpu: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def use(optimizer: Any) -> Any:
        kept = optimizer.kept
        return read(kept.array if name == "variable" else kept)

    g = expected()["/g"]
    np.testing.assert_array_equal(
        while_under_way(use, HOLDERS[name]), g.T[1:] if name == "view" else g
    )
    told = sorted(r.getMessage() for r in caplog.records if "overlap_gather" in r.getMessage())
    assert len(told) == 2
    for rank, message in enumerate(told):
        assert f"(overlap_gather): on rank {rank} somebody has the array of /g" in message


@over_nccl
def test_usual_trainings_hold_nothing(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank)
        assert optimizer._overlap_gather._order[-2:] == ("/a", "/c")
        assert optimizer._overlap_gather._last.held == []

    run(2, body)
    assert not [r for r in caplog.records if "overlap_gather" in r.getMessage()]


@over_nccl
def test_no_host_waits_and_each_bucket_is_waited_for_alone(gpu: Any) -> None:
    def use(optimizer: Any) -> None:
        last = optimizer._overlap_gather._last
        compute, stream = fake_streams.current(), channel_of(optimizer)._stream
        with fake_streams.Stream() as other:
            _ = optimizer.target.g.array
            assert is_under_way(optimizer) and compute._done < compute.given
            _, given = last._marks[last._needed["/g"] - 1].recorded()
            other.synchronize()
        assert stream._done == given
        assert type(optimizer.target.g._data).__name__ == "_WaitingSlot"
        # It is there: the guard comes off.
        _ = optimizer.target.g.array
        assert type(optimizer.target.g._data).__name__ == "_Slot"

    while_under_way(use)


def _in_place(optimizer: Any) -> None:
    for param in optimizer.target.params():
        param.array[...] = np.full_like(param.array, 7)


def _replaced(optimizer: Any) -> None:
    for param in optimizer.target.params():
        param.array = np.full_like(param.array, 7)
    optimizer.sharded_model.adopt()


@over_nccl
@pytest.mark.parametrize("write", [_in_place, _replaced])
def test_what_is_written_meanwhile_stays(gpu: Any, write: Callable[[Any], None]) -> None:
    def use(optimizer: Any) -> Any:
        write(optimizer)
        fake_streams.current().synchronize()
        channel_of(optimizer)._stream.synchronize()
        return models.arrays(optimizer.target)

    seen = while_under_way(use)
    assert all(np.all(np.asarray(array) == 7) for array in seen.values())


@over_nccl
def test_a_new_layout_begins_when_nothing_is_under_way(gpu: Any) -> None:
    def body(optimizer: Any, rank: int) -> None:
        with fake_streams.Stream():
            for step in range(2):
                optimizer.update(loss, optimizer.target, rank, step)
        optimizer.collectives.all_gather_object(None)
        assert is_under_way(optimizer)
        # Who works first does the work of the others, too.
        optimizer.collectives.all_gather_object(None)
        with optimizer.target.init_scope():
            new = np.ones(3, np.float32).view(fake_cupy.DeviceArray)
            optimizer.target.h = chainer.Parameter(new)
        optimizer.lay_out()
        assert not is_under_way(optimizer) and channel_of(optimizer)._work is None

    run(2, body)


@over_nccl
def test_memory_is_given_back_when_nothing_is_written_to_it_any_more(gpu: Any) -> None:
    def body(optimizer: Any, rank: int) -> Any:
        train(optimizer, rank, 2, late=False)
        collectives, stream = optimizer.collectives, channel_of(optimizer)._stream
        collectives.all_gather_object(None)
        assert stream._done < stream.given
        collectives.all_gather_object(None)
        return stream

    # The optimizers and their models are gone, but for cycles.
    streams = run(2, body, finish=False)
    gc.collect()
    assert all(stream._done == stream.given for stream in streams)


@over_nccl
def test_what_nccl_and_the_gpu_report_ends_the_next_update(gpu: Any) -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 2, late=False)
        optimizer.collectives.all_gather_object(None)
        if rank == 1:
            channel_of(optimizer)._comm.error = 6
            told = "rank 1: a collective on the GPU failed: NCCL_ERROR_6: remote process exited"
            with pytest.raises(NcclError, match=told):
                optimizer.update(loss, optimizer.target, rank, 2)
            assert channel_of(optimizer)._comm.aborted

    run(2, body)


@over_nccl
def test_who_cannot_launch_it_says_so_to_readers(gpu: Any) -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 2)

        def all_gather(*args: Any) -> None:
            raise MemoryError("there is none")

        channel_of(optimizer)._comm.allGather = all_gather
        with pytest.raises(MemoryError):
            optimizer.update(loss, optimizer.target, rank, 2)
        told = f"rank {rank}: the gathering .* has failed: MemoryError: there is none"
        with pytest.raises(RuntimeError, match=told):
            _ = optimizer.target.g.array

    run(2, body)


@over_nccl
def test_a_script_that_ends_gives_up_what_others_do_not_come_to(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nccl_gather, "PATIENCE_S", 0.02)

    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 2, late=False)
        channel = channel_of(optimizer)
        optimizer.collectives.all_gather_object(None)
        if rank == 0:
            monkeypatch.setattr(fake_streams.Event, "status", 600)
            channel.end()
            assert channel._comm.aborted
            monkeypatch.setattr(fake_streams.Event, "status", None)
        optimizer.collectives.all_gather_object(None)
        channel.end()
        assert channel._comm.aborted == (rank == 0)

    run(2, body)
    told = capsys.readouterr().err
    assert told.startswith("smorms3_dist: as the script ends: rank 0: a collective on the GPU did")
    assert told.count("\n") == 1


@pytest.mark.parametrize("gpu", ["staged", "nccl"], indirect=True)
def test_where_it_is_not_done(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    run(2, lambda optimizer, rank: train(optimizer, rank, 3, late=False))
    told = [r.getMessage() for r in caplog.records if "overlap_gather" in r.getMessage()]
    why = "parameters on GPUs do not go over NCCL"
    expected = [f"parameters are gathered within update (overlap_gather): on rank 0 {why}"]
    assert told == ([] if gpu.transport is NcclCollectives else expected)
