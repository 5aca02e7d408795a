"""Any training is the same sharded as unsharded: drawn by hypothesis, compared bit for bit.

Parameters, states, masters, counts and gradients, for any combination of rules, hooks, dtypes,
shapes, ties, loss scales and modes, with parameters that ranks of a host share or not. What lies in
this space is not tested again elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from smorms3_dist.kernels import selection
from smorms3_dist.kernels.selection import compiled_update

import models
import numpy as np
from chainer import optimizer_hooks, optimizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_threads import ThreadCollectives

EXAMPLES = 120

# Of each the arguments with which float16 does not underflow at once.
RULES: dict[str, Callable[[], Any]] = {
    "SMORMS3": lambda: optimizers.SMORMS3(lr=0.01, eps=1e-4),
    # In float16 eps is nothing, and 0 / 0 no number.
    "SMORMS3 without eps": optimizers.SMORMS3,
    "SGD": lambda: optimizers.SGD(lr=0.1),
    "MomentumSGD": lambda: optimizers.MomentumSGD(lr=0.1),
    "CorrectedMomentumSGD": optimizers.CorrectedMomentumSGD,
    "NesterovAG": optimizers.NesterovAG,
    "Adam": lambda: optimizers.Adam(eps=1e-4),
    "AdamW": lambda: optimizers.AdamW(eps=1e-4),
    "AMSGrad": lambda: optimizers.AMSGrad(eps=1e-4),
    "AdaBound": lambda: optimizers.AdaBound(eps=1e-4),
    "AMSBound": lambda: optimizers.AMSBound(eps=1e-4),
    "MSVAG": optimizers.MSVAG,
    "AdaGrad": lambda: optimizers.AdaGrad(eps=1e-4),
    "AdaDelta": lambda: optimizers.AdaDelta(eps=1e-4),
    "RMSprop": lambda: optimizers.RMSprop(eps=1e-4),
    "RMSpropGraves": optimizers.RMSpropGraves,
}

HOOKS: dict[str, Callable[[], Any]] = {
    "WeightDecay": lambda: optimizer_hooks.WeightDecay(0.01),
    "Lasso": lambda: optimizer_hooks.Lasso(0.01),
    "GradientHardClipping": lambda: optimizer_hooks.GradientHardClipping(-0.5, 0.25),
    "GradientClipping": lambda: optimizer_hooks.GradientClipping(0.5),
    "GradientLARS": lambda: optimizer_hooks.GradientLARS(weight_decay=0.01),
}
BY_NORM = {"GradientClipping", "GradientLARS"}

SHAPE = st.one_of(
    st.sampled_from([(0,), (1,), (3,), (7,), (1, 1), (33, 2), (5, 0, 2)]),
    st.lists(st.integers(1, 70), min_size=1, max_size=2).map(tuple),
)
DTYPE = st.sampled_from(["float32", "float32", "float16", "float64"])
TIMING = st.sampled_from(["pre", "post"])


@st.composite
def trainings(draw: Any) -> dict[str, Any]:
    """Everything that one training depends on."""
    count = draw(st.integers(1, 5))
    names = [f"p{index}" for index in range(count)]
    world_size = draw(st.integers(1, 5))
    # Sums of parts, from three ranks on, are rounded otherwise than Chainer's.
    hooks = sorted(HOOKS if world_size <= 2 else HOOKS.keys() - BY_NORM)
    timing = TIMING
    hooks_of_optimizer = st.lists(st.tuples(st.sampled_from(hooks), timing), max_size=3)
    if draw(st.booleans()):
        # What the fused update carries out itself.
        hooks, timing = ["WeightDecay"], st.just("pre")
        by_norm = [[("GradientClipping", "pre")], [("GradientLARS", "pre")]]
        first = [[], *(by_norm if world_size <= 2 else [])]
        second = [[], [("WeightDecay", "pre")]]
        hooks_of_optimizer = st.builds(list.__add__, *map(st.sampled_from, (first, second)))
    scale = draw(st.sampled_from([None, None, 4.0, 96.0]))
    dtypes, fp32 = {name: draw(DTYPE) for name in names}, draw(st.booleans())
    # Without a master Chainer divides a tied gradient by the loss scale once for each path.
    may_be_tied = scale is None or (fp32 and dtypes["p0"] == "float16")
    of_rules = sorted(set(hooks) - {"GradientClipping"})
    return {
        "world_size": world_size,
        "shapes": {name: draw(SHAPE) for name in names},
        "dtypes": dtypes,
        "rule": draw(st.sampled_from(sorted(RULES))),
        # The ranks that have Numba.
        "compiled_on": draw(st.sampled_from([range(5), range(5), range(5), [], [0], [1, 2]])),
        "hooks": draw(hooks_of_optimizer),
        "of_rules": draw(
            st.lists(
                st.tuples(st.sampled_from(names), st.sampled_from(of_rules), timing), max_size=3
            )
        ),
        "disabled": draw(st.sets(st.sampled_from(names), max_size=1)),
        "other_rule": draw(st.sampled_from([None, "SGD", "SMORMS3", "Adam"])),
        "fp32": fp32,
        "scale": scale,
        "schedule": draw(st.sampled_from([None, 0.5, 0.9])),
        "gradients": draw(st.sampled_from(["auto", "sharded", "replicated"])),
        "tied": may_be_tied and draw(st.booleans()),
        "keep": draw(st.booleans()),
        "share": draw(st.booleans()),
        "host_of": draw(st.sampled_from([[0] * 5, [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])),
        "steps": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 5)),
    }


def configure(training: dict[str, Any]) -> Callable[[Any], None]:
    def apply(optimizer: Any) -> None:
        model = optimizer.target
        if training["fp32"]:
            optimizer.use_fp32_update()
        if training["other_rule"] is not None:
            made = RULES[training["other_rule"]]()
            model.p0.update_rule = made.create_update_rule()
            if training["fp32"]:
                model.p0.update_rule.use_fp32_update()
        if training["scale"] is not None:
            optimizer.set_loss_scale(training["scale"])
            for param in model.params():
                param._loss_scale = training["scale"]
        for index, (hook, timing) in enumerate(training["hooks"]):
            optimizer.add_hook(HOOKS[hook](), name=str(index), timing=timing)
        for index, (name, hook, timing) in enumerate(training["of_rules"]):
            rule = getattr(model, name).update_rule
            rule.add_hook(HOOKS[hook](), name=str(index), timing=timing)
        for name in training["disabled"]:
            getattr(model, name).update_rule.enabled = False

    return apply


def scheduled(training: dict[str, Any]) -> Callable[[Any, int], None]:
    """Sets hyperparameters before a step, as extensions do."""

    def apply(optimizer: Any, step: int) -> None:
        if training["schedule"] is not None:
            for name in {"lr", "alpha", "rho", "eta"} & optimizer.hyperparam.get_dict().keys():
                factor = training["schedule"] if step else 1
                setattr(optimizer, name, getattr(optimizer, name) * factor)

    return apply


def keeping(training: dict[str, Any]) -> Callable[[Any], None]:
    def apply(optimizer: Any) -> None:
        configure(training)(optimizer)
        optimizer.keep_gradients = training["keep"]

    return apply


def gathered(training: dict[str, Any]) -> Callable[[Any], None]:
    def apply(optimizer: Any) -> None:
        if training["keep"]:
            optimizer.gather_gradients()

    return apply


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(training=trainings())
def test_a_sharded_training_equals_the_unsharded_one(training: dict[str, Any]) -> None:
    def make_model() -> models.Model:
        model = models.Model(training["shapes"], training["dtypes"], training["seed"])
        if training["tied"]:
            # A second path, by which hooks are called and the parameter is updated once more.
            with model.init_scope():
                model.twin = model.p0
        return model

    def compiled(dtype: np.dtype, rank: int = 0) -> Any:
        return compiled_update(dtype, rank) if rank in training["compiled_on"] else None

    make, steps = RULES[training["rule"]], range(training["steps"])
    theirs = make_model()
    with np.errstate(all="ignore"):
        reference = models.train_with_chainer(
            theirs,
            training["world_size"],
            steps,
            configure(training),
            make=make,
            before_step=scheduled(training),
        )
    host_of = training["host_of"][: training["world_size"]]
    with (
        mock.patch.object(selection, "compiled_update", compiled),
        mock.patch.object(ThreadCollectives, "host_of", host_of),
    ):
        optimizers_ = models.train_sharded(
            training["world_size"],
            make_model,
            steps,
            keeping(training),
            training["gradients"],
            make=make,
            before_step=scheduled(training),
            finish=gathered(training),
            share_parameters=training["share"],
        )
    several = len(set(host_of)) < len(host_of)
    assert optimizers_[0].sharded_model.shares is (training["share"] and several)
    assert len(optimizers_) == training["world_size"]
    for optimizer in optimizers_:
        assert optimizer.t == reference.t == training["steps"]
        if training["gradients"] != "auto":
            assert optimizer.gradient_mode == training["gradients"]
        if training["keep"]:
            mine = dict(optimizer.target.namedparams())
            for name, param in theirs.namedparams():
                assert models.bits(mine[name].grad) == models.bits(param.grad), name
    models.assert_same_training(optimizers_, theirs)
