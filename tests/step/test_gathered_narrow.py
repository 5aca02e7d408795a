"""Parameters that are gathered in a narrow dtype: what is rounded, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from smorms3_dist import create_multi_node_optimizer, load_checkpoint, save_checkpoint
from smorms3_dist.kernels.segments import MASTER

import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks, optimizers
from narrow_trainings import (
    MODES,
    NARROW,
    STEPS,
    Configure,
    by_chainer,
    clipping,
    decay_of_a_rule,
    lars,
    masters_of,
    nothing,
    rounded,
    trained,
)
from rank_threads import ThreadCollectives, run_ranks


def rounding_decay(dtype: str) -> Configure:
    """Chainer's weight decay, of what all ranks see of a parameter."""

    def configure(optimizer: Any) -> None:
        def decay(rule: Any, param: Any) -> None:
            param.grad += np.asarray(param.dtype.type(0.01) * rounded(param.array, dtype))

        decay.call_for_each_param = True  # type: ignore[attr-defined]
        optimizer.add_hook(decay)

    return configure


def rounding_lars(dtype: str) -> Configure:
    """Chainer's LARS, likewise."""

    def configure(optimizer: Any) -> None:
        def scale(rule: Any, param: Any) -> None:
            seen = chainer.Parameter(rounded(param.array, dtype))
            seen.grad = param.grad
            optimizer_hooks.GradientLARS(weight_decay=0.01)(rule, seen)

        scale.call_for_each_param = True  # type: ignore[attr-defined]
        optimizer.add_hook(scale)

    return configure


def decay(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))


def decay_and_lasso(optimizer: Any) -> None:
    # Not by the fused update, which decays weights alone.
    decay(optimizer)
    optimizer.add_hook(optimizer_hooks.Lasso(0.0))


@pytest.mark.parametrize(
    ("make", "configure", "same"),
    [
        (optimizers.SMORMS3, nothing, None),
        (optimizers.SMORMS3, decay, rounding_decay),
        (optimizers.SMORMS3, decay_and_lasso, rounding_decay),
        (optimizers.SMORMS3, lars, rounding_lars),
        (optimizers.SMORMS3, decay_of_a_rule, None),
        (optimizers.Adam, clipping, None),
        (lambda: models.OwnOptimizer(chainer.optimizers.sgd.SGDRule), nothing, None),
    ],
)
@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("dtype", NARROW)
def test_owners_keep_exact_parameters_and_all_see_rounded_ones(
    dtype: str, gradients: str, make: Any, configure: Configure, same: Any
) -> None:
    for world_size in (1, 2, 3) if configure in (nothing, decay) else (2,):
        if configure is clipping:
            # Decay is of what all see.
            def chainers(optimizer: Any) -> None:
                optimizer.add_hook(optimizer_hooks.GradientClipping(1.0))
                rounding_decay(dtype)(optimizer)
        else:
            chainers = configure if same is None else same(dtype)
        # The first step sees parameters as rank 0 had them: no difference for these hooks.
        theirs = by_chainer(world_size, None, make, chainers, make_rounded(dtype))
        ours = trained(
            *(world_size, make, configure, make_rounded(dtype)),
            gather_dtype=dtype,
            gradients=gradients,
        )
        masters = masters_of(ours)
        for name, exact in models.arrays(theirs.target).items():
            seen = models.arrays(ours[0].target)[name]
            assert models.bits(seen) == models.bits(rounded(exact, dtype)), name
            if exact.size:
                assert models.bits(masters[name]) == models.bits(exact.ravel()), name
        assert not np.array_equal(ours[0].target.g.array, theirs.target.g.array)


def make_rounded(dtype: str) -> Callable[[], chainer.Link]:
    """Makes a model whose first parameters are rounded already."""

    def make() -> chainer.Link:
        model = models.Model()
        for param in model.params():
            param.array[...] = rounded(param.array, dtype)
        return model

    return make


