"""`check_sync`: what differs between ranks is found, named and repaired, and nothing else is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.kernels.segments import MASTER
from smorms3_dist.wording import ranks_in_words

import chainer
import chainer.links as L
import models
import mpirun
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks

SIZES = pytest.mark.parametrize("world_size", [1, 2, 3, 4])


def trained(
    comm: Collectives,
    make_model: Callable[[], chainer.Link] = models.Model,
    fp32: bool = False,
    **options: Any,
) -> Any:
    optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm, **options)
    optimizer.setup(make_model())
    if fp32:
        optimizer.use_fp32_update()
    optimizer.update()
    step(optimizer, 1)
    return optimizer


def step(optimizer: Any, number: int) -> None:
    models.set_gradients(optimizer.target, optimizer.collectives.rank, number)
    with np.errstate(all="ignore"):
        optimizer.update()


def flip(param: chainer.Parameter, index: int = -1, bit: int = 0) -> None:
    """Flips one bit of one element, in place."""
    flat = param.array.reshape(-1)
    word = flat[index:][:1] if index >= 0 else flat[index:]
    word.view(f"u{word.dtype.itemsize}")[0] ^= 1 << bit


MAKERS: dict[str, Callable[[], chainer.Link]] = {
    "odd shapes": models.Model,
    "fewer elements than ranks": lambda: models.Model({"a": (1,), "b": (1, 0), "c": ()}),
    "two groups": lambda: models.Model(dtypes={"a": "float64", "e": "float64"}),
    "float16": lambda: models.Model(dtypes={"a": "float16", "g": "float16"}),
    "tied": models.Tied,
}
LAST = {"fewer elements than ranks": "/a", "tied": "/inner/g"}


@pytest.mark.parametrize("kind", MAKERS)
@SIZES
def test_one_bit_of_the_last_element_is_found(world_size: int, kind: str) -> None:
    name = LAST.get(kind, "/g")

    def run(comm: ThreadCollectives) -> str | None:
        optimizer = trained(comm, MAKERS[kind], fp32=kind == "float16")
        optimizer.check_sync(persistent=True)
        params = dict(optimizer.target.namedparams())
        if comm.rank == comm.size - 1:
            flip(params[name])
        if comm.size == 1:
            optimizer.check_sync()
            return None
        with pytest.raises(RuntimeError) as error:
            optimizer.check_sync()
        return str(error.value)

    messages = set(run_ranks(world_size, run))
    assert len(messages) == 1
    if world_size > 1:
        (message,) = messages
        assert message is not None
        assert message.startswith("the ranks are not in sync (t = 1): ")
        last = world_size - 1
        alike = ranks_in_words(range(last))
        assert f"parameter {name}, float" in message
        assert f"has one value on {alike}, another on rank {last}. Write the same" in message
        assert "more differ" not in message


def test_the_first_of_several_is_named_with_groups_of_ranks() -> None:
    def run(comm: ThreadCollectives) -> str:
        optimizer = trained(comm)
        if comm.rank in (1, 3):
            for param in optimizer.target.params():
                param.array[...] = 3
        with pytest.raises(RuntimeError) as error:
            optimizer.check_sync()
        return str(error.value)

    (message,) = set(run_ranks(4, run))
    assert "parameter /a, float32 of shape (3, 5), has one value on ranks 0 and 2" in message
    assert (
        "another on ranks 1 and 3. 5 more differ: parameter /b, parameter /c, parameter /d, ..."
        in (message)
    )


def test_a_frozen_parameter_that_one_rank_writes_to_is_found() -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm)
        optimizer.target.c.update_rule = None
        step(optimizer, 2)
        optimizer.target.c.array[0] += comm.rank
        # Steps do not make it the same.
        for number in (3, 4):
            optimizer.target.c.cleargrad()
            step(optimizer, number)
        optimizer.check_sync()

    with pytest.raises(RuntimeError, match="parameter /c, float32"):
        run_ranks(2, run)


def test_statistics_count_on_request_only() -> None:
    def run(comm: ThreadCollectives) -> str:
        optimizer = trained(comm, lambda: L.BatchNormalization(3))
        optimizer.target.avg_mean[0] = comm.rank
        optimizer.check_sync()
        with pytest.raises(RuntimeError) as error:
            optimizer.check_sync(persistent=True)
        optimizer.check_sync(persistent=True, repair=True)
        optimizer.check_sync(persistent=True)
        assert optimizer.target.avg_mean[0] == 0
        return str(error.value)

    (message,) = set(run_ranks(3, run))
    assert (
        "persistent value /avg_mean, float32 of shape (3,), has one value on rank 0, another"
        in (message)
    )
    assert "MultiNodeBatchNormalization" in message


def test_persistent_values_of_any_kind_are_repaired() -> None:
    def run(comm: ThreadCollectives) -> chainer.Link:
        optimizer = trained(comm)
        link = optimizer.target
        array = np.zeros((4, 6), "f")[:, ::2]
        for name, value in {
            "text": f"of {comm.rank}",
            "number": 0.5 + comm.rank,
            "maybe": np.ones(2, "f") if comm.rank == 0 else None,
            "grown": np.ones(3 + comm.rank, "f"),
            "strided": array,
        }.items():
            link.add_persistent(name, value)
        array[...] = comm.rank + 5
        optimizer.check_sync(persistent=True, repair=True)
        optimizer.check_sync(persistent=True)
        assert link.strided is array
        return link

    for link in run_ranks(3, run):
        assert (link.text, link.number, link.maybe.tolist()) == ("of 0", 0.5, [1, 1])
        assert link.grown.tolist() == [1, 1, 1] and (link.strided == 5).all()


def test_a_parameter_that_only_one_rank_has_initialized_is_named_and_repaired() -> None:
    def run(comm: ThreadCollectives) -> tuple[str, int]:
        link = chainer.Sequential(L.Linear(3, 4), L.Linear(None, 2))
        link.cleargrads()
        optimizer = trained(comm, lambda: link)
        if comm.rank == 1:
            link[1].W.initialize((2, 4))
            link[1].cleargrads()
        with pytest.raises(RuntimeError) as error:
            optimizer.check_sync()
        optimizer.check_sync(repair=True)
        optimizer.check_sync()
        before = optimizer.t
        # As without the repair, the update that broadcasts is no step.
        step(optimizer, 2)
        assert optimizer.t == before
        step(optimizer, 3)
        optimizer.check_sync()
        return str(error.value), link[1].W.size

    for message, size in run_ranks(2, run):
        assert "parameter /1/W is not initialized on rank 0, float32 of shape (2, 4) on rank 1" in (
            message
        )
        assert size == 8


def test_before_the_first_update_the_remedy_is_that_update() -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm)
        optimizer.setup(models.Model(seed=comm.rank)).check_sync()

    with pytest.raises(RuntimeError, match=r"The first update\(\) gives all ranks"):
        run_ranks(2, run)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_repair_gives_all_what_rank_0_has_and_training_goes_on(
    world_size: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    def run(comm: ThreadCollectives) -> dict[str, np.ndarray]:
        optimizer = trained(comm, MAKERS[kind], fp32=kind == "float16")
        wanted = {n: np.full_like(a, 0.25) for n, a in models.arrays(optimizer.target).items()}
        for param in optimizer.target.params() if comm.rank == 0 else ():
            param.array[...] = 0.25
        optimizer.check_sync(repair=True)
        for name, array in models.arrays(optimizer.target).items():
            assert array.tobytes() == wanted[name].tobytes(), name
        for group in optimizer.sharded_model.sharded_groups:
            if MASTER in group.states:
                for segment in group.shard.segments:
                    master = group.states[MASTER][segment.range_s]
                    assert (master.astype("e") == 0.25).all()
        optimizer.lr = 0.0
        step(optimizer, 2)
        optimizer.check_sync()
        return models.arrays(optimizer.target)

    for found in run_ranks(world_size, run):
        assert all((array == 0.25).all() for array in found.values())
    said = [r.getMessage() for r in caplog.records if "not in sync" in r.getMessage()]
    assert len(said) == 1
    assert all("Now all have what rank 0 has" in each for each in said)


@pytest.mark.parametrize("world_size", [2, 3])
def test_masters_that_round_to_the_repaired_value_keep_their_digits(world_size: int) -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm, lambda: models.Model(dtypes={"g": "float16"}), fp32=True)
        (group,) = [g for g in optimizer.sharded_model.sharded_groups if MASTER in g.states]
        before = group.states[MASTER].copy()
        if comm.rank == world_size - 1:
            # What was wrong is on this rank alone, whoever owns it.
            optimizer.target.g.array[...] = 1
        optimizer.check_sync(repair=True)
        assert group.states[MASTER].tobytes() == before.tobytes()
        assert group.shard.size == 0 or (before != before.astype("e")).any()

    run_ranks(world_size, run)


class _Whole(chainer.optimizers.sgd.SGDRule):
    is_elementwise = False


def test_masters_of_rules_that_run_on_whole_arrays_follow_a_repair() -> None:
    def make() -> chainer.Link:
        return models.Model({"a": (3, 5)}, dtypes={"a": "float16"})

    def run(comm: ThreadCollectives) -> np.ndarray:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SGD(0.5), comm).setup(make())
        rule = _Whole(parent_hyperparam=optimizer.hyperparam)
        rule.use_fp32_update()
        optimizer.target.a.update_rule = rule
        optimizer.update()
        step(optimizer, 1)
        if comm.rank == 0:
            optimizer.target.a.array[0, 0] = 0.25
        optimizer.check_sync(repair=True)
        optimizer.lr = 0.0
        step(optimizer, 2)
        optimizer.check_sync()
        return optimizer.target.a.array

    assert {float(a[0, 0]) for a in run_ranks(3, run)} == {0.25}


def test_ranks_that_ask_for_different_things_are_told() -> None:
    with pytest.raises(
        RuntimeError, match=r"rank 1 is in check_sync\(persistent=False, repair=True\)"
    ):
        run_ranks(2, lambda comm: trained(comm).check_sync(repair=comm.rank == 1))


def test_one_rank_alone_is_told() -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm)
        optimizer.check_sync() if comm.rank == 0 else step(optimizer, 2)

    with pytest.raises(RuntimeError, match=r"rank 0 is in check_sync\(.*\), rank 1 is in update 3"):
        run_ranks(2, run)


# What is written between two updates


@SIZES
def test_what_one_rank_has_loaded_is_found_by_the_next_update(world_size: int) -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm)
        if comm.rank == 0:
            optimizer.target.g.array[...] = 0.25
        if comm.size == 1:
            step(optimizer, 2)
            return
        before = models.arrays(optimizer.target)["/a"].copy()
        for _ in range(3):
            with pytest.raises(RuntimeError, match="parameter /g, float32"):
                step(optimizer, 2)
        assert optimizer.t == 1 and before.tobytes() == optimizer.target.a.array.tobytes()

    run_ranks(world_size, run)


def test_an_array_that_one_rank_has_replaced_is_found_by_the_next_update() -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm)
        if comm.rank == 1:
            optimizer.target.c.array = optimizer.target.c.array + 1
        step(optimizer, 2)

    with pytest.raises(RuntimeError, match="parameter /c, float32"):
        run_ranks(2, run)


def test_what_all_ranks_write_alike_is_looked_at_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(comm: ThreadCollectives) -> list[int]:
        optimizer = trained(comm)
        looked = []
        compare = type(optimizer)._compare
        for number in range(2, 20):

            def counted(self: Any, *args: Any, number: int = number, **options: Any) -> Any:
                looked.append(number - 1)
                return compare(self, *args, **options)

            object.__setattr__(optimizer, "_compare", counted.__get__(optimizer))
            for param in optimizer.target.params():
                param.array[...] = np.clip(param.array, -0.5 / number, 0.5 / number)
            step(optimizer, number)
        return looked

    assert run_ranks(2, run) == [[1, 2, 4, 8, 16]] * 2


def test_nothing_is_compared_where_nobody_writes() -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm)

        def never(*args: Any, **options: Any) -> None:
            raise AssertionError

        object.__setattr__(optimizer, "_compare", never)
        for number in range(2, 6):
            step(optimizer, number)

    run_ranks(3, run)


def test_real_ranks() -> None:
    reports = mpirun.run_program(2, "sync.py")
    for report in reports:
        for number, name in enumerate(("parameter /l1/b", "persistent value /norm/avg_mean")):
            assert (
                f"{name}, float32 of shape (4,), has one value on rank 0, another on rank 1"
                in (report["messages"][number])
            )
        assert "that of /l1/W on rank 1 (1 of 12 elements on rank 1)" in report["messages"][2]
        assert report["repaired"] == reports[0]["repaired"]


def test_only_parameters_count_of_the_memory_that_they_lie_in() -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm)
        buffers = [group.buffers for group in optimizer.sharded_model.groups]
        held = sum(slot.size for each in buffers for slot in each.layout.slots)
        assert sum(each.flat.size for each in buffers) > held
        if comm.rank == 0:
            # Behind the last parameter.
            buffers[-1].flat[-1] = 7
        optimizer.check_sync()
        param = optimizer.target.c
        if comm.rank == 0:
            # Out of the flat buffer.
            param.array = param.array.copy()
        optimizer.check_sync()
        if comm.rank == 0:
            flip(param)
        with pytest.raises(RuntimeError, match=r"parameter /c.*on rank 0"):
            optimizer.check_sync()

    run_ranks(2, run)
