"""`check_finite`: whose gradients are not finite, before the mean hides it."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.device.memory import HostMemory
from smorms3_dist.sharding.model import ModelView
from smorms3_dist.sharding.own_gradients import OwnGradients, not_finite_gradients

import chainer
import models
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks

WRONG = [np.nan, np.inf, -np.inf]


def optimizer_of(comm: Collectives, mode: str, model: Any = None, **options: Any) -> Any:
    made = create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(), comm, check_finite=mode, **options
    )
    optimizer = made.setup(models.Model() if model is None else model)
    optimizer.update()
    return optimizer


def step(optimizer: Any, number: int, wrong: dict[str, float] | None = None) -> None:
    models.set_gradients(optimizer.target, optimizer.collectives.rank, number)
    for name, value in (wrong or {}).items():
        dict(optimizer.target.namedparams())[name].grad.reshape(-1)[-1] = value
    with np.errstate(all="ignore"):
        optimizer.update()


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_error_names_parameter_and_rank_and_changes_nothing(
    world_size: int, gradients: str
) -> None:
    def run(comm: ThreadCollectives) -> str:
        optimizer = optimizer_of(comm, "error", gradients=gradients)
        step(optimizer, 1)
        before = {name: array.copy() for name, array in models.arrays(optimizer.target).items()}
        states = [s.copy() for g in optimizer.sharded_model.groups for s in g.states.values()]
        last = comm.rank == comm.size - 1
        with pytest.raises(RuntimeError) as error:
            step(optimizer, 2, {"/g": np.nan, "/c": np.inf} if last else {})
        assert optimizer.t == 1
        for name, array in models.arrays(optimizer.target).items():
            assert array.tobytes() == before[name].tobytes()
        now = [s for g in optimizer.sharded_model.groups for s in g.states.values()]
        assert [s.tobytes() for s in states] == [s.tobytes() for s in now]
        # The training may go on without that batch.
        step(optimizer, 3)
        assert optimizer.t == 2
        return str(error.value)

    (message,) = set(run_ranks(world_size, run))
    last = world_size - 1
    assert f"that of /c on rank {last} (1 of 7 elements on rank {last}), and 1 more: /g on" in (
        message
    )
    assert "Nothing has been updated" in message and "loss_scaling()" in message


def test_a_step_without_any_is_the_same_step() -> None:
    def run(comm: ThreadCollectives) -> list[chainer.Link]:
        links = []
        for mode in ("off", "warn", "error"):
            optimizer = optimizer_of(comm, mode)
            for number in range(1, 4):
                step(optimizer, number)
            links.append(optimizer.target)
        return links

    for off, warn, error in run_ranks(3, run):
        models.assert_same_bits(warn, off)
        models.assert_same_bits(error, off)


def test_a_warning_comes_once_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    def run(comm: ThreadCollectives) -> None:
        optimizer = optimizer_of(comm, "warn")
        for number in range(1, 4):
            step(optimizer, number, {"/e": np.nan} if comm.rank == 1 else {})
        assert optimizer.t == 3 and np.isnan(optimizer.target.e.array).any()
        step(optimizer, 4, {"/b": np.nan} if comm.rank == 2 else {})

    run_ranks(3, run)
    said = [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]
    assert len(said) == 2
    assert (
        "step after t = 0: that of /e on rank 1 (1 of 66 elements on rank 1). The mean" in said[0]
    )
    assert "that of /b on rank 2" in said[1]


def test_several_ranks_are_named() -> None:
    def run(comm: ThreadCollectives) -> None:
        step(optimizer_of(comm, "error"), 1, {"/g": np.nan} if comm.rank else {})

    with pytest.raises(RuntimeError, match=r"that of /g on ranks 1-3 \(1 of 30,500 elements on r"):
        run_ranks(4, run)


def test_the_ranks_that_do_not_look_take_part() -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = optimizer_of(comm, "error" if comm.rank == 1 else "off")
        step(optimizer, 1, {"/g": np.nan} if comm.rank == 1 else {})

    with pytest.raises(RuntimeError, match="that of /g on rank 1"):
        run_ranks(3, run)


def test_dynamic_loss_scaling_leaves_the_step_out_itself() -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = optimizer_of(comm, "error")
        optimizer.loss_scaling()
        step(optimizer, 1, {"/g": np.nan} if comm.rank == 0 else {})
        assert not optimizer.is_safe_to_update()

    with pytest.warns(UserWarning, match="is not finite: no step is made"):
        run_ranks(2, run)


def test_gradients_that_an_update_does_not_use_do_not_count() -> None:
    def run(comm: ThreadCollectives) -> None:
        made = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), comm, check_finite="error"
        ).setup(models.Model())
        models.set_gradients(made.target, comm.rank, 0)
        made.target.a.grad[...] = np.nan
        made.update()
        step(made, 1)
        assert made.t == 1

    run_ranks(2, run)


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, None])
def test_copies_look_as_well(make_copy: Any) -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = optimizer_of(comm, "error")
        if make_copy is None:
            twin = pickle.loads(pickle.dumps(optimizer))
            twin.communicator = comm
        else:
            twin = make_copy(optimizer)
        step(twin, 1)
        step(twin, 2, {"/g": np.nan})

    with pytest.raises(RuntimeError, match="/g on ranks 0 and 1"):
        run_ranks(2, run)


def test_only_three_answers_are_known() -> None:
    with pytest.raises(ValueError, match="check_finite must be one of off, warn, error, not True"):
        run_ranks(1, lambda comm: optimizer_of(comm, True))  # type: ignore[arg-type]


# Looking at one rank's gradients


def looked(grad: np.ndarray) -> tuple[bool, int]:
    link = chainer.Link()
    with link.init_scope():
        link.a = chainer.Parameter(np.zeros(grad.shape, grad.dtype))
        link.unused = chainer.Parameter(np.zeros(2, "f"))
        link.later = chainer.Parameter()
    link.cleargrads()
    link.a.grad = grad
    view = ModelView(link)
    counts = [found.elements for found in not_finite_gradients(view)]
    return OwnGradients().are_finite(view, HostMemory()), sum(counts)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", WRONG)
def test_a_wrong_element_is_found_wherever_it_is(value: float, dtype: str) -> None:
    for shape in ((), (1,), (7,), (3, 5)):
        size = int(np.prod(shape))
        for index in {0, size // 2, size - 1}:
            grad = np.ones(shape, dtype)
            assert looked(grad) == (True, 0)
            grad.reshape(-1)[index] = value
            assert looked(grad) == (False, 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_last_element_of_a_large_gradient_is_seen(dtype: str) -> None:
    grad = np.ones((1 << 18) * 2 + 1, dtype)
    assert looked(grad) == (True, 0)
    grad[-1] = np.nan
    assert looked(grad) == (False, 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_large_gradients_are_finite(dtype: str) -> None:
    grad = np.full(100, np.finfo(dtype).max, dtype)
    grad[::2] *= -1
    assert looked(grad) == (True, 0)
    grad[50] = np.inf
    assert looked(grad) == (False, 1)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_gradients_in_any_order_of_memory(dtype: str) -> None:
    whole = np.ones((300, 700), dtype)
    for view in (whole.T, whole[::2, ::-3]):
        view[-1, -1] = 1
        assert looked(view) == (True, 0)
        view[-1, -1] = np.nan
        assert looked(view) == (False, 1)
        view[-1, -1] = 1


def test_opposite_infinities_do_not_cancel_each_other() -> None:
    assert looked(np.array([np.inf, -np.inf, 0], "f")) == (False, 2)
