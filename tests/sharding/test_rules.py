"""Update rules: every elementwise one of Chainer's on shards, all others on whole arrays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import models
import numpy as np
import pytest
from chainer import optimizers
from chainer.optimizers.smorms3 import SMORMS3Rule
from rank_threads import ThreadCollectives, run_ranks

STEPS = range(1, 6)
MODES = ["sharded", "replicated"]
ELEMENTWISE = [
    optimizers.SGD,
    optimizers.MomentumSGD,
    optimizers.CorrectedMomentumSGD,
    optimizers.NesterovAG,
    optimizers.Adam,
    optimizers.AdamW,
    optimizers.AMSGrad,
    optimizers.AdaBound,
    optimizers.AMSBound,
    optimizers.MSVAG,
    optimizers.AdaGrad,
    optimizers.AdaDelta,
    optimizers.RMSprop,
    optimizers.RMSpropGraves,
    optimizers.SMORMS3,
]


def assert_equals_chainer(
    world_size: int,
    gradients: str,
    make: Callable[[], Any],
    configure: Callable[[Any], None] = lambda optimizer: None,
    make_model: Callable[[], chainer.Link] = models.Model,
) -> list[Any]:
    """Trains both ways and compares parameters, states and counts; returns our optimizers."""
    theirs = make_model()
    models.train_with_chainer(theirs, world_size, STEPS, configure, make=make)
    ours = models.train_sharded(world_size, make_model, STEPS, configure, gradients, make=make)
    states = models.gathered_states(ours)
    for optimizer in ours:
        models.assert_same_bits(optimizer.target, theirs)
        counts = {name: p.update_rule.t for name, p in optimizer.target.namedparams()}
        assert counts == {name: p.update_rule.t for name, p in theirs.namedparams()}
    names = {id(param): name for name, param in sorted(theirs.namedparams(), reverse=True)}
    for param in theirs.params():
        state, name = param.update_rule.state, names[id(param)]
        if param.size and param.ndim and state:
            assert states[name].keys() == state.keys()
            for key, expected in state.items():
                assert models.bits(states[name][key]) == models.bits(np.ravel(expected)), key
    return ours


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_an_elementwise_rule_on_shards_equals_chainers(
    kind: Any, world_size: int, gradients: str
) -> None:
    optimizers_ = assert_equals_chainer(world_size, gradients, kind)
    # Nothing but the own shard is kept, and nothing of it by the rules.
    whole = sum(
        array.size
        for states in models.gathered_states(optimizers_).values()
        for array in states.values()
    )
    assert sum(optimizer.state_bytes() for optimizer in optimizers_) == 4 * whole
    for optimizer in optimizers_:
        assert all(param.update_rule.state is None for param in optimizer.target.params())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("kind", [optimizers.Adam, optimizers.MSVAG, optimizers.RMSprop])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes(kind: Any, dtype: str, gradients: str) -> None:
    def make_model() -> models.Model:
        shapes = {name: shape for name, shape in models.SHAPES.items() if shape}
        return models.Model(shapes, dict.fromkeys(shapes, dtype))

    # An eps that does not vanish in float16.
    make = (lambda: kind(eps=1e-4)) if kind is not optimizers.MSVAG else kind
    assert_equals_chainer(2, gradients, make, make_model=make_model)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rules_and_hyperparameters_of_single_parameters(world_size: int, gradients: str) -> None:
    def configure(optimizer: Any) -> None:
        model = optimizer.target
        model.a.update_rule = optimizers.sgd.SGDRule(lr=0.125)
        model.b.update_rule = optimizers.adam.AdamRule(amsgrad=True)
        model.c.update_rule = SMORMS3Rule(lr=0.25)
        model.e.update_rule.enabled = False
        model.g.update_rule.hyperparam.alpha = 0.5

    ours = assert_equals_chainer(world_size, gradients, optimizers.Adam, configure)
    assert {name: plan.kind.name for name, plan in ours[0].sharded_model.model.plans.items()} == {
        "/a": "ELEMENTWISE",
        "/b": "ELEMENTWISE",
        "/c": "FUSED",
        "/d": "ELEMENTWISE",
        "/e": "ELEMENTWISE",
        "/f": "ELEMENTWISE",
        "/g": "ELEMENTWISE",
    }


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize(
    "kind", [optimizers.Adam, optimizers.MSVAG, optimizers.AMSBound, optimizers.SMORMS3]
)
@pytest.mark.parametrize("hooked", [False, True])
def test_a_shared_parameter_is_updated_once_a_path(kind: Any, gradients: str, hooked: bool) -> None:
    def configure(optimizer: Any) -> None:
        if hooked:
            optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.01))
            optimizer.target.inner.g.update_rule.add_hook(chainer.optimizer_hooks.Lasso(0.01))

    ours = assert_equals_chainer(2, gradients, kind, configure, models.Tied)
    assert ours[0].target.inner.g.update_rule.t == 2 * len(STEPS)


class DecayingRule(chainer.UpdateRule):
    """An elementwise rule of a user's: states from the parameter, arrays replaced, a count."""

    is_elementwise = True

    def __init__(self) -> None:
        super().__init__()
        self.power = 1.0

    def init_state(self, param: Any) -> None:
        self.state["start"] = param.array.copy()
        self.state["sum"] = np.zeros(param.shape, np.float64)

    def update_core_cpu(self, param: Any) -> None:
        if param.grad is None:
            return
        self.power *= 0.5
        self.state["sum"] = self.state["sum"] + param.grad
        step = param.grad * np.float32(self.power) + 0.125 * (param.array - self.state["start"])
        param.array = np.asarray(param.array - step, param.dtype)


