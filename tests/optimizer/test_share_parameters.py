"""`share_parameters=True`: one array of parameters a host, and the same training."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist import create_multi_node_optimizer, load_checkpoint, save_checkpoint
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.model import ModelView
from smorms3_dist.waiting import Wait

import backward_models
import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks, optimizers
from late_trainings import train as train_late
from rank_threads import ThreadCollectives, run_ranks

HOSTS = [[0, 0, 0, 0], [0, 1, 0, 0]]


def trained(optimizer: Any, rank: int, steps: int = 4) -> None:
    models.train(optimizer, rank, range(steps))


def shares(optimizer: Any) -> bool:
    return bool(optimizer.sharded_model.shares)


def several_hooks(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))
    optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))
    optimizer.add_hook(optimizer_hooks.GradientLARS(weight_decay=0.01))


def own_hook(optimizer: Any) -> None:
    class Shrink:
        name, call_for_each_param, is_elementwise = "shrink", True, True
        timing = "post"

        def __call__(self, rule: Any, param: Any) -> None:
            param.array *= np.float32(0.75)

    optimizer.add_hook(Shrink())


def looks_at_everything(optimizer: Any) -> None:
    def look(inner: Any) -> None:
        for param in inner.target.params():
            param.grad *= 1 + param.array.size % 2
            assert np.isfinite(param.array).all()

    for timing in ("pre", "post"):
        optimizer.add_hook(look, f"look {timing}", timing=timing)


def masters(optimizer: Any) -> None:
    optimizer.use_fp32_update()
    optimizer.loss_scaling(scale=8)


@pytest.mark.parametrize("host_of", HOSTS, ids=str)
@pytest.mark.parametrize(
    ("configure", "options"),
    [
        (several_hooks, {}),
        (own_hook, {}),
        (looks_at_everything, {}),
        (masters, {}),
        (several_hooks, {"gradients": "replicated"}),
        (lambda optimizer: None, {"gather_dtype": "bfloat16"}),
        (own_hook, {"gather_dtype": "bfloat16"}),
        (looks_at_everything, {"gather_dtype": "float16", "communication_dtype": "float16"}),
        (several_hooks, {"accumulate": 2, "check_finite": "error"}),
    ],
)
def test_a_training_is_the_same_bit_for_bit(
    configure: Callable[[Any], None],
    options: dict[str, Any],
    host_of: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ThreadCollectives, "host_of", host_of)
    dtypes = {"a": "float16", "g": "float16"} if configure is masters else {}

    def body(optimizer: Any, rank: int) -> Any:
        configure(optimizer)
        for param in optimizer.target.params():
            param.array[...] += param.dtype.type(rank)  # rank 0's count
        trained(optimizer, rank, 6)
        optimizer.check_sync()
        return optimizer

    private, shared = (
        models.on_ranks(
            4, body, make_model=lambda: models.Model(dtypes=dtypes), share_parameters=on, **options
        )
        for on in (False, True)
    )
    assert not any(map(shares, private)) and all(map(shares, shared))
    for one, other in zip(private, shared, strict=True):
        models.assert_same_bits(one.target, other.target)
    ours, theirs = map(models.gathered_states, (shared, private))
    for name, states in theirs.items():
        for state, values in states.items():
            assert models.bits(ours[name][state]) == models.bits(values), (name, state)


@pytest.mark.parametrize("host_of", HOSTS, ids=str)
def test_so_it_is_with_gradients_in_flight_and_during_the_backward_pass(
    host_of: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadCollectives, "host_of", host_of)
    private, shared = (train_late(4, share_parameters=on) for on in (False, True))
    assert all(map(shares, shared))
    models.assert_same_bits(private[0].target, shared[3].target)

    def body(optimizer: Any, rank: int) -> None:
        backward_models.train(optimizer, rank)
        assert shares(optimizer)

    backward_models.same_bits(4, body, share_parameters=True)


def test_the_ranks_of_a_host_have_one_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadCollectives, "host_of", [0, 1, 0])

    def body(optimizer: Any, rank: int) -> None:
        trained(optimizer, rank, 2)
        sent = optimizer.collectives.bytes_sent["all_gather"]
        flats = [group.buffers.flat for group in optimizer.sharded_model.groups]
        # Each part goes once to the other host, and that of the lone rank, too.
        assert sent == sum(flat.nbytes for flat in flats) // 3
        array = optimizer.target.g.array
        if rank == 0:
            array[3, 7] = 77
        optimizer.collectives.meet_on_host()
        assert (array[3, 7] == 77) == (rank != 1)
        assert np.shares_memory(array, flats[0])

    models.on_ranks(3, body, share_parameters=True)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_more_ranks_than_elements(world_size: int) -> None:
    def make() -> chainer.Link:
        return models.Model({"a": (1,), "b": (0, 3), "c": (3,)}, {"a": "float64"})

    private, shared = (
        models.train_sharded(world_size, make, range(4), share_parameters=on)
        for on in (False, True)
    )
    assert shares(shared[0]) is (world_size > 1)
    for one, other in zip(private, shared, strict=True):
        models.assert_same_bits(one.target, other.target)


def await_meeting(wait: Wait, passed: threading.Event) -> None:
    """Waits until a rank waits for the others of its host; fails if it passes instead."""
    for _ in range(60_000):
        assert not passed.is_set(), "it has gone on"
        if wait.at == "in the meeting of the ranks of its host":
            return
        time.sleep(0.001)
    raise AssertionError(f"it does not come; it waits {wait.at}")


def test_nobody_leaves_an_update_before_all_of_the_host_have_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = threading.Event()
    waits, slow = {}, []
    update = ShardedGroup.update_piece

    def late_update(group: ShardedGroup, piece: Any, mean: Any) -> None:
        if group.shard.rank == 1:
            slow.append(piece)
            await_meeting(waits[0], left)
        update(group, piece, mean)

    def body(optimizer: Any, rank: int) -> None:
        waits[rank] = optimizer.collectives.wait
        # The update comes when the reduction is over, from which no rank comes before the others.
        optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))
        optimizer.update()
        models.set_gradients(optimizer.target, rank, 1)
        optimizer.update()
        if rank == 0:
            left.set()

    monkeypatch.setattr(ShardedGroup, "update_piece", late_update)
    models.on_ranks(2, body, make_model=lambda: models.Model({"a": (100,)}), share_parameters=True)
    assert slow and left.is_set()


def test_nobody_updates_before_hooks_of_other_ranks_have_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updated = threading.Event()
    waits = {}
    update = ShardedGroup.update_by_whole_gradients

    def noted_update(group: ShardedGroup) -> None:
        update(group)
        updated.set()

    monkeypatch.setattr(ShardedGroup, "update_by_whole_gradients", noted_update)

    def body(optimizer: Any, rank: int) -> None:
        def reads_slowly(rule: Any, param: Any) -> None:
            if rank == 1:
                await_meeting(waits[0], updated)

        waits[rank] = optimizer.collectives.wait
        optimizer.target.a.update_rule.add_hook(reads_slowly)
        optimizer.update()
        models.set_gradients(optimizer.target, rank, 1)
        optimizer.update()

    models.on_ranks(
        2,
        body,
        make_model=lambda: models.Model({"a": (7,)}),
        share_parameters=True,
        gradients="replicated",
    )
    assert updated.is_set()


def writes(param: Any) -> None:
    param.array *= np.float32(0.5)


def replaces(param: Any) -> None:
    param.array = param.array * np.float32(0.5)


@pytest.mark.parametrize("of_rule", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (writes, "hooks of .* writes to whole parameters, on every rank"),
        (replaces, "parameter /a was given another array in the middle of an update"),
    ],
)
@pytest.mark.parametrize("timing", ["pre", "post"])
def test_hooks_that_change_whole_parameters_are_refused(
    timing: str, change: Callable[[Any], None], message: str, of_rule: bool
) -> None:
    def body(optimizer: Any, rank: int) -> None:
        trained(optimizer, rank, 2)
        before = models.bits(optimizer.target.a.array)
        if of_rule:
            rule = optimizer.target.a.update_rule
            rule.add_hook(lambda rule, param: change(param), "mine", timing=timing)
        else:
            optimizer.add_hook(lambda inner: change(inner.target.a), "mine", timing=timing)
        with pytest.raises(RuntimeError, match=rf"{message}.*share_parameters") as error:
            trained(optimizer, rank, 1)
        assert "leave share_parameters out" in str(error.value)
        if timing == "pre" and change is writes:
            assert models.bits(optimizer.target.a.array) == before
        optimizer.target.b.array[...] = 3  # not for ever

    models.on_ranks(2, body, share_parameters=True)


def test_an_elementwise_hook_that_sees_whole_parameters_is_told_why() -> None:
    def body(optimizer: Any, rank: int) -> None:
        own_hook(optimizer)
        with pytest.raises(RuntimeError, match=r"to whole param.*gradients='replicated' was not"):
            trained(optimizer, rank)

    models.on_ranks(2, body, share_parameters=True, gradients="replicated")


def test_what_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(optimizer: Any, error: type[Exception], message: str) -> None:
        before = models.arrays(optimizer.target)
        for call in (optimizer.update, optimizer.lay_out):
            with pytest.raises(error, match=f"share_parameters=True was asked for, but {message}"):
                call()
        assert optimizer.layout is None
        after = models.arrays(optimizer.target)
        assert all(after[name] is array for name, array in before.items())

    models.on_ranks(
        2,
        lambda optimizer, rank: refused(
            optimizer,
            RuntimeError,
            "NormalizedRule of parameter /a runs on whole arrays: .* Leave share_parameters out",
        ),
        lambda: models.OwnOptimizer(models.NormalizedRule),
        share_parameters=True,
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            ModelView, "memory", lambda self, exact: types.SimpleNamespace(launcher=object())
        )
        models.on_ranks(
            2,
            lambda optimizer, rank: refused(
                optimizer, ValueError, "it is for models in host memory, and this one is on a GPU"
            ),
            share_parameters=True,
        )
    monkeypatch.setattr(ThreadCollectives, "why_not_shared", Collectives.why_not_shared)
    models.on_ranks(
        2,
        lambda optimizer, rank: refused(
            optimizer, ValueError, "the communicator is not MPI's own; leave share_parameters out"
        ),
        share_parameters=True,
    )


def test_without_such_files_each_rank_has_its_own_and_rank_0_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(os, "memfd_create")

    def body(optimizer: Any, rank: int) -> Any:
        trained(optimizer, rank, 2)
        optimizer.target.add_param("late", (3,))
        optimizer.target.late.array[...] = 1
        trained(optimizer, rank, 3)
        return optimizer

    with caplog.at_level(logging.WARNING, "smorms3_dist"):
        shared = models.on_ranks(3, body, share_parameters=True)
    (record,) = caplog.records
    assert "each rank has parameters of its own: ranks 0-2: this system has no memfd_create" in (
        record.getMessage()
    )
    private = models.on_ranks(3, body)
    assert not any(map(shares, shared))
    models.assert_same_bits(shared[0].target, private[0].target)


def test_a_checkpoint_comes_back_at_any_world_size(tmp_path: Path) -> None:
    def first(optimizer: Any, rank: int) -> Any:
        trained(optimizer, rank, 3)
        save_checkpoint(tmp_path, optimizer)
        models.train(optimizer, rank % 2, range(3, 5))
        return optimizer

    def second(optimizer: Any, rank: int) -> Any:
        # Of a training that is under way: what it shares is written over.
        trained(optimizer, rank, 2)
        load_checkpoint(tmp_path, optimizer)
        assert shares(optimizer)
        models.train(optimizer, rank % 2, range(3, 5))
        return optimizer

    straight = models.on_ranks(2, first)
    for world_size in (2, 4):
        resumed = models.on_ranks(world_size, second, share_parameters=True)
        models.assert_alike([optimizer.target for optimizer in resumed])
        if world_size == 2:
            models.assert_same_bits(resumed[0].target, straight[0].target)
        else:
            # Twice the ranks with the same gradients: the same means, but for rounding.
            for name, array in models.arrays(straight[0].target).items():
                found = models.arrays(resumed[0].target)[name]
                np.testing.assert_allclose(found, array, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("host_of", [[0, 0, 0], [0, 1, 1]], ids=str)
def test_arrays_that_parameters_get_between_updates_count(
    host_of: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadCollectives, "host_of", host_of)

    def body(optimizer: Any, rank: int) -> Any:
        trained(optimizer, rank, 2)
        optimizer.target.e.array = np.ones_like(optimizer.target.e.array)
        trained(optimizer, rank, 2)
        optimizer.target.g.array = np.full_like(optimizer.target.g.array, 2)
        optimizer.lay_out()
        assert (optimizer.target.g.array == 2).all()
        return optimizer

    private, shared = (models.on_ranks(3, body, share_parameters=on) for on in (False, True))
    for one, other in zip(private, shared, strict=True):
        models.assert_same_bits(one.target, other.target)


def test_what_is_added_in_place_is_added_by_each_and_rank_0_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def loads_and_replaces(optimizer: Any, rank: int) -> None:
        trained(optimizer, rank, 2)
        save_checkpoint(tmp_path, optimizer)
        trained(optimizer, rank, 1)
        load_checkpoint(tmp_path, optimizer)
        trained(optimizer, rank, 1)
        optimizer.target.g.array = np.zeros_like(optimizer.target.g.array)
        trained(optimizer, rank, 1)

    def adds(optimizer: Any, rank: int) -> None:
        trained(optimizer, rank, 2)
        for _ in range(2):
            optimizer.target.g.array[...] = 0
            optimizer.collectives.meet_on_host()
            for turn in range(3):
                if turn == rank:
                    optimizer.target.g.array += 1
                optimizer.collectives.meet_on_host()
            assert (optimizer.target.g.array == 3).all()
            trained(optimizer, rank, 1)

    with caplog.at_level(logging.WARNING, "smorms3_dist"):
        models.on_ranks(3, loads_and_replaces, share_parameters=True)
        assert not caplog.records
        models.on_ranks(3, adds, share_parameters=True)
    (record,) = caplog.records
    assert "written to param.array between updates" in record.getMessage()


@pytest.mark.parametrize("rank_that_differs", [0, 1])
def test_arrays_that_differ_are_found_before_they_are_shared(rank_that_differs: int) -> None:
    def body(optimizer: Any, rank: int) -> None:
        trained(optimizer, rank, 2)
        before = optimizer.target.e.array.copy()
        if rank == rank_that_differs:
            optimizer.target.e.array = before + 1
        for call in (optimizer.update, optimizer.lay_out, optimizer.check_sync):
            with pytest.raises(RuntimeError, match=r"not in sync.*/e, float32"):
                call()
        optimizer.check_sync(repair=True)
        optimizer.check_sync()
        assert models.bits(optimizer.target.e.array) == models.bits(
            before + 1 if rank_that_differs == 0 else before
        )

    models.on_ranks(2, body, share_parameters=True)


@pytest.mark.parametrize("call", ["update", "lay_out"])
def test_a_parameter_of_two_optimizers_is_refused(call: str) -> None:
    def body(collectives: ThreadCollectives) -> None:
        model = models.Model()
        first, second = (
            models.optimizer_for(model, collectives, share_parameters=True) for _ in range(2)
        )
        trained(first, collectives.rank, 2)
        trained(second, collectives.rank, 2)
        before = models.bits(model.g.array)
        with pytest.raises(RuntimeError, match="parameter /a is updated by two optimizers"):
            getattr(first, call)()
        assert models.bits(model.g.array) == before

    run_ranks(2, body)


def test_hosts_that_differ_are_found_and_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadCollectives, "host_of", [0, 0, 1, 1])

    def body(optimizer: Any, rank: int) -> None:
        trained(optimizer, rank, 2)
        before = optimizer.target.c.array.copy()
        optimizer.collectives.meet_on_host()
        if rank == 3:
            optimizer.target.c.array[...] = 5
        with pytest.raises(RuntimeError, match="one value on ranks 0 and 1, another on ranks 2 an"):
            optimizer.check_sync()
        optimizer.check_sync(repair=True)
        assert models.bits(optimizer.target.c.array) == models.bits(before)

    models.on_ranks(4, body, share_parameters=True)


def test_parameters_come_and_go_with_their_values() -> None:
    def body(optimizer: Any, rank: int) -> Any:
        model = optimizer.target
        trained(optimizer, rank, 2)
        gone, last = model.g, model.g.array.copy()
        del model.g
        with model.init_scope():
            model.new = chainer.Parameter(np.full((3, 3), rank, "f"))
        trained(optimizer, rank, 3)
        assert shares(optimizer) is optimizer.share_parameters
        assert models.bits(gone.array) == models.bits(last)
        # It is this rank's own from now on.
        gone.array[...] = rank
        optimizer.collectives.meet_on_host()
        assert (gone.array == rank).all()
        return optimizer

    private, shared = (models.on_ranks(3, body, share_parameters=on) for on in (False, True))
    for one, other in zip(private, shared, strict=True):
        models.assert_same_bits(one.target, other.target)


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_a_copy_has_its_own_until_its_next_update(make_copy: Callable[[Any], Any]) -> None:
    def run(collectives: ThreadCollectives) -> None:
        actual = optimizers.Adam()
        optimizer = create_multi_node_optimizer(actual, collectives, share_parameters=True)
        optimizer.setup(models.Model())
        trained(optimizer, collectives.rank, 3)
        twin = make_copy(optimizer)
        assert twin.share_parameters and not shares(twin)
        twin.communicator = collectives
        for each in (twin, optimizer):
            models.train(each, collectives.rank, range(3, 5))
            assert shares(each)
        models.assert_same_bits(twin.target, optimizer.target)
        assert not np.shares_memory(twin.target.g.array, optimizer.target.g.array)

    run_ranks(3, run)


@pytest.mark.parametrize("double_buffering", [False, True])
def test_a_parameter_may_be_its_own_gradient(double_buffering: bool) -> None:
    def body(optimizer: Any, rank: int) -> Any:
        for _ in range(5):
            for param in optimizer.target.params():
                param.grad = param.array
            optimizer.update()
        return optimizer

    private, shared = (
        models.on_ranks(
            3, body, optimizers.SGD, share_parameters=on, double_buffering=double_buffering
        )
        for on in (False, True)
    )
    for one, other in zip(private, shared, strict=True):
        models.assert_same_bits(one.target, other.target)
