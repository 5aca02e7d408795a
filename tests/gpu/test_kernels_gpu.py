"""The kernels on a real GPU: exact launchers give NumPy's bits, others stay within tolerances."""

from __future__ import annotations

from smorms3_dist.kernels import tables
from smorms3_dist.kernels.cuda import CupyLauncher
from smorms3_dist.kernels.tables import Arrays, GradientCheck, PackedPart, Preparation, Rates, Run

import kernel_checks as checks
import numpy as np
import pytest
from kernel_checks import DTYPES, SIZES, Values, check_norm, check_pack, check_update

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)


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


@pytest.mark.parametrize("size", [*SIZES, 3_000_001])
@each_dtype
def test_updates_equal_numpy(exact: checks.Device, dtypes: tuple[str, str, str], size: int) -> None:
    check_update(exact, dtypes, [Run(0, 0, 0, size)])


@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize("which", [["param"], ["grad"], ["mem"], ["g"], ["g2"], ["master"], None])
@each_dtype
def test_arrays_may_start_anywhere(
    exact: checks.Device, dtypes: tuple[str, str, str], which: list[str] | None, start: int
) -> None:
    names = which or ["param", "grad", "mem", "g", "g2", "master"]
    check_update(exact, dtypes, [Run(0, 0, 0, 9001)], starts=dict.fromkeys(names, start))


@each_dtype
def test_zeros_subnormals_infinities_and_nans(
    exact: checks.Device, dtypes: tuple[str, str, str]
) -> None:
    values = checks.specials(dtypes[1])
    first, second = (a.reshape(-1) for a in np.meshgrid(values, values, indexing="ij"))
    check_update(exact, dtypes, [Run(0, 0, 0, first.size)], grads=[first, second, first])


@pytest.mark.parametrize("blocks", [3, tables.MAX_BLOCKS])
@each_dtype
def test_many_runs_with_hyperparameters_of_their_own(
    exact: checks.Device,
    dtypes: tuple[str, str, str],
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables, "MAX_BLOCKS", blocks)
    check_update(exact, dtypes, *checks.scattered_runs())


@pytest.mark.parametrize("how", [*checks.PREPARATIONS, Values(skip=1.0), Values(skip=np.nan)])
@each_dtype
def test_gradients_are_prepared_on_the_way(
    exact: checks.Device, dtypes: tuple[str, str, str], how: Values
) -> None:
    check_update(exact, dtypes, [Run(0, 0, 0, 1023)], [Rates(1e-3, 1e-8, 0.1)], how)


@each_dtype
def test_contraction_stays_within_its_tolerances(
    contracting: checks.Device, dtypes: tuple[str, str, str]
) -> None:
    checks.check_training(contracting, dtypes, checks.close)


@each_dtype
def test_exact_training_equals_numpy(exact: checks.Device, dtypes: tuple[str, str, str]) -> None:
    checks.check_training(exact, dtypes, checks.same_bits)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize("target", ["float16", "float32", "float64"])
def test_mixed_gradients_and_missing_ones_are_packed(
    exact: checks.Device, target: str, scale: float, start: int
) -> None:
    rng = np.random.RandomState(5)
    gradients: list[np.ndarray | None] = [
        checks.draw(rng, 10000, dtype) for dtype in ("float16", "float32", "float64")
    ]
    gradients.insert(1, None)
    parts = [
        PackedPart(3, 9001, 0),
        PackedPart(0, 77, 9010),
        PackedPart(0, 10000, 9090),
        PackedPart(8, 5000, 19091),
    ]
    check_pack(exact, target, gradients, parts, scale, start, starts=[0, 0, 1, 2])


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize("other", ["float16", "float32", "float64"])
def test_gradients_are_packed_as_bfloat16_and_back(
    exact: checks.Device, other: str, scale: float
) -> None:
    rng = np.random.RandomState(8)
    gradients = [checks.specials(other), checks.draw(rng, 10000, other)]
    parts = [PackedPart(0, gradients[0].size, 0), PackedPart(0, 10000, gradients[0].size)]
    check_pack(exact, "uint16", gradients, parts, scale)
    rounded = [checks.bfloat16(gradient) for gradient in gradients]
    check_pack(exact, other, rounded, parts, scale)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("size", [*SIZES, 5_000_001])
@pytest.mark.parametrize(
    ("dtype", "of_grad"), [(param, grad) for param, grad, wide in DTYPES if param == wide]
)
def test_norms_and_checks_equal_numpy(
    exact: checks.Device, dtype: str, of_grad: str, size: int, start: int
) -> None:
    rng = np.random.RandomState(6)
    grads = [checks.draw(rng, length, of_grad) for length in (size, 9001)]
    assert check_norm(exact, grads, dtype, 1 / 3, start)[1] == 0
    grads[1][5000] = np.nan
    assert check_norm(exact, grads, dtype, 1 / 3, start)[1] == 1


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
