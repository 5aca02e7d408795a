"""The kernels on a real GPU: exact launchers give NumPy's bits, others stay within tolerances."""

from __future__ import annotations

from typing import Any

from smorms3_dist.kernels import tables
from smorms3_dist.kernels.cuda import CupyLauncher
from smorms3_dist.kernels.tables import Arrays, GradientCheck, Preparation, Run

import kernel_checks as checks
import numpy as np
import pytest
from hypothesis import given, settings
from kernel_checks import DTYPES, check_norm, check_pack, check_update

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
wide = settings(max_examples=200, deadline=None)


def device_of(exact: bool) -> checks.Device:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    try:
        launcher = CupyLauncher(exact)
    except RuntimeError as error:
        pytest.skip(str(error))
    return checks.Device(launcher, cupy.asarray, cupy.asnumpy)


@pytest.fixture(scope="module")
def exact() -> checks.Device:
    return device_of(True)


@pytest.fixture(scope="module")
def contracting() -> checks.Device:
    return device_of(False)


@given(checks.updates(), checks.few_blocks)
@wide
def test_an_update_equals_numpy(exact: checks.Device, case: dict[str, Any], blocks: int) -> None:
    with checks.at_most("MAX_BLOCKS", blocks):
        check_update(exact, **case)


@given(checks.packs(), checks.few_blocks)
@wide
def test_packing_equals_numpy(exact: checks.Device, case: dict[str, Any], blocks: int) -> None:
    with checks.at_most("MAX_BLOCKS", blocks):
        check_pack(exact, **case)


@given(checks.norms(), checks.few_blocks)
@wide
def test_norms_and_checks_equal_numpy(
    exact: checks.Device, case: dict[str, Any], blocks: int
) -> None:
    with checks.at_most("CHECK_BLOCKS", blocks):
        check_norm(exact, **case)


@each_dtype
def test_millions_of_elements(exact: checks.Device, dtypes: tuple[str, str, str]) -> None:
    check_update(exact, dtypes, [Run(0, 0, 0, 3_000_001)])
    grads = [checks.numbers(np.random.RandomState(6), size, dtypes[1]) for size in (5_000_001, 9)]
    check_norm(exact, grads, dtypes[0], 1 / 3)


@each_dtype
def test_zeros_subnormals_infinities_and_nans(
    exact: checks.Device, dtypes: tuple[str, str, str]
) -> None:
    values = checks.specials(dtypes[1])
    first, second = (a.reshape(-1) for a in np.meshgrid(values, values, indexing="ij"))
    check_update(exact, dtypes, [Run(0, 0, 0, first.size)], grads=[first, second, first])


@each_dtype
def test_contraction_stays_within_its_tolerances(
    contracting: checks.Device, dtypes: tuple[str, str, str]
) -> None:
    checks.check_training(contracting, dtypes, checks.close)


@each_dtype
def test_exact_training_equals_numpy(exact: checks.Device, dtypes: tuple[str, str, str]) -> None:
    checks.check_training(exact, dtypes, checks.same_bits)


def test_a_non_finite_gradient_skips_the_step_without_the_host(exact: checks.Device) -> None:
    grad = exact.put(np.array([1, np.inf, 2], np.float32))
    check = GradientCheck(exact.launcher, [3])
    table = tables.UpdateTable(exact.launcher, [Run(0, 0, 0, 3)])
    table.set_rates([checks.RATES])
    arrays = Arrays(*(exact.put(np.ones(3, np.float32)) for _ in range(5)))._replace(grad=grad)
    check.run([grad], np.dtype(np.float32))
    table.update(arrays, Preparation(skip=check.result[1:]))
    assert (exact.get(arrays.param) == 1).all()
    grad[1] = 0
    check.run([grad], np.dtype(np.float32))
    table.update(arrays, Preparation(skip=check.result[1:]))
    assert (exact.get(arrays.param)[[0, 2]] < 1).all()


def test_offsets_have_64_bits(exact: checks.Device) -> None:
    import cupy

    far = 2**31 + 8
    size = 5 * 2 * (far + 100)
    if cupy.cuda.runtime.memGetInfo()[0] < size + (1 << 30):
        pytest.skip(f"less than {size >> 30} GiB of GPU memory are free")
    long = [cupy.zeros(far + 100, np.float16) for _ in range(5)]
    for array in long[1:]:
        array[far:] = 0.5
    table = tables.UpdateTable(exact.launcher, [Run(far, far, far, 100)])
    table.set_rates([checks.RATES])
    table.update(Arrays(*long))
    assert bool((long[0][far:] < 0).all())
    assert bool((long[2][far:] != 0.5).all())
    assert not any(array[:1000].any() for array in long)
    long.clear()
    cupy.get_default_memory_pool().free_all_blocks()
