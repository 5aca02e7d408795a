"""Dots of whole arrays, of parts: the bits of NumPy's own."""

from __future__ import annotations

import itertools

from smorms3_dist.kernels import dots, selection
from smorms3_dist.kernels.dots import lanes_of_blas
from smorms3_dist.kernels.running_dot import RunningDot

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

SIZES = st.sampled_from([0, 1, 31, 32, 63, 64, 65, 127, 1000, 1023, 4096, 30001])


def numbers(rng: np.random.RandomState, size: int, dtype: str) -> np.ndarray:
    return (rng.standard_normal(size) * 10.0 ** rng.randint(-4, 2, size)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(SIZES, st.lists(st.integers(0, 30001), max_size=4), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_running_dot_has_the_bits_of_the_whole_wherever_it_is_cut(
    dtype: str, size: int, cuts: list[int], seed: int
) -> None:
    lanes = lanes_of_blas(np.dtype(dtype))
    if lanes is None:
        pytest.skip(f"this BLAS sums up {dtype} in another way")
    array = numbers(np.random.RandomState(seed), size, dtype)
    dot = RunningDot(size, array.dtype, lanes)
    bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
    for start, stop in itertools.pairwise(bounds):
        # Each part by another rank, which has the state of the one before.
        following = RunningDot(size, array.dtype, lanes)
        following.state[...] = dot.state
        dot = following
        dot.add(array[start:stop], start)
        assert dot.filled == stop
    assert dot.result().tobytes() == array.dot(array).tobytes()


@pytest.mark.parametrize("lanes", [64, 32])
def test_a_running_dot_is_a_sum_of_squares_whatever_its_lanes(lanes: int) -> None:
    array = numbers(np.random.RandomState(0), 30031, "float32")
    dot = RunningDot(array.size, array.dtype, lanes)
    dot.add(array, 0)
    assert dot.result() == pytest.approx(np.sum(np.square(array, dtype="d")), rel=1e-5)


def test_lanes_are_those_of_the_sums_that_numpy_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    of_numpy = dots.dot_of_numpy

    def found() -> int | None:
        lanes_of_blas.cache_clear()
        return lanes_of_blas(np.dtype("float32"))

    for lanes in 64, 32:
        monkeypatch.setattr(
            dots, "dot_of_numpy", lambda array, n=lanes: dots.dot_in_parts(array, n)
        )
        assert found() == lanes
    # One that is right in all sums but one, in the last bit.
    monkeypatch.setattr(
        dots,
        "dot_of_numpy",
        lambda array: np.nextafter(
            dots.dot_in_parts(array, 32), np.float32(np.inf if array.size == 12345 else 0)
        ),
    )
    assert found() is None
    monkeypatch.setattr(dots, "dot_of_numpy", of_numpy)
    monkeypatch.setattr(selection, "compiled_update", lambda dtype: None)
    assert found() is None
    monkeypatch.undo()
    lanes_of_blas.cache_clear()


def test_float16_has_no_lanes() -> None:
    assert lanes_of_blas(np.dtype("float16")) is None
