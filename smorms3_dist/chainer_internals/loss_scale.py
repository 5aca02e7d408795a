"""The loss scale: what an optimizer and its parameters note of it, and of its failures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import chainer


class LossScaling(NamedTuple):
    """The loss scale of an optimizer, as far as it is kept in snapshots and checkpoints.

    Attributes:
        scale: What losses are multiplied by.
        dynamic: Whether it follows what becomes of the gradients.
        was_too_large: Whether a gradient was ever not finite because of it.
    """

    scale: float
    dynamic: bool
    was_too_large: bool

    @classmethod
    def of(cls, optimizer: chainer.GradientMethod) -> LossScaling | None:
        """That of an optimizer; ``None`` if losses are not scaled."""
        scale = loss_scale_of(optimizer)
        if scale is None:
            return None
        dynamic = is_loss_scale_dynamic(optimizer)
        return cls(float(scale), dynamic, dynamic and bool(optimizer._loss_scaling_isnan_ever))

    def restore(self, optimizer: chainer.GradientMethod) -> None:
        """Goes on with a dynamic scale; a static one is a setting, which the script may change."""
        if self.dynamic and is_loss_scale_dynamic(optimizer):
            optimizer._loss_scale = self.scale
            optimizer._loss_scaling_isnan_ever = self.was_too_large
        elif not self.dynamic and loss_scale_of(optimizer) is None:
            optimizer._loss_scale = self.scale


def loss_scale_of(owner: Any) -> float | None:
    """What an optimizer multiplies losses by; or what the gradient of a parameter still has."""
    return owner._loss_scale


def loss_scales_of(params: Iterable[chainer.Parameter]) -> set[float | None]:
    """What the gradients of parameters still have been multiplied by."""
    return {param._loss_scale for param in params}


def note_loss_scale(param: chainer.Parameter, scale: float | None) -> None:
    """Notes what the gradient of a parameter has been multiplied by, for hooks and rules."""
    param._loss_scale = scale


def is_loss_scale_dynamic(optimizer: chainer.GradientMethod) -> bool:
    """Whether the loss scale follows what becomes of the gradients."""
    return bool(optimizer._loss_scaling_is_dynamic)


def interval_of_loss_scale(optimizer: chainer.GradientMethod) -> float:
    """What a dynamic loss scale grows by in each step: two to the power of 1/interval."""
    return float(optimizer._loss_scaling_multiplier)


def note_finite(optimizer: chainer.GradientMethod, finite: bool) -> None:
    """Tells an optimizer whether the gradients of this step are finite.

    ``is_safe_to_update`` and ``update_loss_scale`` go by that.
    """
    optimizer._loss_scaling_isnan = not finite
    if not finite:
        optimizer._loss_scaling_isnan_ever = True
