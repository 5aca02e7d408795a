"""Which hooks run on shards, which the update carries out, and what is said of all others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from smorms3_dist.hooks.recognition import (
    FusedHooks,
    fused_hooks,
    operations_of,
    runs_on_shards,
)
from smorms3_dist.kernels.operations import Operation, OperationKind

import chainer
import models
import numpy as np
import pytest
from chainer.optimizer_hooks import (
    GradientClipping,
    GradientHardClipping,
    GradientLARS,
    GradientNoise,
    Lasso,
    WeightDecay,
)

STEPS = range(1, 6)


def hook_without_a_word(rule: Any, param: Any) -> None:
    param.grad *= 0.5


class OncePerStep:
    """Says that it is elementwise, but receives the optimizer."""

    name = "OncePerStep"
    is_elementwise = True

    def __call__(self, optimizer: Any) -> None:
        for param in optimizer.target.params():
            param.grad *= 0.5


class CountedDecay(WeightDecay):
    """A subclass with a call of its own, which may do anything."""

    def __call__(self, rule: Any, param: Any) -> None:
        param.grad *= 1 + np.linalg.norm(param.array)


def whole_noise(xp: Any, shape: Any, *_: Any) -> Any:
    return xp.ones(shape, "f")


def add_to_rule(hook: Any) -> Callable[[Any], None]:
    return lambda optimizer: optimizer.target.g.update_rule.add_hook(hook, "own")


@pytest.mark.parametrize(
    ("configure", "who"),
    [
        (lambda optimizer: optimizer.add_hook(OncePerStep()), "the hook 'OncePerStep'"),
        (lambda optimizer: optimizer.add_hook(CountedDecay(0.1)), "the hook 'WeightDecay'"),
        (add_to_rule(hook_without_a_word), "the hook 'own' of the update rule of /g"),
        (
            lambda optimizer: optimizer.add_hook(GradientNoise(0.1, whole_noise)),
            "the hook 'GradientNoise'",
        ),
    ],
)
def test_any_other_hook_has_whole_gradients_and_is_named(
    configure: Any, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = models.Model()
    models.train_with_chainer(theirs, 2, STEPS, configure)
    with caplog.at_level(logging.WARNING, logger="smorms3_dist"):
        for optimizer in models.train_sharded(2, models.Model, STEPS, configure):
            assert optimizer.gradient_mode == "replicated"
            models.assert_same_bits(optimizer.target, theirs)
    assert [message.partition(" needs them")[0] for message in caplog.messages] == [
        f"every rank receives whole gradients: {who}"
    ]
    with pytest.raises(RuntimeError, match=f"gradients='sharded' was asked for, but {who} needs"):
        models.train_sharded(2, models.Model, STEPS, configure, "sharded")


class SameDecay(WeightDecay):
    """A subclass that is called like its base."""

    name = "SameDecay"


class Elementwise:
    """A user's hook that says so, of an optimizer or of rules."""

    call_for_each_param = True
    is_elementwise = True

    def __call__(self, rule: Any, param: Any) -> None: ...


@pytest.mark.parametrize(
    ("hook", "of_optimizer", "of_rule"),
    [
        (WeightDecay(0.1), True, True),
        (Lasso(0.1), True, True),
        (GradientHardClipping(-1, 1), True, True),
        (GradientLARS(), True, True),
        (GradientNoise(0.1), True, True),
        (SameDecay(0.1), True, True),
        (Elementwise(), True, True),
        # As by Chainer, it fails with a rule.
        (GradientClipping(1.0), True, False),
        (GradientNoise(0.1, whole_noise), False, False),
        (CountedDecay(0.1), False, False),
        (hook_without_a_word, False, False),
        # It is called with the optimizer; with a rule it would be with that and the parameter.
        (OncePerStep(), False, True),
    ],
)
def test_which_hooks_run_on_shards(hook: Any, of_optimizer: bool, of_rule: bool) -> None:
    assert runs_on_shards(hook, of_rule=False) is of_optimizer
    assert runs_on_shards(hook, of_rule=True) is of_rule


