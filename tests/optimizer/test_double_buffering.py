"""Each update applies the gradients of the one before, as ChainerMN's double buffering does."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable, Iterable
from typing import Any

import smorms3_dist
from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.collectives import beside
from smorms3_dist.collectives.mpi import MpiCollectives

import chainer
import chainermn.optimizers
import models
import numpy as np
import pytest
from chainer import optimizers
from late_trainings import CALLS, clip, decay, train
from rank_threads import Meeting, ThreadCollectives, ThreadSideChannel, run_ranks

RULES: list[Any] = [optimizers.SMORMS3, optimizers.Adam, optimizers.SGD]


class Stream:
    """In the place of CuPy's, with nothing to wait for."""

    def __init__(self, non_blocking: bool = False) -> None:
        pass

    def synchronize(self) -> None:
        pass


Stream.null = Stream()  # type: ignore[attr-defined]


class Averaging:
    """ChainerMN's communicator, whose all-reduce knows the gradients of all ranks."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self.step = 0

    def bcast_data(self, model: Any) -> None:
        pass

    def _multi_node_mean_grad_async(self, model: Any, zero_fill: bool, stream: Any) -> None:
        models.set_mean_gradients(model, self._world_size, self.step)


def chainermns(
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
    make: Callable[[], Any] = optimizers.SMORMS3,
    configure: Callable[[Any], None] = lambda optimizer: None,
    calls: Iterable[int] = CALLS,
    make_model: Callable[[], chainer.Link] = models.Model,
) -> chainer.Link:
    """A model that ChainerMN's own class has trained."""
    monkeypatch.setattr(chainer.cuda, "Stream", Stream)
    comm = Averaging(world_size)
    optimizer = chainermn.optimizers._DoubleBufferingOptimizer(make(), comm, True)
    optimizer.setup(make_model())
    configure(optimizer)
    for comm.step in calls:
        models.train(optimizer, 0, [comm.step])
    assert optimizer.t == len(list(calls)) - 2
    return optimizer.target


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("configure", [lambda optimizer: None, decay, clip])
def test_it_is_chainermns_training_bit_for_bit(
    make: Any, configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for world_size in (1, 2):
        theirs = chainermns(monkeypatch, world_size, make, configure)
        for gradients in ("sharded", "replicated"):
            for optimizer in train(world_size, make, configure, gradients=gradients):
                assert optimizer.t == len(CALLS) - 2
                assert optimizer.gradient_mode == gradients
                models.assert_same_bits(optimizer.target, theirs)
                rules = {n: p.update_rule.t for n, p in optimizer.target.namedparams()}
                assert rules == {n: p.update_rule.t for n, p in theirs.namedparams()}


@pytest.mark.parametrize("in_threads", [True, False])
def test_on_more_ranks_in_threads_and_at_once(
    in_threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = {"a": "float16", "c": "float16"}

    def make_model() -> models.Model:
        return models.Model(dtypes=half)

    for world_size in (3, 4):
        theirs = chainermns(monkeypatch, world_size, make_model=make_model)
        ours = train(world_size, in_threads=in_threads, make_model=make_model)
        for optimizer in ours:
            models.assert_same_bits(optimizer.target, theirs)


def test_it_differs_from_a_training_that_is_not_late() -> None:
    def body(optimizer: Any, rank: int) -> Any:
        models.train(optimizer, rank, CALLS)
        return optimizer

    (late,), (other,) = train(1), models.on_ranks(1, body)
    assert late.t == other.t - 1
    assert not np.array_equal(late.target.g.array, other.target.g.array)


def test_gradients_are_taken_so_that_their_arrays_can_be_written_to() -> None:
    """What is reduced while the next gradients are computed is not what these are written to."""

    def reuse(optimizer: Any, rank: int) -> None:
        own = {n: np.empty_like(p.array) for n, p in optimizer.target.namedparams()}
        for step in CALLS:
            for name, param in optimizer.target.namedparams():
                own[name][...] = models.gradient(name, param, rank, step)
                param.grad = own[name]
            channel = optimizer._in_flight._channel
            if channel is not None:
                # Only now does the thread read the gradients of the update before.
                channel.gate.set()
                channel.start = functools.partial(start_later, channel)
            with np.errstate(all="ignore"):
                optimizer.update()
            assert step == 0 or all(param.grad is None for param in optimizer.target.params())
        channel.gate.set()

    def start_later(channel: Any, work: Any) -> None:
        channel.gate.clear()
        type(channel).start(channel, work)

    for ours, theirs in zip(train(2, body=reuse), train(2), strict=True):
        models.assert_same_bits(ours.target, theirs.target)


def test_a_model_change_broadcasts_and_drops_the_gradients_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def grow(model: Any) -> None:
        with model.init_scope():
            model.late = chainer.Parameter(np.arange(5, dtype="f"))

    def change(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS[:4])
        assert optimizer.t == 2
        grow(optimizer.target)
        optimizer.target.late.update_rule = optimizer.actual_optimizer.create_update_rule()
        models.train(optimizer, rank, CALLS[4:])
        assert optimizer.t == 3

    monkeypatch.setattr(chainer.cuda, "Stream", Stream)
    comm = Averaging(2)
    theirs = chainermn.optimizers._DoubleBufferingOptimizer(optimizers.SMORMS3(), comm, True)
    theirs.setup(models.Model())
    for comm.step in CALLS:
        if comm.step == 4:
            grow(theirs.target)
            theirs.target.late.update_rule = theirs.actual_optimizer.create_update_rule()
        models.train(theirs, 0, [comm.step])
    for optimizer in train(2, body=change):
        models.assert_same_bits(optimizer.target, theirs.target)


def test_a_replaced_rule_keeps_the_gradients_in_flight() -> None:
    def replace(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS[:4])
        for param in optimizer.target.params():
            param.update_rule = optimizers.SGD(0.5).create_update_rule()
        models.train(optimizer, rank, CALLS[4:5])
        assert optimizer.t == 3

    def applied(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS[:4])
        for name, param in optimizer.target.namedparams():
            grads = [models.gradient(name, param, r, 3) for r in range(2)]
            expected[name] = param.array - np.float32(0.5) * models.mean_gradient(grads)

    expected: dict[str, Any] = {}
    train(2, body=applied)
    for optimizer in train(2, body=replace):
        for name, param in optimizer.target.namedparams():
            np.testing.assert_array_equal(param.array, expected[name], name)


def test_the_loss_scale_is_that_of_the_gradients_in_flight() -> None:
    """A scale that is changed between two updates belongs to those that come later."""

    def scaled(optimizer: Any, rank: int) -> None:
        optimizer.loss_scaling(interval=1000, scale=4.0)
        for step in CALLS:
            scale = 4.0 * 2 ** (step % 3)
            optimizer.actual_optimizer._loss_scale = scale
            models.set_gradients(optimizer.target, rank, step)
            for param in optimizer.target.params():
                param.grad *= np.float32(scale)
                param._loss_scale = scale
            optimizer.update()

    def run(optimizer: Any, rank: int) -> None:
        with np.errstate(all="ignore"):
            scaled(optimizer, rank)

    for gradients in ("sharded", "replicated"):
        for ours, theirs in zip(train(2, body=run, gradients=gradients), train(2), strict=True):
            assert ours.t == theirs.t
            models.assert_same_bits(ours.target, theirs.target)


def test_a_gradient_in_flight_that_is_not_finite_is_left_out_by_dynamic_scaling() -> None:
    def body(optimizer: Any, rank: int) -> None:
        optimizer.loss_scaling(interval=1000)
        optimizer.actual_optimizer._loss_scale = 8.0
        for step in range(4):
            models.set_gradients(optimizer.target, rank, step)
            if step == 1 and rank == 1:
                optimizer.target.a.grad[0, 0] = np.inf
            before = optimizer.target.g.array.copy()
            with np.errstate(all="ignore"):
                optimizer.update()
            changed = not np.array_equal(before, optimizer.target.g.array)
            assert changed == (step == 3)
            if step == 2:
                assert optimizer.actual_optimizer._loss_scale == 4.0

    with pytest.warns(UserWarning, match="mean gradient of /a is not finite"):
        train(2, body=body)


def test_micro_batches_are_one_gradient_in_flight() -> None:
    def micro(optimizer: Any, rank: int) -> None:
        for step in CALLS:
            for _ in range(2):
                # The mean of two alike is exact.
                models.train(optimizer, rank, [step])

    for ours, theirs in zip(train(2, body=micro, accumulate=2), train(2), strict=True):
        models.assert_same_bits(ours.target, theirs.target)


def test_check_finite_names_the_gradient_before_it_is_in_flight() -> None:
    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS[:3])
        models.set_gradients(optimizer.target, rank, 3)
        if rank == 1:
            optimizer.target.e.grad[1, 1] = np.nan
        with pytest.raises(RuntimeError, match=r"/e.* rank 1"):
            optimizer.update()
        assert optimizer.t == 1

    train(2, body=body, check_finite="error")


def test_a_rank_without_it_is_named() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = models.optimizer_for(
            models.Model(), collectives, double_buffering=collectives.rank == 1
        )
        with pytest.raises(RuntimeError, match="double_buffering: False on rank 0, True on rank 1"):
            optimizer.update()

    run_ranks(2, run)


def test_a_rule_on_whole_arrays_is_refused_before_anything_changes() -> None:
    def body(optimizer: Any, rank: int) -> None:
        before = models.arrays(optimizer.target)
        for call in (optimizer.update, optimizer.lay_out):
            with pytest.raises(
                RuntimeError, match=r"double_buffering=True .* NormalizedRule .* /a"
            ):
                call()
        assert optimizer.layout is None
        assert all(param is before[name] for name, param in models.arrays(optimizer.target).items())

    train(1, make=lambda: models.OwnOptimizer(models.NormalizedRule), body=body)


def test_a_failing_reduction_fails_the_next_update_with_its_rank_and_cause() -> None:
    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS[:3])
        channel = optimizer._in_flight._channel
        optimizer.in_flight  # noqa: B018  # what is under way ends well
        channel.fault = OSError("the network is down")
        models.train(optimizer, rank, CALLS[3:4])
        models.set_gradients(optimizer.target, rank, 4)
        with pytest.raises(
            RuntimeError, match=f"rank {rank}: the reduction .* OSError: the network is down"
        ):
            optimizer.update()

    train(2, body=body)


