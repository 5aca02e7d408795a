"""Reduction during the backward pass on GPUs, on the host: the same bits, whatever happens.

Backward passes, packing, NCCL and updates are on streams that are as late as they may be, or in
random order. See `test_cuda_step.py`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from smorms3_dist import NoMoreBatches, create_multi_node_optimizer
from smorms3_dist.collectives import nccl_early
from smorms3_dist.collectives.nccl_early import NcclEarlyChannel
from smorms3_dist.collectives.nccl_waiting import NcclError
from smorms3_dist.collectives.through_host import ThroughHostCollectives
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.optimizer import overlap
from smorms3_dist.sharding import model as sharding_model
from smorms3_dist.step.way import Way

import backward_models
import chainer
import fake_cupy
import fake_streams
import models
import numpy as np
import pytest
from backward_models import Mixed, Mlp, Penalized, Rnn
from chainer import optimizer_hooks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_in_gpu import decay, hooked, on_gpu

STEPS = 5
over_nccl = pytest.mark.parametrize("gpu", ["nccl"], indirect=True)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several, of which some have no parameters of some ranks, and one has several."""
    monkeypatch.setattr(overlap, "early_gpu_bucket_bytes", lambda size: 10_000 * size)


class Uses(chainer.FunctionNode):
    """Uses a parameter; in its backward pass, the current stream computes the gradient."""

    def __init__(self, gradient: Callable[[], Any]) -> None:
        super().__init__()
        self.gradient = gradient

    def forward(self, inputs: Any) -> Any:
        return (inputs[0].copy(),)

    def backward(self, indexes: Any, grads: Any) -> Any:
        return grads[0], chainer.Variable(self.gradient())


def late_gradient(values: np.ndarray) -> Any:
    """What the current stream gives these values to, after garbage."""
    grad = fake_streams.keep_alive(np.full_like(values, np.nan).view(fake_cupy.DeviceArray))
    grad[...] = values.view(fake_cupy.DeviceArray)
    return grad


Watch = Callable[[str], None]


def loss(
    model: chainer.Link, rank: int, step: int, watch: Watch = lambda name: None
) -> chainer.Variable:
    """A loss whose backward pass comes to the parameters in an order of the rank's and the step's.

    Some steps leave one out. ``watch`` is called where each gradient is asked for.
    """
    names = [name for name, _ in sorted(model.namedparams())]
    if step % 3 == 2:
        names.remove("/e" if rank else "/c")
    if step % 2:
        names = names[rank:] + names[:rank]
    params = dict(model.namedparams())
    total = chainer.Variable(np.zeros((), np.float32))
    for name in names:

        def gradient(name: str = name) -> Any:
            watch(name)
            return late_gradient(models.gradient(name, params[name], rank, step))

        (total,) = Uses(gradient).apply((total, params[name]))
    return total


@contextlib.contextmanager
def computing() -> Iterator[Any]:
    """Makes the current stream a late one, and comes to its end."""
    with fake_streams.Stream() as compute:
        yield compute
        compute.synchronize()


def train(optimizer: Any, rank: int, steps: int = STEPS, late: bool = True) -> None:
    with computing() if late else contextlib.nullcontext():
        for step in range(steps):
            optimizer.update(loss, optimizer.target, rank, step)


def run(
    world: int, body: Callable[[Any, int], Any], wanted: Any = True, **options: Any
) -> list[tuple[Any, Any]]:
    """What the body returned on each rank, and the optimizers."""
    options.setdefault("make_model", on_gpu(models.Model))

    def both(optimizer: Any, rank: int) -> tuple[Any, Any]:
        return body(optimizer, rank), optimizer

    return models.on_ranks(world, both, overlap=wanted, **options)


def same_bits(world: int, body: Callable[[Any, int], Any], **options: Any) -> list[Any]:
    """The optimizers with overlap, of which the models are what they are without, bit for bit."""
    early, late = (run(world, body, wanted, **options) for wanted in (True, False))
    for (_, ours), (_, theirs) in zip(early, late, strict=True):
        models.assert_same_bits(ours.target, theirs.target)
        assert ours.t == theirs.t > 0
        assert isinstance(ours._overlap._channel, NcclEarlyChannel | None)
    models.assert_alike([optimizer.target for _, optimizer in early])
    return [optimizer for _, optimizer in early]