CLIP, DECAY, SAME = GradientClipping(1.0), WeightDecay(0.1), SameDecay(0.2)
HARD, LASSO, LARS = GradientHardClipping(-1, 0.5), Lasso(0.1), GradientLARS()


@pytest.mark.parametrize(
    ("hooks", "timing", "expected"),
    [
        ([], "pre", FusedHooks()),
        ([CLIP], "pre", FusedHooks((CLIP,))),
        ([DECAY], "pre", FusedHooks((DECAY,))),
        ([CLIP, DECAY], "pre", FusedHooks((CLIP, DECAY))),
        ([DECAY, CLIP], "pre", FusedHooks((DECAY, CLIP), on_gpu=False)),
        ([DECAY, SAME], "pre", FusedHooks((DECAY, SAME), on_gpu=False)),
        ([HARD, CLIP, LASSO], "pre", FusedHooks((HARD, CLIP, LASSO), on_gpu=False)),
        ([DECAY], "post", None),
        ([CLIP, CountedDecay(0.1)], "pre", None),
        ([LARS, DECAY], "pre", FusedHooks((LARS, DECAY), on_gpu=False)),
        # They widen the arithmetic, or are no numbers.
        ([WeightDecay(np.float64(0.1))], "pre", None),
        ([GradientLARS(weight_decay=np.float64(0.1))], "pre", None),
        ([GradientHardClipping(None, 1.0)], "pre", None),
        ([GradientHardClipping(float("nan"), 1.0)], "pre", None),
    ],
)
def test_the_update_carries_out_chainers_hooks_in_any_order(
    hooks: list[Any], timing: str, expected: FusedHooks | None
) -> None:
    optimizer = chainer.optimizers.SMORMS3().setup(models.Model())
    for hook in hooks:
        optimizer.add_hook(hook, timing=timing)
    assert fused_hooks(optimizer, []) == expected


def test_the_update_carries_out_hooks_of_rules_in_their_order() -> None:
    optimizer = chainer.optimizers.SMORMS3().setup(models.Model())
    several: dict[str, list[tuple[Any, str]]] = {
        "a": [],
        "b": [(WeightDecay(0.25), "pre")],
        "c": [(WeightDecay(0.25), "post")],
        "e": [(WeightDecay(0.25), "pre"), (SameDecay(0.25), "pre")],
        "f": [(GradientLARS(), "pre")],
        "g": [(Lasso(0.25), "pre"), (GradientHardClipping(-1, 2), "pre")],
    }
    rules = {name: getattr(optimizer.target, name).update_rule for name in several}
    for name, hooks in several.items():
        for hook, timing in hooks:
            rules[name].add_hook(hook, timing=timing)
    can = {name for name, rule in rules.items() if fused_hooks(optimizer, [rule]) is not None}
    assert can == {"a", "b", "e", "f", "g"}
    assert fused_hooks(optimizer, rules.values()) is None
    of_f = fused_hooks(optimizer, [rules["f"]])
    assert of_f == FusedHooks(on_gpu=False, rules_take_norms=True)
    assert of_f.takes_norms
    on_gpu = {name for name in can if fused_hooks(optimizer, [rules[name]]) == FusedHooks()}
    assert on_gpu == {"a", "b"}
    assert operations_of(rules["a"], 8.0) == ()
    assert operations_of(rules["b"], None) == (Operation(OperationKind.DECAY, 0.25),)
    # Chainer's decay goes by the loss scale; nothing else does.
    assert operations_of(rules["b"], 8.0) == (Operation(OperationKind.DECAY, 2.0),)
    expected = Operation(OperationKind.LASSO, 0.25), Operation(OperationKind.CLIP, -1, 2)
    assert operations_of(rules["g"], 8.0) == expected