def test_copies_and_pickles_have_the_gradient_in_flight() -> None:
    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS[:4])
        deep = copy.deepcopy(optimizer)
        restored = pickle.loads(pickle.dumps(optimizer))
        restored.communicator = optimizer.communicator
        for twin in (optimizer, deep, restored):
            models.train(twin, rank, CALLS[4:])
            models.assert_same_bits(twin.target, optimizer.target)

    train(1, body=body)


def test_after_the_step_the_gradients_that_it_has_applied_can_be_gathered() -> None:
    def body(optimizer: Any, rank: int) -> None:
        optimizer.keep_gradients = True
        models.train(optimizer, rank, CALLS[:2])
        optimizer.gather_gradients()
        assert all(param.grad is None for param in optimizer.target.params())
        models.train(optimizer, rank, CALLS[2:3])
        optimizer.gather_gradients()
        for name, param in optimizer.target.namedparams():
            grads = [models.gradient(name, param, r, 1) for r in range(2)]
            np.testing.assert_array_equal(param.grad, models.mean_gradient(grads))

    for gradients in ("sharded", "replicated"):
        train(2, body=body, gradients=gradients)


def test_chainermns_double_buffering_optimizer_is_taken_over_before_gradients_are_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chainer.cuda, "Stream", Stream)
    theirs = chainermns(monkeypatch, 1)

    def run(collectives: ThreadCollectives, calls: int) -> None:
        comm = Averaging(1)
        old = chainermn.optimizers._DoubleBufferingOptimizer(optimizers.SMORMS3(), comm, True)
        old.setup(models.Model())
        for comm.step in CALLS[:calls]:
            models.train(old, 0, [comm.step])
        object.__setattr__(old, "communicator", collectives)
        if calls > 1:
            with pytest.raises(TypeError, match="one update late, and those of its last update"):
                smorms3_dist.shard(old)
            return
        optimizer = smorms3_dist.shard(old)
        assert optimizer.double_buffering
        models.train(optimizer, 0, CALLS[calls:])
        assert optimizer.t == len(CALLS) - 2
        models.assert_same_bits(optimizer.target, theirs)

    for calls in range(3):
        run_ranks(1, lambda collectives, calls=calls: run(collectives, calls))


