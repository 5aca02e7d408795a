"""Hooks that the update carries out: Chainer's bits, in any order, without a call or an array."""

from __future__ import annotations

import itertools
import resource
import tracemalloc
from collections.abc import Callable
from typing import Any

from smorms3_dist.collectives import base
from smorms3_dist.hooks import norms
from smorms3_dist.kernels import dots, selection
from smorms3_dist.sharding import kept_gradient
from smorms3_dist.step.step import Step
from smorms3_dist.step.way import Way

import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks, optimizers
from rule_variants import VARIANTS

STEPS = range(1, 4)
SMALL = {"a": (3, 5), "b": (1,), "c": (7,), "f": (0, 4)}
SHAPES = {"a": (3, 5), "b": (1,), "c": (7,), "f": (0, 4), "g": (300, 31), "h": (50, 23), "i": (5,)}

HOOKS: dict[str, Callable[[], Any]] = {
    "decay": lambda: optimizer_hooks.WeightDecay(0.1),
    "lasso": lambda: optimizer_hooks.Lasso(0.05),
    "hard": lambda: optimizer_hooks.GradientHardClipping(-0.02, 0.03),
    "clip": lambda: optimizer_hooks.GradientClipping(0.5),
    "wide": lambda: optimizer_hooks.GradientClipping(1e9),
    "again": lambda: optimizer_hooks.GradientClipping(0.25),
    "lars": optimizer_hooks.GradientLARS,
    "decaying-lars": lambda: optimizer_hooks.GradientLARS(0.3, weight_decay=0.1),
}

ORDERS = [
    "clip",
    "decay clip",
    "clip decay",
    "lasso hard clip decay",
    "hard clip lasso",
    "wide again lasso",
    "decay clip hard again lasso",
    "lasso decay hard",
    "lars",
    "decay lars clip",
    "lasso clip decaying-lars hard",
    "decaying-lars lars wide decay",
]
BY_NORM = {"clip", "wide", "again", "lars", "decaying-lars"}


def model() -> models.Model:
    return models.Model(SHAPES)


def adding(order: str) -> Callable[[Any], None]:
    def configure(optimizer: Any) -> None:
        for name in order.split():
            optimizer.add_hook(HOOKS[name](), name)

    return configure


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> set[Way]:
    """The ways of all steps; parameters lie in several pieces each."""
    taken: set[Way] = set()
    make = Step.make

    def noted(step: Step, way: Way) -> None:
        taken.add(way)
        make(step, way)

    monkeypatch.setattr(Step, "make", noted)
    monkeypatch.setattr(base, "PIECE_BYTES", 4096)
    monkeypatch.setattr(base, "SMALLEST_PIECE_BYTES", 4096)
    return taken


def compare(
    world_size: int,
    configure: Callable[[Any], None],
    make: Any = optimizers.SMORMS3,
    make_model: Callable[[], chainer.Link] = model,
) -> None:
    """Trains as Chainer does and as sharded, and compares all parameters."""
    theirs = make_model()
    models.train_with_chainer(theirs, world_size, STEPS, configure, make=make)
    for optimizer in models.train_sharded(world_size, make_model, STEPS, configure, make=make):
        if world_size <= 2:
            models.assert_same_bits(optimizer.target, theirs)
        for name, array in models.arrays(optimizer.target).items():
            expected = models.arrays(theirs)[name]
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_hooks_in_any_order_are_chainers_bit_for_bit(
    order: str, world_size: int, ways: set[Way]
) -> None:
    compare(world_size, adding(order))
    assert ways == {Way.STREAMED if BY_NORM.isdisjoint(order.split()) else Way.CHECKED}


@pytest.mark.parametrize("world_size", [1, 2, 4, 5])
@pytest.mark.parametrize("order", ["lars", "decaying-lars again decay"])
def test_small_parameters_are_scaled_at_once(order: str, world_size: int, ways: set[Way]) -> None:
    compare(world_size, adding(order), optimizers.SGD, lambda: models.Model(SMALL))
    assert ways == {Way.CHECKED}


