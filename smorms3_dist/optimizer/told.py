"""What an optimizer was told, as facts that all ranks must share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smorms3_dist.chainer_internals.loss_scale import interval_of_loss_scale, loss_scale_of
from smorms3_dist.chainer_internals.optimizers import own_hyperparameters
from smorms3_dist.step.facts import SharedFacts, value_in_words
from smorms3_dist.step.way import StepPlan

import chainer


def facts_of(
    optimizer: chainer.GradientMethod, plan: StepPlan, settings: Mapping[str, Any], update: int
) -> SharedFacts:
    """Writes down what this rank was told.

    Args:
        optimizer: The wrapped optimizer: its class, hyperparameters, loss scale and ``t``.
        plan: What its hooks and update rules are.
        settings: What the sharded optimizer was told besides, by name.
        update: The number of the update.
    """
    told: dict[str, Any] = {
        **settings,
        "class of the optimizer": type(optimizer).__name__,
        **{f"{name} of the optimizer": v for name, v in own_hyperparameters(optimizer).items()},
    }
    if plan.dynamic:
        told["growth of the dynamic loss scale"] = interval_of_loss_scale(optimizer)
    told["loss scale"] = loss_scale_of(optimizer)
    alike = {name: value_in_words(value) for name, value in told.items()}
    counters = {"number of the update": str(update), "t": str(optimizer.t)}
    return SharedFacts(counters, {**alike, **plan.alike}, plan.looking)
