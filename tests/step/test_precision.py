"""Half precision: fp32 masters, static and dynamic loss scaling, mixed precision."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import chainer.functions as F
import chainer.links as L
import models
import numpy as np
import pytest
from chainer import optimizer_hooks
from rank_threads import ThreadCollectives, run_ranks

MODES = ["sharded", "replicated"]
STEPS = range(1, 6)
HALF = {"a": "float16", "b": "float16", "d": "float16", "f": "float16", "g": "float16"}


def half_model() -> models.Model:
    return models.Model(dtypes=HALF)


def use_fp32(optimizer: Any) -> None:
    optimizer.use_fp32_update()


@pytest.mark.parametrize(
    ("kind", "count"),
    [(chainer.optimizers.SMORMS3, 3), (chainer.optimizers.Adam, 2), (chainer.optimizers.MSVAG, 2)],
)
def test_masters_and_states_are_in_fp32_and_there_for_the_shard_only(kind: Any, count: int) -> None:
    ours = models.assert_equals_chainer(3, "sharded", kind, use_fp32, half_model)
    half = sum(p.size for p in half_model().params() if p.dtype == np.float16)
    full = sum(p.size for p in half_model().params()) - half
    total = sum(optimizer.state_bytes() for optimizer in ours)
    assert total == 4 * count * (half + full) + 4 * half
    for state in models.gathered_states(ours).values():
        assert {values.dtype.name for values in state.values()} == {"float32"}
    for optimizer in ours:
        assert all(p.update_rule._fp32_param is None for p in optimizer.target.params())


def test_hooks_of_rules_receive_the_master_without_a_scale() -> None:
    def body(optimizer: Any, rank: int) -> None:
        model = optimizer.target
        optimizer.use_fp32_update()
        seen: list[Any] = []

        def look(rule: Any, param: Any) -> None:
            seen.append((param.dtype.name, param.grad.dtype.name, param._loss_scale))
            np.testing.assert_array_equal(param.grad, np.full_like(param.grad, 0.5))
            # After the update, before it is rounded.
            param.array[...] = 1.0 + 2.0**-20

        look.is_elementwise = True  # type: ignore[attr-defined]
        model.a.update_rule.add_hook(look, timing="post")
        optimizer.set_loss_scale(4.0)
        optimizer.update()
        for param in model.params():
            param.grad = np.full_like(param.array, 2.0)
            param._loss_scale = 4.0
        optimizer.update()
        np.testing.assert_array_equal(model.a.array, np.ones((3, 5), "float16"))
        masters = next(optimizer.sharded_model.sharded_groups).states["fp32_param"]
        np.testing.assert_array_equal(masters[:3], np.full(3, 1.0 + 2.0**-20, "f"))
        assert seen == [("float32", "float32", None)]

    models.on_ranks(1, body, make_model=half_model)


@pytest.mark.parametrize("gradients", MODES)
def test_the_master_overrides_values_written_from_outside(gradients: str) -> None:
    def train(optimizer: Any) -> Any:
        for step in STEPS:
            # Before its first use the master is made from what is written.
            if step in (1, 3):
                optimizer.target.g.array[...] = 3.0
                optimizer.target.c.array = np.full(7, 3.0, "f")
            models.train(optimizer, 0, [step])
        return optimizer.target

    plain = chainer.optimizers.SMORMS3().setup(half_model())
    plain.use_fp32_update()
    theirs = train(plain)

    def body(optimizer: Any, rank: int) -> None:
        optimizer.use_fp32_update()
        optimizer.update()
        models.assert_same_bits(train(optimizer), theirs)

    models.on_ranks(1, body, make_model=half_model, gradients=gradients)


def test_a_hook_of_a_rule_that_wants_the_whole_master_has_it() -> None:
    def configure(optimizer: Any) -> None:
        optimizer.use_fp32_update()

        def normalize(rule: Any, param: Any) -> None:
            param.grad /= np.abs(param.array).max()

        optimizer.target.g.update_rule.add_hook(normalize)

    for gradients in MODES:
        theirs = half_model()
        models.train_with_chainer(theirs, 3, STEPS, configure)
        for optimizer in models.train_sharded(3, half_model, STEPS, configure, gradients):
            models.assert_same_bits(optimizer.target, theirs)
            plan = optimizer.sharded_model.model.plans["/g"]
            assert plan.reason == "its hook 'normalize' wants the whole fp32 parameter"


def test_such_a_hook_added_and_removed_in_mid_training_keeps_master_and_states() -> None:
    def double(rule: Any, param: Any) -> None:
        param.grad *= 2

    def before_step(optimizer: Any, step: int) -> None:
        if step == 3:
            optimizer.target.g.update_rule.add_hook(double, "double")
        if step == 6:
            optimizer.target.g.update_rule.remove_hook("double")

    theirs, steps = half_model(), range(1, 9)
    models.train_with_chainer(theirs, 3, steps, use_fp32, before_step=before_step)
    for optimizer in models.train_sharded(3, half_model, steps, use_fp32, before_step=before_step):
        models.assert_same_bits(optimizer.target, theirs)
        assert optimizer.target.g.update_rule.state is None


def state_of(optimizer: Any) -> tuple[int, int, float]:
    return optimizer.t, optimizer.target.g.update_rule.t, optimizer._loss_scale


BAD = {2: (0, np.nan), 5: (1, np.inf), 6: (2, -np.inf)}


def set_scaled_gradients(model: Any, rank: int, step: int, scale: float) -> None:
    for name, param in model.namedparams(include_uninit=False):
        grad = models.gradient(name, param, rank, step).astype("f") * np.float32(scale)
        if name == "/g" and step in BAD and rank == BAD[step][0]:
            grad[0, 0] = BAD[step][1]
        param.grad = np.asarray(grad).astype(param.dtype)
        param._loss_scale = scale


@pytest.mark.filterwarnings("ignore:the mean gradient of /g is not finite")
@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_dynamic_loss_scaling_follows_chainers_trace(
    hooked: bool, masters: bool, gradients: str
) -> None:
    make_model = half_model if masters else models.Model

    def configure(optimizer: Any) -> None:
        optimizer.loss_scaling(interval=3)
        if masters:
            optimizer.use_fp32_update()
        if hooked:
            optimizer.add_hook(optimizer_hooks.WeightDecay(0.001))

    theirs = make_model()
    plain = chainer.optimizers.SMORMS3().setup(theirs)
    configure(plain)
    expected = []
    for step in range(1, 12):
        ranks = []
        for rank in range(3):
            set_scaled_gradients(theirs, rank, step, plain._loss_scale)
            ranks.append({name: param.grad for name, param in theirs.namedparams()})
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            for name, param in theirs.namedparams():
                param.grad = models.mean_gradient([grads[name] for grads in ranks])
            plain.update()
        expected.append(state_of(plain))

    def body(optimizer: Any, rank: int) -> None:
        configure(optimizer)
        optimizer.update()
        trace = []
        for step in range(1, 12):
            set_scaled_gradients(optimizer.target, rank, step, optimizer._loss_scale)
            optimizer.update()
            trace.append(state_of(optimizer))
        assert optimizer.gradient_mode == gradients
        assert trace == expected
        models.assert_same_bits(optimizer.target, theirs)

    models.on_ranks(3, body, make_model=make_model, gradients=gradients)
    # Three steps were skipped.
    assert expected[-1][:2] == (11, 8)


@pytest.mark.parametrize("gradients", MODES)
def test_the_rank_that_holds_the_bad_gradient_warns_of_it_by_name(gradients: str) -> None:
    def body(optimizer: Any, rank: int) -> None:
        optimizer.loss_scaling()
        optimizer.update()
        models.set_gradients(optimizer.target, 0, 1)
        optimizer.target.b.grad[17] = np.inf
        with pytest.warns(UserWarning, match="the mean gradient of /b is not finite"):
            optimizer.update()

    make_model = functools.partial(models.Model, {"a": (300,), "b": (300,)})
    models.on_ranks(1, body, make_model=make_model, gradients=gradients)


def test_dynamic_loss_scaling_passes_over_parameters_that_are_not_initialized() -> None:
    def make_model() -> chainer.Chain:
        return chainer.Chain(inner=models.Model(), lazy=L.Linear(None, 3))

    def body(optimizer: Any, rank: int) -> Any:
        optimizer.target.cleargrads()
        optimizer.loss_scaling()
        optimizer.update()
        models.train(optimizer, rank, [1])
        return optimizer.t, optimizer._loss_scale

    assert models.on_ranks(2, body, make_model=make_model) == [(1, 2.0)] * 2


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("bare", [False, True])
def test_the_scale_of_an_earlier_step_does_not_count_for_parameters_unused_since(
    bare: bool, gradients: str
) -> None:
    def train(make: Callable[..., Any], rank: int) -> Any:
        model = models.Model({"a": (40,), "b": (40,)})
        optimizer = make().setup(model)
        optimizer.loss_scaling(interval=1)

        def loss(step: int) -> chainer.Variable:
            # Of the other rank, nothing is used at the last step.
            used = [model.a, model.b] if step < 2 else [model.b] if step < 4 or not rank else []
            return sum(
                (F.sum(param * param) for param in used), chainer.Variable(np.zeros((), "f"))
            )

        for step in range(5):
            if bare:
                model.cleargrads()
                loss(step).backward(loss_scale=optimizer._loss_scale)
                optimizer.update()
            else:
                optimizer.update(loss, step)
        return model, optimizer._loss_scale

    theirs, scale = train(chainer.optimizers.SMORMS3, 0)

    def run(collectives: ThreadCollectives) -> Any:
        def make() -> Any:
            return create_multi_node_optimizer(
                chainer.optimizers.SMORMS3(),
                collectives,
                gradients=gradients,
                step_after_broadcast=True,
            )

        # Bare, a rank that used nothing cannot know of a scale.
        return train(make, 0 if bare else collectives.rank)

    ours = run_ranks(1, run)
    models.assert_same_bits(ours[0][0], theirs)
    assert ours[0][1] == scale == 32.0
    first, second = run_ranks(2, run)
    models.assert_same_bits(first[0], second[0])
    if bare:
        models.assert_same_bits(first[0], theirs)


@pytest.mark.parametrize("world_size", [2, 3])
def test_weight_decay_counts_the_scale_for_parameters_unused_on_a_rank_in_both_modes(
    world_size: int,
) -> None:
    def body(optimizer: Any, rank: int) -> chainer.Link:
        model = optimizer.target
        optimizer.set_loss_scale(8.0)
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))

        def loss() -> chainer.Variable:
            result = F.sum(model.a * model.a)
            return result if rank == 0 else result + F.sum(model.b * model.b)

        for _ in range(4):
            optimizer.update(loss)
        return model

    make_model = functools.partial(models.Model, {"a": (40,), "b": (40,)})
    models.assert_alike(
        [
            link
            for gradients in MODES
            for link in models.on_ranks(
                world_size, body, make_model=make_model, gradients=gradients
            )
        ]
    )


def test_fp32_updates_switched_on_in_mid_training_keep_the_states() -> None:
    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, range(4))
        before = [update.states["mem"].copy() for update in optimizer.sharded_model.sharded_groups]
        optimizer.use_fp32_update()
        optimizer.target.a.update_rule.enabled = False
        optimizer.update()
        after = [update.states["mem"] for update in optimizer.sharded_model.sharded_groups]
        assert [state.dtype.name for state in after] == ["float32"]
        np.testing.assert_array_equal(after[0], before[0])

    make = functools.partial(chainer.optimizers.SMORMS3, eps=1e-4)
    models.on_ranks(2, body, make, lambda: models.Model({"a": (40, 9)}, {"a": "float16"}))
