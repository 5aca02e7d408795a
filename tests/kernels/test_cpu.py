"""SMORMS3, compiled and in NumPy: the same bits as Chainer, for any input, in place."""

from __future__ import annotations

import logging
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from smorms3_dist.kernels import reference, selection
from smorms3_dist.kernels.chainer_rules import SMORMS3
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.selection import compiled_update

import chainer
import models
import mpirun
import numpy as np
import process
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import specials

sizes = st.sampled_from([0, 1, 2, 3, 7, 64, 1023, reference.BLOCK, reference.BLOCK + 1, 70001])


Kernel = Callable[[np.ndarray, Mean, list[np.ndarray], float, float], None]


def compiled(
    param: np.ndarray, mean: Mean, states: list[np.ndarray], lr: float, eps: float
) -> None:
    update = compiled_update(param.dtype)
    assert update is not None
    update(SMORMS3, param, mean, states, (1, lr, eps))


CASES = [
    pytest.param(dtype, kernel, id=f"{dtype}-{name}")
    for dtype in ("float16", "float32", "float64")
    for name, kernel in [("numpy", reference.smorms3), ("numba", compiled)]
    if kernel is reference.smorms3 or compiled_update(np.dtype(dtype)) is not None
]


def draw(rng: np.random.RandomState, size: int, dtype: str) -> np.ndarray:
    """Gradients of many magnitudes."""
    return (rng.standard_normal(size) * 10.0 ** rng.randint(-8, 3, size)).astype(dtype)