def in_order(optimizer: Any) -> bool:
    return bool(optimizer._overlap.has_order)


HOOKS: dict[str, tuple[Callable[[Any], None], Way]] = {
    "none": (lambda optimizer: None, Way.STREAMED),
    "decay": (decay, Way.STREAMED),
    "clipping": (lambda o: o.add_hook(optimizer_hooks.GradientClipping(0.5)), Way.CHECKED),
    "several": (hooked, Way.STAGED),
}


@over_nccl
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("hooks", HOOKS)
def test_parameters_come_out_the_same(gpu: Any, hooks: str, world: int) -> None:
    configure, way = HOOKS[hooks]

    def body(optimizer: Any, rank: int) -> None:
        configure(optimizer)
        # Norms and hooks of Chainer's compute at once.
        train(optimizer, rank, late=way is Way.STREAMED)
        assert optimizer._way is way

    optimizers = same_bits(world, body)
    assert all(map(in_order, optimizers))
    assert len(optimizers[0].layout.groups[0].buckets) > 3


@over_nccl
@pytest.mark.parametrize("sent", [None, "bfloat16", "float16"])
def test_narrow_dtypes_loss_scales_and_micro_batches(gpu: Any, sent: str | None) -> None:
    dtypes = {"a": "float16", "e": "float16", "c": "float64"}

    def body(optimizer: Any, rank: int) -> Any:
        optimizer.use_fp32_update()
        optimizer.loss_scaling(interval=2, scale=4.0)
        train(optimizer, rank, 2 * STEPS, late=False)
        return optimizer._loss_scale, dict(optimizer.collectives.bytes_sent)

    options = {
        "make_model": on_gpu(lambda: models.Model(dtypes=dtypes)),
        "communication_dtype": sent,
        "accumulate": 2,
    }
    optimizers = same_bits(2, body, **options)
    assert all(map(in_order, optimizers))
    assert len(optimizers[0].layout.groups) == 3


@over_nccl
@given(seed=st.integers(0, 2**32 - 1), often=st.sampled_from([0.1, 0.5, 0.9]))
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parameters_are_the_same_in_any_order_of_the_work_of_streams(
    gpu: Any, seed: int, often: float
) -> None:
    draw = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_streams.Stream, "luck", lambda: draw.random() < often)
        same_bits(2 + seed % 2, train)


@over_nccl
def test_buckets_are_on_their_way_while_others_are_computed_and_no_host_waits(gpu: Any) -> None:
    given: dict[int, list[int]] = {0: [], 1: []}

    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        with fake_streams.Stream() as compute:
            done = compute._done

            def watch(name: str) -> None:
                given[rank].append(optimizer._overlap._channel._comm._count)

            optimizer._overlap._channel._stream.synchronize()
            optimizer.update(loss, optimizer.target, rank, 4, watch=watch)
            assert compute._done == done
            # Who works first does the work of the others, too.
            optimizer.collectives.all_gather_object(None)
            compute.synchronize()

    (_, optimizer), _ = run(2, body)
    buckets = len(optimizer.layout.groups[0].buckets)
    for rank in (0, 1):
        first, *counts = given[rank]
        # All of the largest parameter, which comes first; the others share a bucket.
        assert {count - first for count in counts} == {buckets - 1} != {0}


@over_nccl
def test_gradients_live_until_the_stream_that_computes_waits_for_the_one_that_packs_them(
    gpu: Any,
) -> None:
    """CuPy's pool gives memory that nobody has any more to the next array, and asks no stream."""

    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3, late=False)
        optimizer._compute_gradients(loss, optimizer.target, rank, 3)
        grads = [param.grad for param in optimizer.target.params() if param.grad is not None]
        memory = [weakref.ref(grad.base) for grad in grads if grad.size]
        optimizer.target.cleargrads()
        del grads
        overlapped, stream = optimizer._overlap, optimizer._overlap._channel._stream
        assert stream._done < stream.given
        assert all(each() is not None for each in memory)
        # Who works first does the work of the others, too.
        optimizer.collectives.all_gather_object(None)
        overlapped._begun.end()
        overlapped._begun = None
        gc.collect()
        assert stream._done == stream.given
        assert not any(each() is not None for each in memory)

    run(2, body)


AGREED = {
    "no hooks": (lambda optimizer: None, Way.STREAMED),
    "clipping, then decay": (lambda o: (HOOKS["clipping"][0](o), decay(o)), Way.CHECKED),
}