def frozen_until_step_4(optimizer: Any, step: int) -> None:
    optimizer.target.e.update_rule.enabled = step >= 4


def make(collectives: ThreadCollectives, kind: Any = optimizers.SMORMS3, **options: Any) -> Any:
    options = {"gather_dtype": "bfloat16", **options}
    return create_multi_node_optimizer(kind(), collectives, **options).setup(models.Model())


def train(optimizer: Any, steps: Iterable[int], rank: int) -> None:
    for step in steps:
        frozen_until_step_4(optimizer, step)
        models.train(optimizer, rank, [step])


SNAPSHOTS = ["consolidated", "of each rank"]


@pytest.mark.parametrize("how", ["checkpoint", "checkpoint, more ranks", *SNAPSHOTS])
@pytest.mark.parametrize("kind", [optimizers.SMORMS3, optimizers.SGD])
def test_promise_8_a_resumed_training_has_what_was_rounded_away(
    kind: Any, how: str, tmp_path: Path
) -> None:
    def first(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, kind)
        optimizer.update()
        train(optimizer, (1, 2), collectives.rank)
        if how.startswith("checkpoint"):
            save_checkpoint(tmp_path, optimizer)
        else:
            name = str(collectives.rank)
            if how == "consolidated":
                optimizer.consolidate()
                name = "0"
            if name == str(collectives.rank):
                chainer.serializers.save_npz(str(tmp_path / f"{name}.optimizer"), optimizer)
                chainer.serializers.save_npz(str(tmp_path / f"{name}.model"), optimizer.target)
        train(optimizer, (3, 4, 5), collectives.rank % 2)
        return optimizer

    def second(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, kind)
        if how.startswith("checkpoint"):
            load_checkpoint(tmp_path, optimizer)
        else:
            name = "0" if how == "consolidated" else str(collectives.rank)
            optimizer.target.e.update_rule.enabled = False
            chainer.serializers.load_npz(str(tmp_path / f"{name}.model"), optimizer.target)
            chainer.serializers.load_npz(str(tmp_path / f"{name}.optimizer"), optimizer)
        train(optimizer, (3, 4, 5), collectives.rank % 2)
        return optimizer

    straight = run_ranks(2, first)
    resumed = run_ranks(4 if how.endswith("more ranks") else 2, second)
    for optimizer in resumed:
        if len(resumed) == 2:
            models.assert_same_bits(optimizer.target, straight[0].target)
        else:
            for name, array in models.arrays(straight[0].target).items():
                np.testing.assert_allclose(models.arrays(optimizer.target)[name], array, 1e-2, 1e-2)
    if len(resumed) == 2:
        masters = masters_of(resumed)
        for name, values in masters_of(straight).items():
            assert models.bits(values) == models.bits(masters[name]), name


def test_a_checkpoint_goes_on_with_and_without_a_gather_dtype(tmp_path: Path) -> None:
    def saved(collectives: ThreadCollectives, gather_dtype: str | None) -> Any:
        optimizer = make(collectives, gather_dtype=gather_dtype)
        optimizer.update()
        models.train(optimizer, collectives.rank, (1, 2))
        save_checkpoint(tmp_path / str(gather_dtype), optimizer)
        return optimizer

    def loaded(collectives: ThreadCollectives, gather_dtype: str | None) -> Any:
        other = None if gather_dtype else "bfloat16"
        optimizer = make(collectives, gather_dtype=other)
        load_checkpoint(tmp_path / str(gather_dtype), optimizer)
        return optimizer

    for gather_dtype in ("bfloat16", None):
        before = run_ranks(3, lambda comm, dtype=gather_dtype: saved(comm, dtype))
        after = run_ranks(3, lambda comm, dtype=gather_dtype: loaded(comm, dtype))
        exact = masters_of(before if gather_dtype else after)
        for name, array in models.arrays((after if gather_dtype else before)[0].target).items():
            if array.size:
                assert models.bits(array.ravel()) == models.bits(exact[name]), name


