"""Rounding to narrow dtypes: to the nearest, in ties to the even one, compiled and in NumPy."""

from __future__ import annotations

from typing import Any

from smorms3_dist.kernels import narrow
from smorms3_dist.kernels.narrow import BFLOAT16, SENT_AS

import numpy as np
import pytest

RNG = np.random.RandomState(0)
EDGES = np.array(
    # Ties between two neighbours, below and above; the largest that stays finite, and the first
    # that does not; subnormals; nan with nothing but lower bits.
    [
        *(0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF),
        *(0, 1, 0x8000, 0x8001, 0x18000, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7FC00000),
    ],
    np.uint32,
)
BITS = np.concatenate([EDGES, EDGES | 1 << 31, RNG.randint(0, 1 << 32, 70_000, np.uint32)])


@pytest.fixture(params=["compiled", "NumPy"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "NumPy":
        monkeypatch.setattr(narrow, "compiled_rounding", lambda: None)
    else:
        pytest.importorskip("numba")
    return request.param


def nearest(bits: int) -> int:
    """The bits of the bfloat16 that is nearest, by distances in float64."""
    below = bits >> 16
    values = [
        np.array([low << 16], np.uint32).view("f").astype("d")[0] for low in (below, below + 1)
    ]
    if not np.isfinite(values[1]):
        values[1] = np.copysign(2.0**128, values[0])
    exact = np.array([bits], np.uint32).view("f").astype("d")[0]
    down, up = abs(exact - values[0]), abs(values[1] - exact)
    return below if down < up or (down == up and below % 2 == 0) else below + 1


def test_bfloat16_is_the_nearest_or_the_even_one_of_two(way: str) -> None:
    values = BITS.view("f")
    out = np.empty(values.size, BFLOAT16)
    narrow.narrow(values, out)
    wide = np.empty(values.size, "f")
    narrow.widen(out, wide)
    np.testing.assert_array_equal(np.isnan(wide), np.isnan(values))
    assert 0 < np.isnan(values).sum() < values.size / 10
    few = [index for index in range(2000) if np.isfinite(values[index])]
    assert [int(each) for each in out[few]] == [nearest(int(BITS[index])) for index in few]
    infinite = np.isinf(values)
    np.testing.assert_array_equal(wide[infinite], values[infinite])
    # A nan keeps what it has of its sign and upper bits.
    nan = np.isnan(values)
    np.testing.assert_array_equal(out[nan] & 0xFFBF, (BITS[nan] >> 16) & 0xFFBF)


def test_both_ways_give_the_same_bits() -> None:
    pytest.importorskip("numba")
    out = np.empty(BITS.size, BFLOAT16)
    narrow.narrow(BITS.view("f"), out)
    expected = np.empty_like(out)
    narrow._round_bits(BITS, expected)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("size", [0, 1, 3, 7, 40_000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SENT_AS)
def test_what_is_rounded_is_sent_exactly(way: str, name: str, dtype: str, size: int) -> None:
    sent = SENT_AS[name]
    values = (RNG.standard_normal(size) * 10.0 ** RNG.randint(-9, 9, size)).astype(dtype)
    rounded = np.empty_like(values)
    narrow.round_to(sent, values, rounded)
    bits = np.empty(size, sent)
    narrow.narrow(rounded, bits)
    again = np.empty_like(values)
    narrow.widen(bits, again)
    np.testing.assert_array_equal(again, rounded)
    assert narrow.is_rounded(sent, values, rounded)
    if size and name != dtype:
        assert not np.array_equal(rounded, values)
        assert not narrow.is_rounded(sent, values, values)
        rounded[-1] = 77
        assert not narrow.is_rounded(sent, values, rounded)
    narrow.round_to(sent, values, values)
    np.testing.assert_array_equal(values, again)


def test_float16_overflows_to_infinity_without_a_warning() -> None:
    out = np.empty(4, "e")
    narrow.narrow(np.array([65519.99, 65520, -1e30, np.nan], "f"), out)
    np.testing.assert_array_equal(out, np.array([65504, np.inf, -np.inf, np.nan], "e"))


def test_only_what_takes_fewer_bytes_is_narrower() -> None:
    found = {
        (name, dtype): narrow.narrower(name, np.dtype(dtype))
        for name in (None, *SENT_AS)
        for dtype in ("float16", "float32", "float64")
    }
    assert {key: value for key, value in found.items() if value is not None} == {
        ("bfloat16", "float32"): BFLOAT16,
        ("bfloat16", "float64"): BFLOAT16,
        ("float16", "float32"): np.float16,
        ("float16", "float64"): np.float16,
        ("float32", "float64"): np.float32,
    }
