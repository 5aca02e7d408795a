"""The update of many segments: by runs on CPUs and by tables on GPUs, the same as one by one."""

from __future__ import annotations

from typing import Any

from smorms3_dist.kernels.chainer_rules import SMORMS3
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.operations import Operation, OperationKind
from smorms3_dist.kernels.segments import (
    MASTER,
    CommonSettings,
    CudaUpdate,
    HostUpdate,
    ParameterSettings,
)
from smorms3_dist.kernels.tables import Rates, Run
from smorms3_dist.layout import FlatLayout, ParameterSpec, Segment

import kernel_checks as checks
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

layouts = st.builds(
    lambda sizes, dtype, world_size, dense: FlatLayout(
        [ParameterSpec(f"/{i}", (size,), dtype) for i, size in enumerate(sizes)],
        world_size,
        dense=dense,
    ).groups[0],
    st.lists(st.sampled_from([1, 31, 64, 128, 333]), min_size=1, max_size=6),
    st.sampled_from(["float16", "float32", "float64"]),
    st.integers(1, 3),
    st.booleans(),
)


def settings_of(lr: float, times: int = 1, decay: float | None = None) -> ParameterSettings:
    operations = () if decay is None else (Operation(OperationKind.DECAY, decay),)
    return ParameterSettings(SMORMS3, ((1, lr, 1e-8),) * times, None, times, operations)


# Few, so that neighbours share them.
of_parameters = st.builds(settings_of, st.sampled_from([1e-3, 0.5]), st.integers(1, 2))
decaying = st.builds(settings_of, st.just(1e-3), st.just(1), st.floats(0, 0.1))


@given(st.data(), layouts, st.booleans(), st.booleans(), st.sampled_from([None, 3.0, 1024.0]))
@settings(max_examples=150, deadline=None)
def test_neighbours_are_updated_as_one_by_one(
    host_launcher: Any,
    data: st.DataObject,
    group: Any,
    masters: bool,
    decays: bool,
    loss_scale: float | None,
) -> None:
    shard = group.shards[data.draw(st.integers(0, len(group.shards) - 1))]
    rng = np.random.RandomState(data.draw(st.integers(0, 99)))
    low = group.dtype
    wide = np.dtype(np.float32) if masters and low == np.float16 else low
    items = [
        (segment, data.draw(decaying if decays else of_parameters)._replace(loss_scale=loss_scale))
        for segment in shard.segments
        if data.draw(st.integers(0, 4))
    ]
    common = CommonSettings((Operation(OperationKind.DECAY, 0.01),) if decays else ())
    first, second = (checks.numbers(rng, shard.size, low.name) for _ in range(2))
    # The host's sums of float16 are rounded to means before they are handed over.
    sums = low != np.float16 and data.draw(st.booleans())
    mean = Mean(first, second, 1 / 3) if sums else Mean(first)
    flat = rng.standard_normal(group.size).astype(low)
    states = {
        "mem": np.ones(shard.size, wide),
        "g": checks.numbers(rng, shard.size, wide.name),
        "g2": np.abs(checks.numbers(rng, shard.size, wide.name)),
    }
    if low != wide:
        states[MASTER] = rng.standard_normal(shard.size).astype(wide)

    def copies() -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return flat.copy(), {name: state.copy() for name, state in states.items()}

    expected, ours, on_gpu = copies(), copies(), copies()
    one_by_one(*expected, items, mean, common)
    HostUpdate(wide, 0).update(*ours, items, mean, 0, common)
    total = Mean(first + second, None, 1 / 3) if sums else mean
    CudaUpdate(host_launcher).update(*on_gpu, items, total, 0, common)
    for updated in ours, on_gpu:
        assert models.bits(updated[0]) == models.bits(expected[0])
        for name, state in expected[1].items():
            assert models.bits(updated[1][name]) == models.bits(state), name


def one_by_one(
    flat: np.ndarray,
    states: dict[str, np.ndarray],
    items: list[tuple[Segment, ParameterSettings]],
    mean: Mean,
    common: CommonSettings,
) -> None:
    """What the update must do, segment after segment."""
    arrays = {"param": flat, "grad": mean.evaluated(), **states}
    if MASTER in arrays:
        arrays["master"] = arrays.pop(MASTER)
    for segment, how in items:
        run = Run(segment.start_f, segment.start_s, segment.start_s, segment.size)
        decay, own_decay = (
            all[0].number if all else None for all in (common.operations, how.operations)
        )
        prepared = checks.Values(decay=decay, loss_scale=how.loss_scale or 1.0)
        for _, lr, eps in how.constants:
            checks.update_on_host(arrays, [run], [Rates((1, lr, eps), own_decay)], prepared)


def test_neighbours_that_share_settings_are_one_kernel_call() -> None:
    names = [ParameterSpec(f"/{i}", (64,), "float32") for i in range(5)]
    group = FlatLayout(names, 1).groups[0]
    shard = group.shards[0]
    update, sizes = HostUpdate(group.dtype, 0), []
    update._compiled = lambda formula, param, *_: sizes.append(param.size)
    same, other = settings_of(1e-3), settings_of(1e-2)
    items = list(zip(shard.segments, [same, same, other, same, same], strict=True))
    arrays = np.zeros(group.size, "f"), dict.fromkeys(("mem", "g", "g2"), np.zeros(shard.size, "f"))
    update.update(*arrays, items, Mean(np.zeros(shard.size, "f")), 0, CommonSettings())
    assert sizes == [128, 64, 128]
    del items[1]
    update.update(*arrays, items, Mean(np.zeros(shard.size, "f")), 0, CommonSettings())
    assert sizes[3:] == [64, 64, 128]


def test_only_a_gpu_skips_by_itself() -> None:
    with pytest.raises(AssertionError):
        HostUpdate(np.dtype("f"), 0).update(
            np.zeros(0, "f"), {}, [], Mean(np.zeros(0, "f")), 0, CommonSettings(skip=1.0)
        )