def test_what_is_frozen_stays_exact_on_its_owner() -> None:
    theirs = optimizers.SMORMS3().setup(make_rounded("bfloat16")())
    exact = np.linspace(0.1, 0.2, 66, dtype="f").reshape(33, 2)
    theirs.target.e.array = exact.copy()
    for step in STEPS:
        frozen_until_step_4(theirs, step)
        models.set_mean_gradients(theirs.target, 2, step)
        theirs.update()

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives).setup(make_rounded("bfloat16")())
        optimizer.target.e.array = exact.copy()
        optimizer.update()
        train(optimizer, STEPS, collectives.rank)
        return optimizer

    masters = masters_of(run_ranks(2, run))
    for name, values in models.arrays(theirs.target).items():
        assert not values.size or models.bits(masters[name]) == models.bits(values.ravel()), name


@pytest.mark.parametrize("gradients", MODES)
def test_what_somebody_writes_counts(gradients: str) -> None:
    def before_step(model: Any, step: int) -> None:
        if step == 3:
            model.c.array[2:5] = 0.1
        if step == 4:
            model.e.array = np.full((33, 2), 0.3, "f")

    theirs = optimizers.SMORMS3().setup(make_rounded("bfloat16")())
    for step in STEPS:
        before_step(theirs.target, step)
        models.set_mean_gradients(theirs.target, 2, step)
        theirs.update()
        for param in theirs.target.params():
            seen = rounded(param.array, "bfloat16")
            beyond = np.abs(seen) > np.float32(1.2345678)
            param.array[...] = np.where(beyond, np.sign(seen) * np.float32(1.2345678), param.array)

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, gradients=gradients).setup(make_rounded("bfloat16")())
        hook = Clip()
        optimizer.add_hook(hook, timing="post")
        optimizer.update()
        for step in STEPS:
            before_step(optimizer.target, step)
            models.train(optimizer, collectives.rank, [step])
        optimizer.check_sync()
        assert optimizer.gradient_mode == gradients
        return optimizer

    ours = run_ranks(2, run)
    masters = masters_of(ours)
    for name, values in models.arrays(theirs.target).items():
        if values.size:
            assert models.bits(masters[name]) == models.bits(values.ravel()), name
            seen = models.arrays(ours[0].target)[name]
            assert models.bits(seen) == models.bits(rounded(values, "bfloat16")), name


class Clip:
    """Clips weights after each update."""

    name = "Clip"
    call_for_each_param = True
    timing = "post"
    is_elementwise = True

    def __call__(self, rule: Any, param: Any) -> None:
        np.clip(param.array, -1.2345678, 1.2345678, out=param.array)


def test_exact_parameters_move_with_a_model_that_changes_and_come_back_on_request() -> None:
    theirs = optimizers.SMORMS3().setup(make_rounded("bfloat16")())
    for step in (1, 2, 3):
        models.set_mean_gradients(theirs.target, 3, step)
        theirs.update()

    def whole(rule: Any, param: Any) -> None:
        assert param.array.size == param.grad.size

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives).setup(make_rounded("bfloat16")())
        optimizer.update()
        models.train(optimizer, collectives.rank, (1,))
        # One parameter runs whole on all ranks then, and is sent as it is.
        optimizer.target.g.update_rule.add_hook(whole, "whole")
        models.train(optimizer, collectives.rank, (2,))
        assert optimizer.sharded_model.model.plans["/g"].reason
        optimizer.target.g.update_rule.remove_hook("whole")
        models.train(optimizer, collectives.rank, (3,))
        rounded_ = {name: array.copy() for name, array in models.arrays(optimizer.target).items()}
        optimizer.gather_dtype = None
        optimizer.lay_out()
        return rounded_, optimizer.target

    for rounded_, ours in run_ranks(3, run):
        for name, values in models.arrays(theirs.target).items():
            np.testing.assert_allclose(models.arrays(ours)[name], values, 1e-6, 1e-6)
            np.testing.assert_array_equal(
                rounded_[name], rounded(models.arrays(ours)[name], "bfloat16")
            )