@pytest.mark.parametrize("order", ["lars", "lars clip", "no-decay", "no-decay clip hard"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rate", [0.0, 1e-50])
def test_a_decay_by_nothing_carries_what_is_not_finite_into_the_gradient(
    order: str, value: float, rate: float
) -> None:
    hooks = {
        **HOOKS,
        "lars": lambda: optimizer_hooks.GradientLARS(weight_decay=rate),
        "no-decay": lambda: optimizer_hooks.WeightDecay(rate),
    }

    def configure(optimizer: Any) -> None:
        for name in order.split():
            optimizer.add_hook(hooks[name]())

    def broken() -> models.Model:
        made = model()
        for param in (made.a, made.g):
            param.array[1] = value
        return made

    theirs, make = broken(), optimizers.MomentumSGD
    models.train_with_chainer(theirs, 2, STEPS, configure, make=make)
    ours = models.train_sharded(2, broken, STEPS, configure, make=make)
    models.assert_same_training(ours, theirs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_hooks_of_rules_come_behind_the_loss_scale(world_size: int, ways: set[Way]) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.set_loss_scale(96.0)
        for param in optimizer.target.params():
            param._loss_scale = 96.0
        adding("decay clip decaying-lars lasso")(optimizer)
        for name in "acg":
            rule = getattr(optimizer.target, name).update_rule
            rule.add_hook(optimizer_hooks.Lasso(0.01))
            rule.add_hook(optimizer_hooks.WeightDecay(0.02))
            rule.add_hook(optimizer_hooks.GradientHardClipping(-0.5, 1))

    compare(world_size, configure)
    assert ways == {Way.CHECKED}


def hooks_of_rules(optimizer: Any) -> None:
    for name, order in {
        "a": "lasso decaying-lars hard decay",
        "b": "lars",
        "c": "decay lars",
        "g": "lars decay decaying-lars",
        "h": "decay hard",
        "f": "lars",
    }.items():
        for index, hook in enumerate(order.split()):
            getattr(optimizer.target, name).update_rule.add_hook(HOOKS[hook](), str(index))
    optimizer.target.b.update_rule.enabled = False


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("scaling", ["none", "static", "dynamic"])
@pytest.mark.parametrize("order", ["", "lasso", "decay lars clip", "clip decaying-lars"])
def test_norms_of_rules_come_behind_those_of_the_optimizer(
    order: str, scaling: str, world_size: int, ways: set[Way]
) -> None:
    def configure(optimizer: Any) -> None:
        if scaling == "static":
            optimizer.set_loss_scale(96.0)
        elif scaling == "dynamic":
            optimizer.loss_scaling(scale=96.0)
        if scaling != "none":
            for param in optimizer.target.params():
                param._loss_scale = 96.0
        adding(order)(optimizer)
        hooks_of_rules(optimizer)

    dtypes = {"c": "float16", "i": "float16", "h": "float64"}
    compare(world_size, configure, optimizers.SMORMS3, lambda: models.Model(SHAPES, dtypes))
    assert ways == {Way.CHECKED}


@pytest.mark.parametrize("masters", [False, True])
def test_norms_of_rules_that_take_no_part_or_see_masters(masters: bool, ways: set[Way]) -> None:
    def configure(optimizer: Any) -> None:
        adding("decay")(optimizer)
        rule = optimizer.target.a.update_rule
        rule.add_hook(optimizer_hooks.GradientLARS())
        rule.enabled = masters
        if masters:
            optimizer.use_fp32_update()

    compare(2, configure, make_model=lambda: models.Model(SHAPES, {"a": "float16"}))
    assert ways == {Way.STAGED if masters else Way.CHECKED}


@pytest.mark.parametrize("world_size", [1, 2])
def test_dtypes_may_differ(world_size: int, ways: set[Way]) -> None:
    """The factor is then in the widest, in which NumPy multiplies."""
    dtypes = {"a": "float64", "h": "float64", "c": "float16", "i": "float16"}
    order = adding("lasso clip decaying-lars decay")
    compare(world_size, order, make_model=lambda: models.Model(SHAPES, dtypes))
    assert ways == {Way.CHECKED}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("what", ["another BLAS", "other ranks", "no Numba"])
def test_where_sums_in_parts_are_not_known_whole_parameters_are_summed(
    what: str, world_size: int, ways: set[Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    dots.lanes_of_blas.cache_clear()
    if what == "no Numba":
        monkeypatch.setattr(selection, "compiled_update", lambda dtype, rank=0: None)
        monkeypatch.setattr(kept_gradient, "compiled_store", lambda dtype: None)
    else:
        answers = itertools.count(32 if what == "other ranks" and world_size == 2 else 0)
        monkeypatch.setattr(norms, "lanes_of_blas", lambda dtype: next(answers) or None)
    compare(world_size, adding("decay clip lars"))
    assert ways == {Way.CHECKED}
    monkeypatch.undo()
    dots.lanes_of_blas.cache_clear()


def shared(gradients: dict[str, np.ndarray]) -> None:
    gradients["p"] = gradients["q"]


def seen_from_both_ends(gradients: dict[str, np.ndarray]) -> None:
    both = np.concatenate([gradients["p"], gradients["q"][:, ::-1]])
    gradients["p"], gradients["q"] = both[:40], both[20:60]


def read_only(gradients: dict[str, np.ndarray]) -> None:
    gradients["q"].flags.writeable = False


def not_contiguous(gradients: dict[str, np.ndarray]) -> None:
    gradients["p"] = np.asfortranarray(gradients["p"])


def missing(gradients: dict[str, Any]) -> None:
    gradients["p"] = None


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "change", [shared, seen_from_both_ends, read_only, not_contiguous, missing]
)
def test_gradients_that_cannot_be_written_to_are_left_alone(
    change: Callable[[dict[str, Any]], None], world_size: int, ways: set[Way]
) -> None:
    def gradients_of(rank: int, step: int) -> dict[str, Any]:
        rng = np.random.RandomState([rank, step])
        gradients = {name: rng.standard_normal((40, 70)).astype("f") for name in "pq"}
        change(gradients)
        return gradients

    def make_model() -> models.Model:
        return models.Model({"p": (40, 70), "q": (40, 70)})

    plain = chainer.optimizers.SMORMS3().setup(make_model())
    adding("decay clip")(plain)
    for step in STEPS:
        everybodys = [gradients_of(rank, step) for rank in range(world_size)]
        for name in "pq":
            zeros = np.zeros((40, 70), "f")
            grads = [zeros if own[name] is None else own[name] for own in everybodys]
            getattr(plain.target, name).grad = models.mean_gradient(grads)
        plain.update()

    def body(optimizer: Any, rank: int) -> None:
        adding("decay clip")(optimizer)
        optimizer.update()
        for step in STEPS:
            gradients = gradients_of(rank, step)
            before = {name: None if g is None else g.copy() for name, g in gradients.items()}
            for name, grad in gradients.items():
                getattr(optimizer.target, name).grad = grad
            optimizer.update()
            if change is not_contiguous:
                assert np.array_equal(gradients["p"], before["p"])
            if change is read_only:
                assert np.array_equal(gradients["q"], before["q"])
        models.assert_same_bits(optimizer.target, plain.target)

    models.on_ranks(world_size, body, make_model=make_model)
    assert ways == {Way.CHECKED}


class Mine:
    """A user's hook, which is called."""

    name = "Mine"
    call_for_each_param = is_elementwise = True

    def __call__(self, rule: Any, param: Any) -> None:
        param.grad *= np.float32(0.5)


def without(optimizer: Any) -> None: ...


def scaled_and_hooked(optimizer: Any) -> None:
    optimizer.loss_scaling()
    adding("decay clip decaying-lars lasso again hard")(optimizer)
    optimizer.target.g.update_rule.add_hook(optimizer_hooks.Lasso(0.01))


def called(optimizer: Any) -> None:
    adding("decay clip")(optimizer)
    optimizer.add_hook(optimizer_hooks.GradientLARS())
    optimizer.add_hook(Mine())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("rule", "configure"),
    [
        ("SMORMS3", scaled_and_hooked),
        ("SMORMS3", called),
        ("Adam", scaled_and_hooked),
        ("AMSBound", without),
    ],
)
def test_no_step_allocates_an_array_of_the_shards_size(
    rule: str, configure: Callable[[Any], None], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The shard is many pieces.
    monkeypatch.setattr(base, "PIECE_BYTES", 1 << 18)
    size = 3 << 19

    def body(optimizer: Any, rank: int) -> tuple[int, int]:
        configure(optimizer)
        optimizer.update()
        gradients = [np.full(size, 0.5, "f") for _ in range(4)]
        peak = faults = 0
        for step, gradient in enumerate(gradients):
            optimizer.target.g.grad = gradient
            optimizer.collectives.all_gather_object(None)
            if step == 3 and rank == 0:
                tracemalloc.start()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            optimizer.collectives.all_gather_object(None)
            optimizer.update()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        optimizer.collectives.all_gather_object(None)
        if rank == 0:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return peak, faults

    peaks = models.on_ranks(world_size, body, VARIANTS[rule], lambda: models.Model({"g": (size,)}))
    shard = 4 * size // world_size
    # Ranks that are threads have the pieces that are on their way in new arrays at each step.
    peak, faults = peaks[0]
    on_their_way = world_size * (world_size + 1) * base.PIECE_BYTES
    assert peak < shard // 4 + on_their_way < shard
    if world_size == 1:
        # Of pages of four KiB, or larger ones.
        assert faults < shard // 4096 // 2
