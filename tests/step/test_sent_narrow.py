"""Gradients that are sent in a narrow dtype: what is rounded, and what is noticed."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import chainer
import models
import numpy as np
import pytest
from chainer import optimizers
from narrow_trainings import (
    MODES,
    NARROW,
    SCALE,
    Configure,
    all_hooks,
    by_chainer,
    clipping,
    decay_of_a_rule,
    lars,
    nothing,
    static_scale,
    trained,
)


@pytest.mark.parametrize(
    ("make", "configure"),
    [
        (optimizers.SMORMS3, nothing),
        (optimizers.SMORMS3, all_hooks),
        (optimizers.SMORMS3, decay_of_a_rule),
        (optimizers.Adam, clipping),
        (optimizers.SMORMS3, lars),
        (optimizers.MSVAG, nothing),
        (lambda: models.OwnOptimizer(models.NormalizedRule), nothing),
    ],
)
@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("dtype", NARROW)
def test_an_update_is_chainers_with_the_mean_of_rounded_gradients(
    dtype: str, gradients: str, make: Any, configure: Configure
) -> None:
    for world_size in (1, 2, 3) if configure is nothing else (2,):
        theirs = by_chainer(world_size, dtype, make, configure)
        ours = trained(world_size, make, configure, communication_dtype=dtype, gradients=gradients)
        models.assert_same_bits(ours[0].target, theirs.target)
        exact = by_chainer(world_size, None, make, configure)
        assert not np.array_equal(exact.target.g.array, theirs.target.g.array)


@pytest.mark.parametrize("gradients", MODES)
def test_gradients_of_every_dtype_are_summed_in_their_own_whoever_owns_what(gradients: str) -> None:
    def make_model() -> chainer.Link:
        return models.Model(dtypes={"a": "float16", "b": "float64", "g": "float64"})

    for dtype, world_size in (("bfloat16", 5), ("float32", 3)):
        theirs = by_chainer(world_size, dtype, optimizers.SMORMS3, nothing, make_model)
        ours = trained(
            world_size, make_model=make_model, communication_dtype=dtype, gradients=gradients
        )
        models.assert_same_bits(ours[0].target, theirs.target)


def test_scaled_and_accumulated_gradients_are_rounded_once_as_they_are_sent() -> None:
    theirs = by_chainer(2, "float16", optimizers.SMORMS3, static_scale, scale=SCALE)
    for gradients in MODES:
        ours = trained(
            *(2, optimizers.SMORMS3, static_scale),
            scale=SCALE,
            communication_dtype="float16",
            gradients=gradients,
        )
        models.assert_same_bits(ours[0].target, theirs.target)

    def accumulated(optimizer: Any, rank: int) -> chainer.Link:
        optimizer.update()
        optimizer.update()
        for _ in range(2):
            optimizer.target.c.grad = np.full(7, 1 + 2.0**-8, "f")
            optimizer.update()
        return optimizer.target

    # Of two micro-batches the mean is rounded, and not each.
    make_model = lambda: models.Model({"c": (7,)})  # noqa: E731
    (link,) = models.on_ranks(
        1, accumulated, optimizers.SGD, make_model, communication_dtype="bfloat16", accumulate=2
    )
    expected = make_model().c.array - np.float32(0.01) * np.float32(1)
    np.testing.assert_array_equal(link.c.array, expected)


@pytest.mark.parametrize("narrow", ["communication_dtype", "gather_dtype"])
@pytest.mark.parametrize("dtype", NARROW)
def test_half_the_bytes_are_sent(dtype: str, narrow: str) -> None:
    sent = [
        [optimizer.collectives.bytes_sent for optimizer in trained(3, **options)]
        for options in ({}, {narrow: dtype})
    ]
    halved = {"communication_dtype": "reduce_scatter", "gather_dtype": "all_gather"}[narrow]
    for exact, rounded_ in zip(*sent, strict=True):
        assert exact[halved] == 2 * rounded_[halved] > 0
        assert {**exact, halved: 0} == {**rounded_, halved: 0}


def bad(optimizer: Any, rank: int, value: float) -> None:
    models.set_gradients(optimizer.target, rank, 1)
    if rank == 1:
        optimizer.target.e.grad[1, 1] = value


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize(
    ("dtype", "value", "stays"),
    [
        ("bfloat16", np.inf, False),
        ("float16", np.nan, False),
        ("bfloat16", 1e6, True),
        ("float16", 1e6, False),
        ("bfloat16", 3.4e38, False),
        ("float16", 65519.0, True),
    ],
)
def test_what_is_not_finite_when_it_is_sent_is_noticed(
    dtype: str, value: float, stays: bool, gradients: str
) -> None:
    options = {"communication_dtype": dtype, "gradients": gradients}

    def checked(optimizer: Any, rank: int) -> None:
        optimizer.update()
        before = optimizer.target.e.array.copy()
        bad(optimizer, rank, value)
        message = rf"as they are sent, in {dtype}, in .* that of /e on rank 1 \(1 of 66 elements"
        with contextlib.nullcontext() if stays else pytest.raises(RuntimeError, match=message):
            optimizer.update()
        assert np.array_equal(optimizer.target.e.array, before) != stays

    models.on_ranks(2, checked, check_finite="error", **options)

    def unchecked(optimizer: Any, rank: int) -> bool:
        optimizer.update()
        bad(optimizer, rank, value)
        optimizer.update()
        return bool(np.isfinite(optimizer.target.e.array).all())

    assert models.on_ranks(2, unchecked, optimizers.SGD, **options) == [stays] * 2

    def scaled(optimizer: Any, rank: int) -> float:
        optimizer.loss_scaling()
        optimizer.actual_optimizer._loss_scale = scale = SCALE
        optimizer.update()
        bad(optimizer, rank, value)
        for param in optimizer.target.params():
            param._loss_scale = scale
        optimizer.update()
        assert np.isfinite(optimizer.target.e.array).all()
        return optimizer._loss_scale / scale

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ratios = models.on_ranks(2, scaled, **options)
    assert [ratio < 1 for ratio in ratios] == [not stays] * 2
    assert any("gradient of /e is not finite" in str(each.message) for each in caught) != stays
