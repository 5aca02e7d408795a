"""Models that change between steps, that are not whole yet, or that differ between the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import chainer.functions as F
import chainer.links as L
import models
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks


def optimizer_for(model: chainer.Link, collectives: ThreadCollectives, **options: Any) -> Any:
    return create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives, **options).setup(
        model
    )


def assert_alike(links: list[chainer.Link]) -> None:
    for link in links[1:]:
        models.assert_same_bits(link, links[0])


def test_the_first_update_broadcasts_rank_0_and_does_not_step() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model(seed=collectives.rank)
        optimizer = optimizer_for(model, collectives)
        models.set_gradients(model, collectives.rank, 0)
        optimizer.update()
        return optimizer

    optimizers = run_ranks(3, run)
    for optimizer in optimizers:
        models.assert_same_bits(optimizer.target, models.Model(seed=0))
        assert optimizer.t == 0
        assert all(param.update_rule.t == 0 for param in optimizer.target.params())
    assert optimizers[0].collectives.bytes_sent["broadcast"] > 0


def test_parameters_are_views_of_the_flat_buffer() -> None:
    (optimizer,) = models.train_sharded(1, models.Model, [1])
    flat = optimizer.sharded_model.groups[0].buffers.flat
    assert flat.ctypes.data % 128 == 0
    for param in optimizer.target.params():
        assert param.size == 0 or np.shares_memory(param.array, flat)
        assert param.array.flags.c_contiguous


def batch(rank: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState([rank, step])
    return rng.standard_normal((4, 6)).astype("f"), rng.randint(0, 3, 4).astype("i")


class TwoHeads(chainer.Chain):
    """One head is used from the beginning, the other later; both are created lazily."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng = np.random.RandomState(seed)

        def initializer(array: np.ndarray) -> None:
            array[...] = rng.standard_normal(array.shape) * 0.1

        with self.init_scope():
            self.body = L.Linear(None, 5, initialW=initializer)
            self.first = L.Linear(None, 3, initialW=initializer)
            self.second = L.Linear(None, 3, initialW=initializer)

    def loss(self, x: np.ndarray, y: np.ndarray, second: bool) -> chainer.Variable:
        h = F.tanh(self.body(x))
        result = F.softmax_cross_entropy(self.first(h), y)
        return result + F.softmax_cross_entropy(self.second(h), y) if second else result


def test_uninitialized_parameters_are_passed_over_but_counted_as_by_chainer() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = TwoHeads(collectives.rank)
        optimizer = optimizer_for(model, collectives)
        for step in range(3):
            optimizer.update(model.loss, *batch(collectives.rank, step), False)
        return model

    links = run_ranks(2, run)
    assert_alike([link.first for link in links] + [])
    for link in links:
        assert link.second.W.array is None
        assert link.second.W.update_rule.t == link.first.W.update_rule.t == 2


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("on", [[0], [1], [0, 1, 2]])
def test_a_late_initialization_on_some_ranks_reaches_all_and_keeps_the_other_states(
    on: list[int], gradients: str
) -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = TwoHeads()
        optimizer = optimizer_for(model, collectives, gradients=gradients)
        for step in range(6):
            second = step >= 3 and collectives.rank in on
            optimizer.update(model.loss, *batch(collectives.rank, step), second)
        return optimizer

    optimizers = run_ranks(3, run)
    assert_alike([optimizer.target for optimizer in optimizers])
    # Calls 0 and 3 broadcast.
    assert [optimizer.t for optimizer in optimizers] == [4, 4, 4]
    states = models.gathered_states(optimizers)
    expected = expected_late_initialization(on)
    for name, param in expected.namedparams():
        np.testing.assert_allclose(
            states[name]["g2"], np.ravel(param.update_rule.state["g2"]), rtol=2e-5
        )
        mine = dict(optimizers[0].target.namedparams())[name]
        np.testing.assert_allclose(mine.array, param.array, rtol=1e-5, atol=1e-7)


