"""The way of a step: every way, and every reason for it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from smorms3_dist.device.memory import HostMemory
from smorms3_dist.hooks.recognition import FusedHooks
from smorms3_dist.sharding.model import ModelView
from smorms3_dist.step.way import StepPlan, Way, choose_way

import chainer
import models
import pytest
from chainer import optimizer_hooks
from chainer.optimizers import SMORMS3, Adam
from chainer.optimizers.adam import AdamRule

NOTHING = FusedHooks()
CLIPPING = FusedHooks((optimizer_hooks.GradientClipping(1.0),))
DECAY = FusedHooks((optimizer_hooks.WeightDecay(0.1),))
LASSO = FusedHooks((optimizer_hooks.Lasso(0.1),), on_gpu=False)

HOST = HostMemory()
GPU: Any = SimpleNamespace(launcher=object(), exact=False)
EXACT_GPU: Any = SimpleNamespace(launcher=object(), exact=True)


def plan(fused: FusedHooks | None, dynamic: bool = False) -> StepPlan:
    return StepPlan({}, {}, None, fused, dynamic)


@pytest.mark.parametrize(
    ("known", "memory", "way"),
    [
        (plan(NOTHING), HOST, Way.STREAMED),
        (plan(NOTHING), GPU, Way.STREAMED),
        (plan(DECAY), HOST, Way.STREAMED),
        (plan(DECAY), EXACT_GPU, Way.STREAMED),
        (plan(LASSO), HOST, Way.STREAMED),
        (plan(LASSO), GPU, Way.STAGED),
        (plan(LASSO, dynamic=True), HOST, Way.CHECKED),
        # Hooks that the update cannot carry out.
        (plan(None), HOST, Way.STAGED),
        (plan(None), GPU, Way.STAGED),
        # Norms, and whether all is finite, come before the update.
        (plan(CLIPPING), HOST, Way.CHECKED),
        (plan(NOTHING, dynamic=True), HOST, Way.CHECKED),
        (plan(CLIPPING), GPU, Way.CHECKED),
        (plan(NOTHING, dynamic=True), GPU, Way.CHECKED),
        (plan(DECAY, dynamic=True), EXACT_GPU, Way.CHECKED),
        # Chainer's norms to the last bit are not those of a GPU's kernel.
        (plan(CLIPPING), EXACT_GPU, Way.STAGED),
        (plan(CLIPPING, dynamic=True), EXACT_GPU, Way.STAGED),
    ],
)
def test_the_way_and_the_hooks_that_the_update_carries_out(
    known: StepPlan, memory: Any, way: Way
) -> None:
    in_the_update = known.fused if way in (Way.STREAMED, Way.CHECKED) else NOTHING
    assert choose_way(known, False, False, memory) == (way, in_the_update)
    # Whole gradients, or gradients that are kept, leave nothing to the update.
    assert choose_way(known, True, False, memory) == (Way.REPLICATED, NOTHING)
    assert choose_way(known, True, True, memory) == (Way.REPLICATED, NOTHING)
    assert choose_way(known, False, True, memory) == (Way.STAGED, NOTHING)


def look(configure: Callable[[Any], None], make: Any = SMORMS3, link: Any = models.Model) -> Any:
    optimizer = make().setup(link())
    configure(optimizer)
    return StepPlan.of(optimizer, ModelView(optimizer.target))


def halve(optimizer: Any) -> None: ...


def test_without_hooks_there_is_nothing_to_agree_on() -> None:
    assert look(lambda optimizer: None) == StepPlan({}, {}, None, NOTHING, False)


def test_whatever_acts_on_shards_is_part_of_the_program_in_its_order() -> None:
    def configure(optimizer: Any) -> None:
        optimizer.loss_scaling()
        optimizer.add_hook(optimizer_hooks.Lasso(0.1), timing="post")
        optimizer.add_hook(optimizer_hooks.GradientClipping(1.0), name="clip")
        rule = optimizer.target.c.update_rule
        rule.add_hook(optimizer_hooks.WeightDecay(0.1))
        rule.enabled = False

    found = look(configure)
    assert found.alike == {
        "pre hooks of the optimizer": "'clip' (GradientClipping with threshold=1.0)",
        "post hooks of the optimizer": "'Lasso' (Lasso with rate=0.1)",
        "update rule of /c": "disabled",
        "pre hooks of the update rule of /c": "'WeightDecay' (WeightDecay with rate=0.1)",
    }
    assert (found.dynamic, found.fused, found.needs_whole) == (True, None, None)


def test_the_first_hook_that_wants_whole_gradients_is_the_reason() -> None:
    def configure(optimizer: Any) -> None:
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))
        optimizer.add_hook(halve)
        optimizer.add_hook(lambda _: None, "another")

    found = look(configure)
    assert found.needs_whole is not None
    assert found.needs_whole.startswith("the hook 'halve' needs them (it is not known to treat")
    assert list(found.alike) == ["pre hooks of the optimizer"]
    own = "'halve' (function), 'another' (function)"
    assert found.looking == {"pre hooks of the optimizer, on whole gradients": own}


def test_the_update_carries_out_clipping_and_decay_where_all_rules_are_fused() -> None:
    clip, decay = optimizer_hooks.GradientClipping(1.0), optimizer_hooks.WeightDecay(0.1)

    def configure(optimizer: Any) -> None:
        optimizer.add_hook(clip)
        optimizer.add_hook(decay)
        optimizer.target.a.update_rule.add_hook(optimizer_hooks.WeightDecay(0.2))

    assert look(configure).fused == FusedHooks((clip, decay))
    assert look(configure, Adam).fused == FusedHooks((clip, decay))

    def one_of_another_kind(optimizer: Any) -> None:
        configure(optimizer)
        optimizer.target.g.update_rule = Adam().create_update_rule()

    assert look(one_of_another_kind).fused == FusedHooks((clip, decay))

    class Own(AdamRule):
        def update_core_cpu(self, param: Any) -> None: ...

    def one_of_a_users(optimizer: Any) -> None:
        configure(optimizer)
        optimizer.target.g.update_rule = Own()

    assert look(one_of_a_users).fused is None

    def one_without_a_rule(optimizer: Any) -> None:
        configure(optimizer)
        optimizer.target.g.update_rule = None

    assert look(one_without_a_rule).fused == FusedHooks((clip, decay))


def test_tied_parameters_are_named_and_hooks_of_them_are_called() -> None:
    def tied() -> chainer.Link:
        return models.Tied()

    found = look(lambda optimizer: None, link=tied)
    assert found.alike["paths to tied parameters"] == "2 to /inner/g"
    assert found.fused == NOTHING
    hooked = look(lambda o: o.add_hook(optimizer_hooks.WeightDecay(0.1)), link=tied)
    assert hooked.fused is None