@over_nccl
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("hooks", AGREED)
def test_ranks_agree_once_a_step_while_gpus_still_compute_gradients(
    gpu: Any, hooks: str, wanted: bool
) -> None:
    configure, way = AGREED[hooks]
    exchanges = "exchange_word", "exchange_note", "all_gather_object", "all_reduce_or"

    def body(optimizer: Any, rank: int) -> None:
        configure(optimizer)
        train(optimizer, rank, 3, late=False)
        host, told = optimizer.collectives._host, []

        def watched(name: str) -> Callable[[Any], Any]:
            exchange = getattr(host, name)

            def exchanged(value: Any) -> Any:
                told.append(name)
                given = compute.given
                if name == "exchange_word":
                    assert compute._done == done < given, "the host has waited for gradients"
                    # Norms compute at once: the stand-in is no later from here on.
                    compute.synchronize()
                    compute.__exit__()
                return exchange(value)

            return exchanged

        compute = fake_streams.Stream().__enter__()
        done = compute._done
        with mock.patch.multiple(host, **{name: watched(name) for name in exchanges}):
            optimizer.update(loss, optimizer.target, rank, 4)
        assert (told, optimizer._way) == (["exchange_word"], way)
        assert in_order(optimizer) == wanted

    run(2, body, wanted)


HELD_UP = ["fails", "brings gradients of its own", "has no more batches", "has ended its script"]


@over_nccl
@pytest.mark.parametrize("what", HELD_UP)
def test_no_rank_is_held_up_by_one_that_has_no_gradients_to_bring(gpu: Any, what: str) -> None:
    """Waiting for its whole GPU, as CuPy does that runs short of memory, amid its backward pass."""

    def wait_for_gpu(optimizer: Any) -> Watch:
        return lambda name: optimizer._overlap._channel._stream.synchronize()

    def fail(name: str) -> None:
        raise FloatingPointError("at once")

    def body(optimizer: Any, rank: int) -> None:
        model = optimizer.target
        train(optimizer, rank, 3)
        overlapped, channel = in_order(optimizer), optimizer._overlap._channel
        if what == "has ended its script":
            if rank == 1:
                optimizer._overlap.end()
                return
            with pytest.raises(RuntimeError, match="rank 1 has ended its script after 3 updates"):
                optimizer.update(loss, model, rank, 3, watch=wait_for_gpu(optimizer))
        elif what == "has no more batches":
            if rank == 1:
                optimizer.no_more_batches()
            else:
                with pytest.raises(NoMoreBatches):
                    optimizer.update(loss, model, rank, 3, watch=wait_for_gpu(optimizer))
        elif rank == 0:
            watch = wait_for_gpu(optimizer) if overlapped else lambda name: None
            optimizer.update(loss, model, rank, 3, watch=watch)
        elif what == "fails":
            with pytest.raises(FloatingPointError):
                optimizer.update(loss, model, rank, 4, watch=fail)
            optimizer.update(loss, model, rank, 3)
        else:
            models.set_gradients(model, rank, 3)
            optimizer.update()
        assert not in_order(optimizer)
        if what == "has ended its script":
            return
        if overlapped and what != "has no more batches":
            # What was not made use of is over.
            stream = channel._stream
            assert stream._done == stream.given
        train(optimizer, rank, 3)
        assert in_order(optimizer) == (overlapped and what != "has no more batches")

    if what == "has ended its script":
        (_, goes_on), (_, has_ended) = run(2, body)
        assert goes_on._overlap.state == "none"
        channel = has_ended._overlap._channel
        assert channel._is_under_way
        channel.end()
        assert channel._stream._done == channel._stream.given
        assert not channel._is_under_way and not channel._comm.aborted
    elif what == "has no more batches":
        optimizers = [optimizer for _, optimizer in run(2, body, uneven="stop")]
        assert [optimizer._overlap.state for optimizer in optimizers] == ["none"] * 2
        models.assert_alike([optimizer.target for optimizer in optimizers])
    else:
        same_bits(2, body)