def expected_late_initialization(on: list[int]) -> chainer.Link:
    """The same by Chainer: the mean gradient of all ranks, without the calls that broadcast."""
    model = TwoHeads()
    model.loss(*batch(0, 0), False)
    optimizer = chainer.optimizers.SMORMS3().setup(model)
    for step in (1, 2, 3, 4, 5):
        means: dict[str, Any] = {}
        for rank in range(3):
            model.cleargrads()
            model.loss(*batch(rank, step), step >= 3 and rank in on).backward()
            for name, param in model.namedparams(include_uninit=False):
                grad = np.zeros_like(param.array) if param.grad is None else param.grad
                means[name] = means.get(name, 0) + grad / 3
        if step == 3:
            continue
        for name, param in model.namedparams(include_uninit=False):
            param.grad = np.asarray(means[name], "f")
        optimizer.update()
    return model


def test_a_replaced_link_is_noticed_broadcast_and_trained() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = chainer.Sequential(L.Linear(6, 5), F.tanh, L.Linear(5, 3))
        optimizer = optimizer_for(model, collectives)

        def loss(x: np.ndarray, y: np.ndarray) -> chainer.Variable:
            return F.softmax_cross_entropy(model(x), y)

        for step in range(2):
            optimizer.update(loss, *batch(collectives.rank, step))
        model[2] = L.Linear(5, 3)
        for param in model[2].params():
            param.update_rule = optimizer.create_update_rule()
        optimizer.update(loss, *batch(collectives.rank, 2))
        new = model[2].W.array.copy()
        optimizer.update(loss, *batch(collectives.rank, 3))
        assert not np.array_equal(new, model[2].W.array)
        return model

    assert_alike(run_ranks(3, run))


def test_an_array_given_to_a_parameter_is_taken_over() -> None:
    def run(collectives: ThreadCollectives, sharded: bool) -> chainer.Link:
        model = models.Model()
        optimizer = (
            optimizer_for(model, collectives)
            if sharded
            else chainer.optimizers.SMORMS3().setup(model)
        )
        for step in range(0 if sharded else 1, 4):
            if step == 2:
                model.a.array = np.full((3, 5), 2.5, "f")
                model.g.data = np.zeros((500, 61), "f")
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        return model

    for world_size in (1,):
        for ours, theirs in zip(
            run_ranks(world_size, lambda c: run(c, True)),
            run_ranks(world_size, lambda c: run(c, False)),
            strict=True,
        ):
            models.assert_same_bits(ours, theirs)


def test_setting_up_again_starts_afresh_without_a_broadcast() -> None:
    def configure_again(optimizer: Any) -> None:
        optimizer.setup(optimizer.target)

    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model()
        optimizer = optimizer_for(model, collectives)
        for step in range(3):
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        for name, param in model.namedparams():
            param.array[...] = dict(models.Model().namedparams())[name].array
        optimizer.setup(model)
        assert optimizer.t == 0
        for step in range(3):
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        return optimizer

    theirs = models.Model()
    models.train_with_chainer(theirs, 2, range(3))
    for optimizer in run_ranks(2, run):
        assert optimizer.t == 3
        models.assert_same_bits(optimizer.target, theirs)


def test_a_parameter_with_a_new_rule_starts_with_fresh_states() -> None:
    def train(model: Any, optimizer: Any, rank: int, steps: range) -> None:
        for step in steps:
            if step == 3:
                model.g.update_rule = optimizer.create_update_rule()
            models.set_gradients(model, rank, step)
            optimizer.update()

    theirs = models.Model()
    train(theirs, chainer.optimizers.SMORMS3().setup(theirs), 0, range(1, 6))
    ours = models.Model()

    def run(collectives: ThreadCollectives) -> None:
        train(ours, optimizer_for(ours, collectives), 0, range(0, 6))

    run_ranks(1, run)
    models.assert_same_bits(ours, theirs)


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
def test_states_from_before_the_wrapping_are_taken_over_and_the_whole_ones_freed(
    gradients: str,
) -> None:
    theirs = models.Model()
    models.train_with_chainer(theirs, 3, range(6))

    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model()
        actual = models.train_with_chainer(model, 3, range(3))
        optimizer = create_multi_node_optimizer(actual, collectives, gradients=gradients)
        optimizer.update()
        assert all(param.update_rule.state is None for param in model.params())
        for step in range(3, 6):
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        assert optimizer.t == 6
        return model

    for model in run_ranks(3, run):
        models.assert_same_bits(model, theirs)