@pytest.mark.parametrize(
    "options",
    [
        {"communication_dtype": "bfloat16"},
        {"communication_dtype": "bfloat16", "gather_dtype": "bfloat16"},
        {"uneven": "stop"},
    ],
)
def test_other_options_do_what_they_do_without_it(options: dict[str, str]) -> None:
    def usual(optimizer: Any, rank: int) -> Any:
        models.train(optimizer, rank, CALLS[:-1])
        return optimizer

    (theirs, *_) = models.on_ranks(3, usual, **options)
    for optimizer in train(3, **options):
        models.assert_same_bits(optimizer.target, theirs.target)


def test_a_training_that_steps_after_the_broadcast_loses_the_last_gradient_alone() -> None:
    def late(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS)
        assert optimizer.t == len(CALLS) - 1

    def usual(optimizer: Any, rank: int) -> Any:
        models.train(optimizer, rank, CALLS[:-1])
        return optimizer

    (theirs, *_) = models.on_ranks(2, usual, step_after_broadcast=True)
    for optimizer in train(2, body=late, step_after_broadcast=True):
        models.assert_same_bits(optimizer.target, theirs.target)


def test_setup_drops_the_gradient_in_flight() -> None:
    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS[:4])
        optimizer.setup(models.Model())
        models.train(optimizer, rank, CALLS)

    for ours, theirs in zip(train(2, body=body), train(2), strict=True):
        models.assert_same_bits(ours.target, theirs.target)