@over_nccl
@pytest.mark.parametrize("model", [Mlp, Rnn, Mixed, Penalized])
def test_models_of_all_kinds_come_out_the_same(gpu: Any, model: type[chainer.Chain]) -> None:
    def body(optimizer: Any, rank: int) -> None:
        if model is Mixed:
            optimizer.use_fp32_update()
        backward_models.train(optimizer, rank)

    optimizers = same_bits(2, body, make_model=on_gpu(model))
    assert all(map(in_order, optimizers))


@over_nccl
def test_two_optimizers_take_turns_on_a_gpu_that_is_not_the_current_one(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = CudaMemory(1, sys.modules["cupy"], gpu.launcher)
    monkeypatch.setattr(sharding_model, "memory_of", lambda device, exact: elsewhere)

    def make_model() -> chainer.Link:
        with fake_cupy.Device(1):
            return on_gpu(models.Model)()

    def body(optimizer: Any, rank: int) -> None:
        other = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), optimizer.collectives, overlap=optimizer.overlap
        ).setup(make_model())
        for step in range(STEPS):
            for each in (optimizer, other):
                each.update(loss, each.target, rank, step)
        with fake_cupy.Device(1):
            models.assert_same_bits(optimizer.target, other.target)
        assert in_order(optimizer) == in_order(other) == optimizer.overlap
        for each in (optimizer, other):
            # As after a step that has kept no mean.
            each.sharded_model.staged = {}
            each._overlap.end()

    fake_cupy.Device.used.clear()
    with fake_cupy.Device(1):  # of this thread; ranks have others
        same_bits(2, body, make_model=make_model)
    assert fake_cupy.Device.used == {1}


@over_nccl
def test_what_nccl_and_the_gpu_report_ends_the_update(gpu: Any) -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        if rank == 0:
            return
        optimizer._compute_gradients(loss, optimizer.target, rank, 3)
        begun, channel = optimizer._overlap._begun, optimizer._overlap._channel
        channel._comm.error = 6
        told = "rank 1: a collective on the GPU failed: NCCL_ERROR_6: remote process exited"
        with pytest.raises(NcclError, match=told):
            next(begun.arrivals(optimizer.sharded_model.groups[0]))
        assert channel._comm.aborted

    run(2, body)


@over_nccl
def test_a_hand_over_that_fails_is_not_made_use_of(gpu: Any) -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        channel = optimizer._overlap._channel
        channel._buckets.reduce = mock.Mock(side_effect=MemoryError("there is none"))
        with pytest.raises(MemoryError):
            optimizer.update(loss, optimizer.target, rank, 3)
        told = f"rank {rank}: the reduction .* has failed: MemoryError: there is none"
        with pytest.raises(RuntimeError, match=told):
            optimizer.update(loss, optimizer.target, rank, 3)

    run(2, body)


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_where_it_is_not_done(gpu: Any, wanted: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(2, lambda optimizer, rank: train(optimizer, rank, 3, late=False), wanted)
    told = [r.getMessage() for r in caplog.records if "(overlap)" in r.getMessage()]
    reason = "on rank 0 gradients on GPUs do not go over NCCL"
    expected = f"gradients are reduced after the backward pass (overlap): {reason}"
    staged = gpu.transport is ThroughHostCollectives
    assert told == ([expected] if staged and wanted is True else [])


@over_nccl
def test_a_script_that_ends_gives_up_what_the_others_do_not_come_to(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl_early, "PATIENCE_S", 0.02)

    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 2)
        channel = optimizer._overlap._channel
        channel.end()
        assert not channel._comm.aborted
        if rank == 1:

            def fail(name: str) -> None:
                if name == "/c":
                    raise FloatingPointError("half-way")

            with pytest.raises(FloatingPointError):
                optimizer.update(loss, optimizer.target, rank, 2, watch=fail)
            optimizer._overlap.end()
            monkeypatch.setattr(fake_streams.Event, "status", 600)
            channel.end()
            assert channel._comm.aborted

    run(2, body)


@over_nccl
def test_a_script_ends_although_nothing_can_be_begun_on_its_gpu(
    gpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 2)
        channel = optimizer._overlap._channel
        channel._buckets.reduce = mock.Mock(side_effect=MemoryError("there is none"))
        optimizer._overlap.end()
        channel.end()

    run(2, body)
    told = "begins no reduction as its script ends: MemoryError: there is none"
    lines = sorted(capsys.readouterr().err.splitlines())
    assert lines == [f"smorms3_dist: rank {rank} {told}" for rank in (0, 1)]