def test_rules_that_are_missing_disabled_or_have_hyperparameters_of_their_own() -> None:
    def configure(optimizer: Any) -> None:
        model = optimizer.target
        model.a.update_rule.hyperparam.lr = 0.1
        model.b.update_rule.enabled = False
        model.c.update_rule = None
        model.e.update_rule.hyperparam.eps = 1e-3

    theirs = models.Model()
    models.train_with_chainer(theirs, 3, range(1, 5), configure)
    for optimizer in models.train_sharded(3, models.Model, range(1, 5), configure):
        models.assert_same_bits(optimizer.target, theirs)
        assert optimizer.target.b.update_rule.t == 0
        assert optimizer.target.a.update_rule.t == 4


def test_a_shared_parameter_is_updated_once_a_path_as_by_chainer() -> None:
    theirs = models.Tied()
    optimizer = chainer.optimizers.SMORMS3().setup(theirs)
    for step in range(3):
        models.set_gradients(theirs, 0, step)
        optimizer.update()

    def run(collectives: ThreadCollectives) -> Any:
        model = models.Tied()
        sharded = optimizer_for(model, collectives)
        sharded.update()
        for step in range(3):
            models.set_gradients(model, 0, step)
            sharded.update()
        return model

    # Every rank has the same gradients here, and two of them have an exact mean.
    for model in run_ranks(2, run):
        models.assert_same_bits(model, theirs)
        assert model.inner.g.update_rule.t == theirs.inner.g.update_rule.t == 6


def plain_like(model: Any, world_size: int, change: Callable[[Any, Any, int], None]) -> Any:
    """Trains a model by Chainer on the mean gradients; calls that broadcast are left out."""
    optimizer = chainer.optimizers.SMORMS3().setup(model)
    for step in range(1, 9):
        change(model, optimizer, step)
        models.set_mean_gradients(model, world_size, step)
        if step != 4:
            optimizer.update()
    return model


def sharded_like(
    collectives: ThreadCollectives, model: Any, change: Callable[[Any, Any, int], None]
) -> Any:
    optimizer = optimizer_for(model, collectives)
    optimizer.update()
    for step in range(1, 9):
        change(model, optimizer, step)
        models.set_gradients(model, collectives.rank, step)
        optimizer.update()
    return optimizer


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_link_added_after_setup_is_trained_and_the_others_keep_their_states(
    world_size: int,
) -> None:
    def add(model: Any, optimizer: Any, step: int) -> None:
        if step == 4:
            model.add_link("late", models.Model({"w": (30, 7)}, seed=3))
            if isinstance(optimizer, chainer.GradientMethod):
                # Chainer leaves it without a rule, and it never moves.
                model.late.w.update_rule = optimizer.create_update_rule()

    theirs = plain_like(chainer.Chain(inner=models.Model()), world_size, add)
    for optimizer in run_ranks(
        world_size, lambda c: sharded_like(c, chainer.Chain(inner=models.Model()), add)
    ):
        models.assert_same_bits(optimizer.target, theirs)
        assert optimizer.target.late.w.update_rule.t == 4


def test_a_rule_taken_away_on_purpose_is_not_made_again() -> None:
    def freeze(model: Any, optimizer: Any, step: int) -> None:
        if step == 1:
            model.inner.g.update_rule = None
        if step == 4:
            model.add_link("late", models.Model({"w": (30, 7)}, seed=3))

    def run(collectives: ThreadCollectives) -> Any:
        return sharded_like(collectives, chainer.Chain(inner=models.Model()), freeze).target

    for model in run_ranks(2, run):
        np.testing.assert_array_equal(model.inner.g.array, models.Model().g.array)
        assert model.inner.g.update_rule is None
        assert model.late.w.update_rule.t == 4


def test_a_rule_taken_away_after_the_wrapped_optimizer_was_set_up_by_itself_stays_away() -> None:
    def run(collectives: ThreadCollectives) -> None:
        actual = chainer.optimizers.SMORMS3()
        optimizer = create_multi_node_optimizer(actual, collectives)
        model = models.Model()
        actual.setup(model)
        model.g.update_rule = None
        optimizer.update()
        assert model.g.update_rule is None

    run_ranks(1, run)


