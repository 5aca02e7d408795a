"""Half precision: fp32 masters, static and dynamic loss scaling, mixed precision."""

from __future__ import annotations

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
    def run(collectives: ThreadCollectives) -> list[Any]:
        model = half_model()
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.use_fp32_update()
        optimizer.setup(model)
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
        return seen

    assert run_ranks(1, run) == [[("float32", "float32", None)]]


@pytest.mark.parametrize("gradients", MODES)
def test_the_master_overrides_values_written_from_outside(gradients: str) -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = half_model()
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, gradients=gradients
        )
        optimizer.use_fp32_update()
        return train(optimizer.setup(model), model, optimizer.update)

    def train(optimizer: Any, model: Any, first: Callable[[], None]) -> Any:
        first()
        for step in STEPS:
            # Before its first use the master is made from what is written.
            if step in (1, 3):
                model.g.array[...] = 3.0
                model.c.array = np.full(7, 3.0, "f")
            models.set_gradients(model, 0, step)
            optimizer.update()
        return model

    theirs = half_model()
    plain = chainer.optimizers.SMORMS3()
    plain.use_fp32_update()
    train(plain.setup(theirs), theirs, lambda: None)
    models.assert_same_bits(run_ranks(1, run)[0], theirs)


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
    def train(optimizer: Any, model: Any, set_gradients: Callable[[int], None]) -> None:
        def double(rule: Any, param: Any) -> None:
            param.grad *= 2

        for step in range(1, 9):
            if step == 3:
                model.g.update_rule.add_hook(double, "double")
            if step == 6:
                model.g.update_rule.remove_hook("double")
            set_gradients(step)
            optimizer.update()

    theirs = half_model()
    plain = chainer.optimizers.SMORMS3()
    plain.use_fp32_update()
    plain.setup(theirs)

    train(plain, theirs, lambda step: models.set_mean_gradients(theirs, 3, step))

    def run(collectives: ThreadCollectives) -> Any:
        model = half_model()
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.use_fp32_update()
        optimizer.setup(model).update()
        train(optimizer, model, lambda step: models.set_gradients(model, collectives.rank, step))
        assert model.g.update_rule.state is None
        return model

    for model in run_ranks(3, run):
        models.assert_same_bits(model, theirs)


@pytest.mark.parametrize("gradients", MODES)
def test_float16_without_masters_underflows_as_by_chainer(gradients: str) -> None:
    def make_model() -> models.Model:
        return models.Model({"a": (3, 5), "g": (50, 7)}, {"a": "float16", "g": "float16"})

    def configure(optimizer: Any) -> None:
        # eps vanishes in float16, and a gradient of zero gives 0 / 0.
        optimizer.add_hook(optimizer_hooks.GradientHardClipping(0, 1))

    ours = models.assert_equals_chainer(2, gradients, configure=configure, make_model=make_model)
    assert np.isnan(ours[0].target.g.array).any()