def train_both(
    kernel: Kernel,
    grads: list[np.ndarray],
    start: np.ndarray,
    lr: float = 1e-3,
    eps: float = 1e-16,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameter and states after the same gradients, by Chainer and by a kernel."""
    param = chainer.Parameter(start.copy())
    rule = chainer.optimizers.SMORMS3(lr, eps).create_update_rule()
    ours = {
        "param": start.copy(),
        "mem": np.ones_like(start),
        "g": np.zeros_like(start),
        "g2": np.zeros_like(start),
    }
    for grad in grads:
        param.grad = grad.copy()
        with np.errstate(all="ignore"):
            rule.update(param)
        _, *states = ours.values()
        kernel(ours["param"], Mean(grad), states, lr, eps)
    return {"param": param.array, **rule.state}, ours


@pytest.mark.parametrize(("dtype", "kernel"), CASES)
@given(
    sizes,
    st.integers(0, 99),
    st.integers(1, 30),
    st.sampled_from([(1e-3, 1e-16), (0.0, 1e-16), (0.5, 1e-8), (np.nan, 1e-16), (6e4, 0.0)]),
)
@settings(max_examples=25, deadline=None)
def test_steps_equal_chainer_bit_for_bit(
    dtype: str, kernel: Kernel, size: int, seed: int, steps: int, rates: tuple[float, float]
) -> None:
    rng = np.random.RandomState(seed)
    grads = [draw(rng, size, dtype) for _ in range(min(steps, 1 + 50_000 // (size + 1)))]
    for grad in grads:
        grad.flags.writeable = False
    theirs, ours = train_both(kernel, grads, rng.standard_normal(size).astype(dtype), *rates)
    for name, expected in theirs.items():
        assert models.bits(ours[name]) == models.bits(expected), name


@pytest.mark.parametrize(("dtype", "kernel"), CASES)
@given(sizes, st.integers(0, 99), st.sampled_from([1.0, 0.5, 1 / 3]))
@settings(max_examples=25, deadline=None)
def test_a_mean_formed_in_the_kernel_equals_one_formed_before(
    dtype: str, kernel: Kernel, size: int, seed: int, scale: float
) -> None:
    rng = np.random.RandomState(seed)
    grad, other = (draw(rng, size, dtype) for _ in range(2))
    fused, apart = ([np.ones(size, dtype) for _ in range(4)] for _ in range(2))
    for _ in range(3):
        kernel(fused[0], Mean(grad, other, scale), fused[1:], 1e-3, 1e-16)
        mean = (grad + other) * np.dtype(dtype).type(scale)
        kernel(apart[0], Mean(mean), apart[1:], 1e-3, 1e-16)
    for one, two in zip(fused, apart, strict=True):
        assert models.bits(one) == models.bits(two)


@pytest.mark.parametrize(("dtype", "kernel"), CASES)
@pytest.mark.parametrize(("lr", "eps"), [(1e-3, 1e-16), (0.5, 0.0)])
def test_zeros_subnormals_infinities_and_nans_equal_chainer(
    dtype: str, kernel: Kernel, lr: float, eps: float
) -> None:
    values = specials(dtype)
    first, second = (a.reshape(-1) for a in np.meshgrid(values, values, indexing="ij"))
    # Looked at after one step as well: what is nan by then hides all that comes after.
    for grads in [first], [first, second, first]:
        theirs, ours = train_both(kernel, grads, np.ones_like(first), lr, eps)
        for name, expected in theirs.items():
            assert models.bits(ours[name]) == models.bits(expected), name
    # The comparison would mean little if nothing but nan were left.
    assert np.isfinite(ours["param"]).any()
    assert np.isnan(ours["param"]).any()


@pytest.mark.parametrize(("dtype", "kernel"), CASES)
def test_nothing_of_the_parameters_size_is_allocated(dtype: str, kernel: Kernel) -> None:
    param, grad, other, *states = (np.ones(1 << 20, dtype) for _ in range(6))
    mean = Mean(grad, other, 0.5)
    kernel(param, mean, states, 1e-3, 1e-16)
    tracemalloc.start()
    try:
        kernel(param, mean, states, 1e-3, 1e-16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024


def test_numba_compiles_float32_and_float64() -> None:
    cpu = pytest.importorskip("smorms3_dist.kernels.cpu")
    assert compiled_update(np.dtype(np.float16)) is None
    assert compiled_update(np.dtype(np.float32)) is cpu.update
    assert compiled_update(np.dtype(np.float64)) is cpu.update


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'numba'", name="numba"), "Numba is not installed"),
        (ImportError("needs NumPy 2.4 or less"), "cannot be imported (needs NumPy 2.4 or less)"),
    ],
)
def test_without_numba_nothing_is_compiled_and_rank_0_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: ImportError,
    said: str,
) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "numba":
                raise error

    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.delitem(sys.modules, "smorms3_dist.kernels.cpu", raising=False)
    monkeypatch.delattr("smorms3_dist.kernels.cpu", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    selection._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="smorms3_dist"):
        assert compiled_update(np.dtype(np.float32), rank=1) is None
        assert caplog.messages == []
        for _ in range(2):
            assert compiled_update(np.dtype(np.float32), rank=0) is None
    (message,) = caplog.messages
    assert said in message and "pip install --upgrade numba" in message


def test_processes_may_compile_at_the_same_time(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    code = (
        "import numpy as np; from smorms3_dist.kernels.chainer_rules import SMORMS3\n"
        "from smorms3_dist.kernels.cpu import Mean, update\n"
        "for dtype in 'f', 'd':\n"
        "    arrays = [np.ones(9, dtype) for _ in range(5)]\n"
        "    update(SMORMS3, arrays[0], Mean(arrays[1]), arrays[2:], (1, 1e-3, 1e-16))\n"
        "    print(arrays[0][0])\n"
    )
    environment = mpirun.environment(NUMBA_CACHE_DIR=str(tmp_path))
    command = (sys.executable, "-W", "error", "-c", code)
    started = [process.start(*command, env=environment) for _ in range(2)]
    (result,) = {process.finish(each, 120) for each in started}
    assert result[0] == 0, result
    assert len(list(tmp_path.iterdir())) == 2  # a loop for each dtype