class OwnOptimizer(chainer.GradientMethod):
    """A gradient method with a given rule."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule = rule

    def create_update_rule(self) -> Any:
        return self.rule()


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_an_elementwise_rule_of_a_users_on_shards(world_size: int, gradients: str) -> None:
    ours = assert_equals_chainer(world_size, gradients, lambda: OwnOptimizer(DecayingRule))
    # Also where a rank owns nothing of a parameter its rule has come as far as everywhere.
    for optimizer in ours:
        for param in optimizer.target.params():
            assert param.update_rule.power == 0.5 ** len(STEPS)


class NormalizedRule(chainer.UpdateRule):
    """A rule that is not elementwise."""

    def init_state(self, param: Any) -> None:
        self.state["v"] = np.zeros_like(param.array)

    def update_core_cpu(self, param: Any) -> None:
        v = self.state["v"]
        v *= 0.5
        v += param.grad
        param.array -= 0.01 * v / (np.abs(v).sum() + 1)


class CountingRule(chainer.optimizers.adam.AdamRule):
    """An elementwise rule whose state is no array."""

    def init_state(self, param: Any) -> None:
        super().init_state(param)
        self.state["count"] = 0

    def update_core_cpu(self, param: Any) -> None:
        super().update_core_cpu(param)
        self.state["count"] += 1


class DoubledRule(SMORMS3Rule):
    """A rule with an ``update`` of its own."""

    def update(self, param: Any) -> None:
        super().update(param)
        super().update(param)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (NormalizedRule, "it is not elementwise"),
        (CountingRule, "its states are not arrays like the parameter"),
        (DoubledRule, "it has an update() of its own"),
    ],
)
def test_other_rules_run_whole_on_every_rank_and_rank_0_says_so_once(
    rule: Any, reason: str, world_size: int, gradients: str, caplog: pytest.LogCaptureFixture
) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.target.e.update_rule = SMORMS3Rule()
        optimizer.target.a.update_rule.add_hook(chainer.optimizer_hooks.WeightDecay(0.1))
        if gradients == "sharded":
            optimizer.add_hook(chainer.optimizer_hooks.Lasso(0.01))

    theirs = models.Model()
    shapes = {name: shape for name, shape in models.SHAPES.items() if 0 not in shape}

    def make_model() -> models.Model:
        return models.Model(shapes)

    theirs = make_model()
    with caplog.at_level(logging.WARNING, logger="smorms3_dist"):
        models.train_with_chainer(
            theirs, world_size, STEPS, configure, make=lambda: OwnOptimizer(rule)
        )
        ours = models.train_sharded(
            world_size, make_model, STEPS, configure, gradients, make=lambda: OwnOptimizer(rule)
        )
    assert caplog.messages == [
        f"{rule.__name__} runs on whole arrays, with its whole states on every rank: {reason} "
        "(/a, /b, /c, ...)"
    ]
    for optimizer in ours:
        models.assert_same_bits(optimizer.target, theirs)
        for name, param in optimizer.target.namedparams():
            assert (param.update_rule.state is None) == (name == "/e")
    # The states of the one sharded parameter, once; all others on every rank.
    whole = sum(
        state.nbytes
        for name, param in theirs.namedparams()
        if name != "/e"
        for state in param.update_rule.state.values()
        if isinstance(state, np.ndarray)
    )
    total = sum(optimizer.state_bytes() for optimizer in ours)
    assert total == world_size * whole + 12 * theirs.e.size


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("gradients", MODES)
def test_a_subclass_with_arithmetic_of_its_own_is_not_taken_for_smorms3(gradients: str) -> None:
    class Halved(SMORMS3Rule):
        def update_core_cpu(self, param: Any) -> None:
            before = param.array.copy()
            super().update_core_cpu(param)
            param.array[...] = (param.array + before) / 2

    ours = assert_equals_chainer(3, gradients, lambda: OwnOptimizer(Halved))
    assert {plan.kind.name for plan in ours[0].sharded_model.model.plans.values()} == {
        "ELEMENTWISE"
    }


def test_random_hooks_of_whole_rules_do_not_make_ranks_diverge() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model()
        optimizer = create_multi_node_optimizer(OwnOptimizer(NormalizedRule), collectives)
        optimizer.setup(model)
        rng = np.random.RandomState(collectives.rank)

        def disturb(rule: Any, param: Any) -> None:
            param.grad += rng.standard_normal(param.shape).astype("f")

        for param in model.params():
            param.update_rule.add_hook(disturb, "disturb")
        for step in range(3):
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        return model

    first, *others = run_ranks(3, run)
    for other in others:
        models.assert_same_bits(other, first)


@pytest.mark.parametrize("gradients", MODES)
def test_a_rule_of_another_kind_in_mid_training_costs_no_step_and_no_other_state(
    gradients: str,
) -> None:
    def train(model: Any, optimizer: Any, set_gradients: Callable[[int], None]) -> Any:
        for step in range(1, 9):
            if step == 4:
                model.a.update_rule = optimizers.momentum_sgd.MomentumSGDRule(lr=0.5)
            if step == 6:
                model.g.update_rule = NormalizedRule()
            set_gradients(step)
            optimizer.update()
        return model

    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model()
        optimizer = create_multi_node_optimizer(
            optimizers.Adam(), collectives, gradients=gradients
        ).setup(model)
        optimizer.update()
        return train(
            model, optimizer, lambda step: models.set_gradients(model, collectives.rank, step)
        )

    theirs = models.Model()
    train(
        theirs,
        optimizers.Adam().setup(theirs),
        lambda step: models.set_mean_gradients(theirs, 3, step),
    )
    for model in run_ranks(3, run):
        models.assert_same_bits(model, theirs)


def test_rules_that_differ_between_ranks_are_refused_by_parameter_and_rank() -> None:
    def run(collectives: ThreadCollectives) -> None:
        model = models.Model()
        optimizer = create_multi_node_optimizer(optimizers.SMORMS3(), collectives).setup(model)
        if collectives.rank == 1:
            model.c.update_rule = optimizers.sgd.SGDRule(lr=0.1)
        optimizer.update()

    with pytest.raises(
        RuntimeError, match=r"parameter /c is updated by SMORMS3Rule .* and updated by SGDRule"
    ):
        run_ranks(2, run)


def test_states_of_another_model_are_refused_by_name() -> None:
    def run(collectives: ThreadCollectives) -> None:
        model = models.Model()
        optimizer = create_multi_node_optimizer(optimizers.SMORMS3(), collectives).setup(model)
        model.c.update_rule._state = {name: np.ones(3, "f") for name in ("mem", "g", "g2")}
        with pytest.raises(ValueError, match=r"the state mem of parameter /c has shape \(3,\)"):
            optimizer.update()

    run_ranks(1, run)