class Trace:
    """What a training with dynamic loss scaling leaves at each step."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.steps: list[tuple[int, int, float]] = []

    def note(self) -> None:
        rule = self.optimizer.target.g.update_rule
        self.steps.append((self.optimizer.t, rule.t, self.optimizer._loss_scale))


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
    expected = Trace(plain)
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
        expected.note()

    def run(collectives: ThreadCollectives) -> tuple[Trace, Any]:
        model = make_model()
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, gradients=gradients
        ).setup(model)
        configure(optimizer)
        optimizer.update()
        trace = Trace(optimizer)
        for step in range(1, 12):
            set_scaled_gradients(model, collectives.rank, step, optimizer._loss_scale)
            optimizer.update()
            trace.note()
        assert optimizer.gradient_mode == gradients
        return trace, model

    for trace, model in run_ranks(3, run):
        assert trace.steps == expected.steps
        models.assert_same_bits(model, theirs)
    # Three steps were skipped.
    assert expected.steps[-1][:2] == (11, 8)


@pytest.mark.parametrize("gradients", MODES)
def test_the_rank_that_holds_the_bad_gradient_warns_of_it_by_name(gradients: str) -> None:
    def run(collectives: ThreadCollectives) -> None:
        model = models.Model({"a": (300,), "b": (300,)})
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, gradients=gradients
        ).setup(model)
        optimizer.loss_scaling()
        optimizer.update()
        models.set_gradients(model, 0, 1)
        model.b.grad[17] = np.inf
        with pytest.warns(UserWarning, match="the mean gradient of /b is not finite"):
            optimizer.update()

    run_ranks(1, run)


def test_dynamic_loss_scaling_passes_over_parameters_that_are_not_initialized() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = chainer.Chain(inner=models.Model(), lazy=L.Linear(None, 3))
        model.cleargrads()
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.setup(model)
        optimizer.loss_scaling()
        optimizer.update()
        models.set_gradients(model.inner, collectives.rank, 1)
        optimizer.update()
        return optimizer.t, optimizer._loss_scale

    assert run_ranks(2, run) == [(1, 2.0)] * 2


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
    def run(collectives: ThreadCollectives, gradients: str) -> chainer.Link:
        model = models.Model({"a": (40,), "b": (40,)})
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, gradients=gradients
        ).setup(model)
        optimizer.set_loss_scale(8.0)
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))

        def loss() -> chainer.Variable:
            result = F.sum(model.a * model.a)
            return result if collectives.rank == 0 else result + F.sum(model.b * model.b)

        for _ in range(4):
            optimizer.update(loss)
        return model

    sharded = run_ranks(world_size, lambda collectives: run(collectives, "sharded"))
    replicated = run_ranks(world_size, lambda collectives: run(collectives, "replicated"))
    for one in [*sharded, *replicated]:
        models.assert_same_bits(one, sharded[0])


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("scale", [None, 16.0, "dynamic"])
def test_mixed_precision_of_a_real_network(scale: Any, gradients: str) -> None:
    def make() -> chainer.Chain:
        rng = np.random.RandomState(0)

        def initializer(array: np.ndarray) -> None:
            array[...] = rng.standard_normal(array.shape) * 0.1

        return chainer.Sequential(
            L.Linear(6, 9, initialW=initializer),
            L.BatchNormalization(9),
            F.tanh,
            L.Linear(9, 3, initialW=initializer),
        )

    def train(optimizer: Any, model: Any) -> None:
        optimizer.use_fp32_update()
        if scale == "dynamic":
            optimizer.loss_scaling(interval=2)
        elif scale is not None:
            optimizer.set_loss_scale(scale)
        for step in range(5):
            rng = np.random.RandomState(step)
            x = rng.standard_normal((4, 6)).astype("float16")
            y = rng.randint(0, 3, 4).astype("i")
            optimizer.update(lambda x=x, y=y: F.softmax_cross_entropy(model(x), y))

    def run(collectives: ThreadCollectives) -> Any:
        with chainer.using_config("dtype", chainer.mixed16):
            model = make()
            optimizer = create_multi_node_optimizer(
                chainer.optimizers.SMORMS3(),
                collectives,
                gradients=gradients,
                step_after_broadcast=True,
            ).setup(model)
            train(optimizer, model)
        return optimizer

    with chainer.using_config("dtype", chainer.mixed16):
        theirs = make()
        plain = chainer.optimizers.SMORMS3().setup(theirs)
        train(plain, theirs)
    assert {param.dtype.name for param in theirs.params()} == {"float16", "float32"}
    for optimizer in run_ranks(2, run):
        models.assert_same_bits(optimizer.target, theirs)
        assert (optimizer.t, optimizer._loss_scale) == (plain.t, plain._loss_scale)


def test_fp32_updates_switched_on_in_mid_training_keep_the_states() -> None:
    def run(collectives: ThreadCollectives) -> None:
        model = models.Model({"a": (40, 9)}, {"a": "float16"})
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(eps=1e-4), collectives
        ).setup(model)
        optimizer.update()
        for step in range(3):
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        before = [update.states["mem"].copy() for update in optimizer.sharded_model.sharded_groups]
        optimizer.use_fp32_update()
        model.a.update_rule.enabled = False
        optimizer.update()
        after = [update.states["mem"] for update in optimizer.sharded_model.sharded_groups]
        assert [state.dtype.name for state in after] == ["float32"]
        np.testing.assert_array_equal(after[0], before[0])

    run_ranks(2, run)