def test_a_repaired_parameter_keeps_what_was_rounded_away() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives)
        optimizer.update()
        models.train(optimizer, collectives.rank, (1, 2))
        (group,) = optimizer.sharded_model.sharded_groups
        before = group.states[MASTER].copy()
        right = optimizer.target.g.array.copy()
        if collectives.rank:
            optimizer.target.g.array[...] = 7
        optimizer.check_sync(repair=True)
        np.testing.assert_array_equal(optimizer.target.g.array, right)
        np.testing.assert_array_equal(group.states[MASTER], before)

    run_ranks(2, run)


def test_masters_take_4_bytes_a_parameter_over_all_ranks() -> None:
    exact, narrow = (
        sum(each.state_bytes() for each in trained(3, gather_dtype=dtype))
        for dtype in (None, "bfloat16")
    )
    assert narrow - exact == 4 * sum(param.size for param in models.Model().params())


@pytest.mark.parametrize("option", ["communication_dtype", "gather_dtype"])
def test_ranks_with_different_dtypes_are_refused(option: str) -> None:
    def run(collectives: ThreadCollectives, early: bool) -> None:
        value = "bfloat16" if collectives.rank == 1 else None
        optimizer = make(collectives, **{"gather_dtype": None, option: value})
        message = (
            rf"{option}(: None on rank 0, bfloat16| is None on rank 0 and 'bfloat16') on rank 1"
        )
        if early:
            with pytest.raises(ValueError, match=message):
                optimizer.lay_out()
        else:
            with pytest.raises(RuntimeError, match=message):
                optimizer.update()

    for early in (True, False):
        run_ranks(2, lambda collectives, early=early: run(collectives, early))


@pytest.mark.parametrize("gradients", MODES)
def test_tied_parameters_and_those_without_a_rule(gradients: str) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.target.twin.e.update_rule = None

    theirs = by_chainer(2, None, optimizers.SMORMS3, configure, models.Tied)
    ours = trained(
        *(2, optimizers.SMORMS3, configure, models.Tied),
        gather_dtype="bfloat16",
        gradients=gradients,
    )
    masters = masters_of(ours)
    for name, exact in models.arrays(theirs.target).items():
        seen = models.arrays(ours[0].target)[name]
        if name == "/twin/e":
            assert models.bits(seen) == models.bits(exact)
        elif exact.size and name in masters:
            assert models.bits(masters[name]) == models.bits(exact.ravel()), name
            assert models.bits(seen) == models.bits(rounded(exact, "bfloat16")), name


@pytest.mark.parametrize("world_size", [1, 3])
def test_all_parameters_of_a_dtype_may_be_empty(world_size: int) -> None:
    def make_model() -> models.Model:
        return models.Model({"f": (0, 4), "h": (0,), "d": (7,)}, {"d": "float64"})

    theirs = make_model()
    models.train_with_chainer(theirs, world_size, STEPS)

    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, STEPS)
        assert [p.update_rule.t for p in optimizer.target.params()] == [len(STEPS)] * 3
        exact = theirs.d.array
        assert models.bits(optimizer.target.d.array) == models.bits(rounded(exact, "float16"))

    models.on_ranks(
        world_size, body, make_model=make_model, gather_dtype="float16", step_after_broadcast=True
    )


def test_promise_8_before_the_first_step_parameters_are_saved_as_they_are(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives, saves: bool) -> Any:
        optimizer = make(collectives)
        if saves:
            optimizer.update()
            save_checkpoint(tmp_path, optimizer)
        else:
            optimizer.target.g.array[...] = 0
            load_checkpoint(tmp_path, optimizer)
        models.assert_same_bits(optimizer.target, models.Model())
        models.train(optimizer, collectives.rank, (1,))
        return optimizer.target

    saved = run_ranks(3, lambda collectives: run(collectives, True))
    loaded = run_ranks(3, lambda collectives: run(collectives, False))
    models.assert_alike([*saved, *loaded])
