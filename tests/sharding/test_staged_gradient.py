"""The mean gradient of a shard: how it is divided by the loss scale, shown and looked through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import Piece
from smorms3_dist.sharding.staged_gradient import StagedGradient

import models
import numpy as np

SHAPES: dict[str, models.Shape] = {"a": (2, 3), "b": (4,), "c": (5,)}


def staged(dtype: str, configure: Callable[[Any], None]) -> StagedGradient:
    """The gradient of the only rank, in the middle of a step: 0, 1, 2, ..."""

    def make_model() -> models.Model:
        return models.Model(SHAPES, dict.fromkeys(SHAPES, dtype))

    (optimizer,) = models.train_sharded(1, make_model, [1], configure)
    (group,) = optimizer.sharded_model.groups
    gradient = StagedGradient(group)
    whole = Piece(0, group.shard.size, group.shard.segments)
    gradient.store_piece(whole, Mean(np.arange(15, dtype=dtype)))
    group.start_step(dict.fromkeys(["/a", "/b", "/c"], 1), None)
    return gradient


def freeze_b(optimizer: Any) -> None:
    optimizer.target.b.update_rule.enabled = False


def with_masters(optimizer: Any) -> None:
    optimizer.use_fp32_update()


def test_only_what_is_updated_is_divided_by_the_scale_and_once_a_step() -> None:
    gradient = staged("float32", freeze_b)
    for again in (False, True):
        found = gradient.unscaled(4.0, again)
        assert found is gradient.grad
        assert found[:6].tolist() == [i / 4 for i in range(6)]
        assert found[6:10].tolist() == [6, 7, 8, 9]
        assert found[10:].tolist() == [i / 4 for i in range(10, 15)]


def test_masters_leave_the_scaled_gradient_as_it_is() -> None:
    gradient = staged("float16", with_masters)
    for again in (False, True):
        found = gradient.unscaled(4.0, again)
        assert found.dtype == np.float32
        assert found.tolist() == [i / 4 for i in range(15)]
        assert gradient.grad.tolist() == list(range(15))


def test_hooks_see_shapes_rules_and_scale_and_write_in_place() -> None:
    gradient = staged("float32", freeze_b)
    parts = list(gradient.parts(8.0))
    assert [part.name for part in parts] == ["/a", "/b", "/c"]
    for part, shape in zip(parts, SHAPES.values(), strict=True):
        (view,) = part.views
        assert view.param.grad.shape == view.param.array.shape == shape
        assert view.param._loss_scale == 8.0
        assert part.rule is view.param.update_rule is not None
        view.param.grad[...] = 1
    assert gradient.grad.tolist() == [1] * 15
    # Those of rules only what is updated.
    of_rules = list(gradient.parts_of_rules(gradient.grad, 8.0))
    assert [part.name for part in of_rules] == ["/a", "/c"]


def test_hooks_of_rules_see_masters_without_a_scale() -> None:
    gradient = staged("float16", with_masters)
    grad = gradient.unscaled(4.0, again=False)
    for part in gradient.parts_of_rules(grad, 4.0):
        (view,) = part.views
        assert view.param.dtype == view.param.grad.dtype == np.float32
        assert view.param._loss_scale is None


def test_what_is_not_finite_is_named() -> None:
    gradient = staged("float32", freeze_b)
    assert list(gradient.not_finite()) == []
    gradient.grad[[3, 14]] = np.inf, np.nan
    assert list(gradient.not_finite()) == ["/a", "/c"]


def test_it_goes_to_the_parameters_and_back() -> None:
    gradient = staged("float32", freeze_b)
    gradient.show_in_parameters()
    buffers = gradient.group.buffers
    buffers.expose_flat_grad()
    assert [param.grad.ravel()[0] for param in buffers.params] == [0, 6, 10]
    for param in buffers.params:
        param.grad += 1
    gradient.read_parameters()
    assert gradient.grad.tolist() == list(range(1, 16))