def test_two_optimizers_of_one_communicator_have_a_channel_each() -> None:
    def run(collectives: ThreadCollectives) -> list[Any]:
        collectives.has_side_channel = True
        both = [
            create_multi_node_optimizer(optimizers.SMORMS3(), collectives, True).setup(
                models.Model(seed=seed)
            )
            for seed in (0, 1)
        ]
        for step in CALLS:
            for optimizer in both if step % 2 else reversed(both):
                models.train(optimizer, collectives.rank, [step])
        return both

    (theirs, *_) = train(3)
    for first, second in run_ranks(3, run):
        models.assert_same_bits(first.target, theirs.target)
        assert not np.array_equal(second.target.g.array, theirs.target.g.array)


def test_mpi_without_threads_is_refused_with_what_to_do() -> None:
    facts: Any = types.SimpleNamespace(
        size=2, rank=1, _MPI=types.SimpleNamespace(Query_thread=lambda: 1, THREAD_MULTIPLE=3)
    )
    with pytest.raises(RuntimeError, match=r"MPI_THREAD_MULTIPLE, .* on rank 1\. Do not lower"):
        MpiCollectives.check_side_channel(facts)
    facts.size = 1
    MpiCollectives.check_side_channel(facts)


def test_a_script_ends_although_another_rank_never_comes_to_the_last_reduction(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(beside, "_PATIENCE_S", 0.05)

    def run(collectives: ThreadCollectives) -> None:
        channel = ThreadSideChannel(collectives, Meeting(1, 60.0))
        channel.gate.clear()
        channel.start(lambda ranks: ranks.reduce_scatter(None, None, None))  # type: ignore
        beside._end()
        assert "rank 0 ends, although the reduction of the gradients" in capsys.readouterr().err
        channel.fault = OSError("it was given up")
        channel.gate.set()
        with pytest.raises(RuntimeError, match="it was given up"):
            channel.finish()

    run_ranks(1, run)