def test_the_rules_that_are_made_use_fp32_where_the_optimizer_does() -> None:
    def run(collectives: ThreadCollectives) -> None:
        model = chainer.Chain(inner=models.Model())
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.use_fp32_update()
        optimizer.setup(model).update()
        model.add_link("late", models.Model({"w": (30, 7)}, {"w": "float16"}))
        optimizer.update()
        (half,) = [u for u in optimizer.sharded_model.sharded_groups if u.dtype == np.float16]
        assert half.states["mem"].dtype == np.float32

    run_ranks(2, run)


@pytest.mark.parametrize("world_size", [1, 3])
def test_parameters_that_move_to_another_name_keep_their_states(world_size: int) -> None:
    def swap(model: Any, optimizer: Any, step: int) -> None:
        if step == 4:
            a, g = model.first.a, model.second.g
            with model.first.init_scope(), model.second.init_scope():
                model.first.a, model.second.g = g, a

    def make() -> chainer.Chain:
        return chainer.Chain(first=models.Model(), second=models.Model(seed=2))

    theirs = plain_like(make(), world_size, swap)
    for optimizer in run_ranks(world_size, lambda c: sharded_like(c, make(), swap)):
        models.assert_same_bits(optimizer.target, theirs)
        assert optimizer.target.first.a.shape == (500, 61)


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
def test_a_link_removed_leaves_the_others_as_they_are(gradients: str) -> None:
    def remove(model: Any, optimizer: Any, step: int) -> None:
        if step == 4:
            del model.first

    def make() -> chainer.Chain:
        return chainer.Chain(first=models.Model(), second=models.Model(seed=2))

    theirs = plain_like(make(), 3, remove)
    for optimizer in run_ranks(3, lambda c: sharded_like(c, make(), remove)):
        models.assert_same_bits(optimizer.target, theirs)


def test_a_step_may_follow_the_broadcast_in_the_same_call() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model(seed=collectives.rank)
        optimizer = optimizer_for(model, collectives, step_after_broadcast=True)
        for step in range(4):
            if step == 2:
                with model.init_scope():
                    model.b = chainer.Parameter(np.full(1, collectives.rank, "f"))
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        assert optimizer.t == 4
        return model

    first, *others = run_ranks(3, run)
    assert_alike([first, *others])


def test_one_rank_that_wants_a_step_after_the_broadcast_is_enough() -> None:
    def run(collectives: ThreadCollectives) -> int:
        model = models.Model()
        optimizer = optimizer_for(model, collectives, step_after_broadcast=collectives.rank == 1)
        models.set_gradients(model, collectives.rank, 0)
        optimizer.update()
        return optimizer.t

    assert run_ranks(3, run) == [1, 1, 1]


def test_a_parameter_tied_on_one_rank_only_is_refused_by_name() -> None:
    def build(rank: int) -> chainer.Link:
        model = chainer.Chain(inner=models.Model({"a": (3,)}))
        if rank == 1:
            model.twin = model.inner.a
            model._params.add("twin")
        return model

    with pytest.raises(RuntimeError, match="rank 1 has 2 paths to /inner/a"):
        differing(build, 2)


def differing(build: Callable[[int], chainer.Link], world_size: int = 3) -> None:
    def run(collectives: ThreadCollectives) -> None:
        model = build(collectives.rank)
        optimizer_for(model, collectives).update()

    run_ranks(world_size, run)


def test_models_that_differ_between_ranks_are_refused_by_name_and_rank() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"parameter /b is float32 of shape \(3,\) on rank 0 and float32 of shape \(4,\) "
        "on rank 2",
    ):
        differing(lambda rank: models.Model({"a": (2,), "b": (4 if rank == 2 else 3,)}))
    with pytest.raises(RuntimeError, match=r"parameter /c is missing on rank 0 and .* on rank 1"):
        differing(lambda rank: models.Model({"a": (2,), **({"c": (1,)} if rank == 1 else {})}))


def test_a_model_of_which_nothing_is_initialized_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no initialized parameter"):
        differing(lambda rank: L.Linear(None, 3, nobias=True), 2)
