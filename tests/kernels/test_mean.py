"""The mean that is not evaluated yet: ranges of it, and no copy that is not needed."""

from __future__ import annotations

from smorms3_dist.kernels.mean import Mean

import numpy as np
import pytest

SUM = np.array([3, 6, np.inf, 1e38], np.float32)
LAST = np.array([3, 0, -np.inf, 3e38], np.float32)


def test_a_part_is_of_all_that_the_mean_is_of() -> None:
    part = Mean(SUM, LAST, 0.5).part(0, 2)
    np.testing.assert_array_equal(part.evaluated(), np.array([3, 3], np.float32))
    assert Mean(SUM).part(1, 2).evaluated().tolist() == [6]


@pytest.mark.parametrize("mean", [Mean(SUM, LAST, 0.5), Mean(SUM, None, 0.5), Mean(SUM, LAST)])
def test_it_is_evaluated_in_its_dtype_without_a_warning(mean: Mean) -> None:
    total = np.zeros(4, np.float32) if mean.second is None else LAST
    with np.errstate(all="ignore"):
        expected = (SUM + total) * np.float32(mean.scale)
    out = np.empty_like(SUM)
    mean.evaluate(out)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(mean.evaluated(), expected)


def test_what_is_the_mean_already_is_not_copied() -> None:
    values = np.ones(3, np.float32)
    assert Mean(values).evaluated() is values
