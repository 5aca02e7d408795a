"""The kernels for GPUs, run on the CPU by g++: the same bits as in NumPy."""

from __future__ import annotations

import dataclasses
import pathlib
import platform
import shutil
import sys
import types

from smorms3_dist.kernels import cuda, tables
from smorms3_dist.kernels.tables import Arrays, GradientCheck, PackedPart, PackTable, Rates, Run

import cuda_host
import kernel_checks as checks
import models
import numpy as np
import pytest
from kernel_checks import DTYPES, SIZES, Values, check_norm, check_pack, check_update

FLOAT32 = ("float32", "float32", "float32")

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 128 bytes, as device memory does."""
    raw = np.empty(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 128
    copy = raw[start : start + array.nbytes].view(array.dtype)
    copy[...] = array
    return copy


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> checks.Device:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    launcher = cuda_host.build(tmp_path_factory.mktemp("kernels"))
    return checks.Device(launcher, aligned, lambda array: array)


@pytest.fixture(scope="module")
def contracting(host: checks.Device, tmp_path_factory: pytest.TempPathFactory) -> checks.Device:
    cpu = pathlib.Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or " fma " not in cpu.read_text():
        pytest.skip("this CPU is not known to have fused multiply-adds")
    folder = tmp_path_factory.mktemp("contracting")
    launcher = cuda_host.build(folder, "-ffp-contract=fast", "-mfma")
    return dataclasses.replace(host, launcher=launcher)


@pytest.mark.parametrize("size", SIZES)
@each_dtype
def test_updates_equal_numpy(host: checks.Device, dtypes: tuple[str, str, str], size: int) -> None:
    check_update(host, dtypes, [Run(0, 0, 0, size)], steps=5)


@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize("which", [["param"], ["grad"], ["mem"], ["g"], ["g2"], ["master"], None])
@each_dtype
def test_arrays_may_start_anywhere(
    host: checks.Device, dtypes: tuple[str, str, str], which: list[str] | None, start: int
) -> None:
    names = which or ["param", "grad", "mem", "g", "g2", "master"]
    check_update(host, dtypes, [Run(0, 0, 0, 9001)], starts=dict.fromkeys(names, start))


@each_dtype
def test_zeros_subnormals_infinities_and_nans(
    host: checks.Device, dtypes: tuple[str, str, str]
) -> None:
    values = checks.specials(dtypes[1])
    first, second = (a.reshape(-1) for a in np.meshgrid(values, values, indexing="ij"))
    after = check_update(
        host, dtypes, [Run(0, 0, 0, first.size)], grads=[first, second, first], steps=3
    )
    assert np.isnan(after["param"]).any()
    assert np.isfinite(after["param"][: first.size]).any()


@pytest.mark.parametrize("blocks", [3, tables.MAX_BLOCKS])
@each_dtype
def test_many_runs_with_hyperparameters_of_their_own_are_one_launch(
    host: checks.Device,
    dtypes: tuple[str, str, str],
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables, "MAX_BLOCKS", blocks)
    host.launcher.launches.clear()
    runs, rates = checks.scattered_runs()
    check_update(host, dtypes, runs, rates, steps=2)
    assert len(host.launcher.launches) == 2


@each_dtype
def test_contraction_stays_within_its_tolerances(
    dtypes: tuple[str, str, str], contracting: checks.Device
) -> None:
    checks.check_training(contracting, dtypes, checks.close)
    if dtypes == FLOAT32:
        with pytest.raises(AssertionError):
            checks.check_training(contracting, dtypes, checks.same_bits)


@pytest.mark.parametrize(
    "how",
    checks.PREPARATIONS,
)
@each_dtype
def test_gradients_are_prepared_on_the_way(
    host: checks.Device, dtypes: tuple[str, str, str], how: Values
) -> None:
    plain = check_update(host, dtypes, [Run(0, 0, 0, 1023)])
    prepared = check_update(host, dtypes, [Run(0, 0, 0, 1023)], how=how)
    changes = how not in (Values(clip=1.0), Values(clip=2.0), Values(skip=0.0))
    assert (models.bits(plain["g2"]) != models.bits(prepared["g2"])) == changes


@each_dtype
def test_weight_decay_of_rules_differs_by_run(
    host: checks.Device, dtypes: tuple[str, str, str]
) -> None:
    runs = [Run(0, 0, 0, 100), Run(100, 100, 100, 100)]
    how = Values(decay=0.5, loss_scale=8.0)
    check_update(host, dtypes, runs, [Rates(1e-3, 1e-8, 0.1), Rates(1e-3, 1e-8)], how)


@pytest.mark.parametrize("skip", [1.0, 3.0, np.nan, np.inf])
@each_dtype
def test_a_skipped_step_touches_nothing(
    host: checks.Device, dtypes: tuple[str, str, str], skip: float
) -> None:
    check_update(host, dtypes, [Run(0, 0, 0, 1023)], how=Values(skip=skip))


def test_hyperparameters_are_copied_to_the_device_only_when_they_change(
    host: checks.Device,
) -> None:
    table = tables.UpdateTable(host.launcher, [Run(0, 0, 0, 8)] * 2)
    uploads = [host.launcher.uploads]
    for lr in (0.1, 0.1, 0.2, np.nan, np.nan):
        table.set_rates([Rates(lr, 1e-8)] * 2)
        uploads.append(host.launcher.uploads)
    assert np.diff(uploads).tolist() == [1, 0, 1, 1, 0]
    with pytest.raises(ValueError, match="a table of 2 rows cannot take 3"):
        table.set_rates([Rates(0.1, 1e-8)] * 3)


def test_offsets_have_64_bits(host: checks.Device, tmp_path: pathlib.Path) -> None:
    # Files with holes: memory that is not touched does not exist.
    far = 2**32 + 8
    long = [np.memmap(tmp_path / f"{i}", np.float16, "w+", shape=(far + 100,)) for i in range(5)]
    for array in long[1:]:
        array[far:] = 0.5
    param, grad, mem, g, g2 = long
    table = tables.UpdateTable(host.launcher, [Run(far, far, far, 100)])
    table.set_rates([checks.RATES])
    table.update(Arrays(param, grad, mem, g, g2))
    assert (param[far:] < 0).all()
    assert (mem[far:] != 0.5).all()
    assert not any(array[:1000].any() for array in long)
    PackTable(host.launcher, [PackedPart(0, 100, far)]).pack([grad[far:]], param)
    assert (param[far:] == 0.5).all()
    PackTable(host.launcher, [PackedPart(far, 100, 0)]).pack([param], g[:100])
    assert (g[:100] == 0.5).all()


CAST = [(source, target) for source in "efd" for target in "efd"]


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize(("source", "target"), CAST)
def test_packing_casts_and_scales(
    host: checks.Device, source: str, target: str, scale: float
) -> None:
    rng = np.random.RandomState(4)
    parts, offset = [], 0
    for size in SIZES:
        parts.append(PackedPart(0, size, offset))
        offset += -(-size // 64) * 64
    gradients = [checks.draw(rng, size, source) for size in SIZES]
    gradients[-2][: len(checks.SPECIAL)] = checks.specials(source)
    check_pack(host, np.dtype(target).name, gradients, parts, scale)


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize("other", "efd")
def test_gradients_are_packed_as_bfloat16_and_back(
    host: checks.Device, other: str, scale: float
) -> None:
    rng = np.random.RandomState(8)
    gradients = [checks.specials(other), *(checks.draw(rng, size, other) for size in SIZES)]
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -3.4e38, 2.0**-133 + 2.0**-134])
    with np.errstate(over="ignore"):
        gradients.append(ties.astype(other))
    sizes = [g.size for g in gradients]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    parts = [PackedPart(0, size, start) for size, start in zip(sizes, starts, strict=True)]
    check_pack(host, "uint16", gradients, parts, scale)
    with np.errstate(over="ignore"):
        rounded = [checks.bfloat16(gradient) for gradient in gradients]
    check_pack(host, np.dtype(other).name, rounded, parts, scale)
    assert checks.of_bfloat16(checks.bfloat16(ties))[:2].tolist() == [1, 1 + 2**-6]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("target", ["float16", "float32", "float64"])
def test_mixed_gradients_and_missing_ones_are_packed_in_one_launch(
    host: checks.Device, target: str, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_BLOCKS", 3)
    rng = np.random.RandomState(5)
    gradients: list[np.ndarray | None] = [
        checks.draw(rng, 10000, dtype) for dtype in ("float16", "float32", "float64")
    ]
    gradients.insert(1, None)
    host.launcher.launches.clear()
    parts = [
        PackedPart(3, 9001, 0),
        PackedPart(0, 77, 9010),
        PackedPart(0, 10000, 9090),
        PackedPart(8, 5000, 19091),
    ]
    check_pack(host, target, gradients, parts, 0.5, start, starts=[0, 0, 1, 2])
    assert host.launcher.launches == [f"pack<{tables._NAMES[np.dtype(target)]}>"]


def test_places_of_gradients_are_copied_to_the_device_only_when_they_change(
    host: checks.Device,
) -> None:
    table = PackTable(host.launcher, [PackedPart(0, 4, 0)])
    bucket = np.zeros(4, np.float32)
    first, second = np.ones(4, np.float32), np.full(4, 2, np.float32)
    uploads = [host.launcher.uploads]
    for gradient in (first, first, second, None):
        table.pack([gradient], bucket)
        uploads.append(host.launcher.uploads)
        assert (bucket == (0 if gradient is None else gradient)).all()
    assert np.diff(uploads).tolist() == [1, 0, 1, 1]


GRADS = [(param, grad) for param, grad, wide in DTYPES if param == wide]


@pytest.mark.parametrize("blocks", [3, tables.CHECK_BLOCKS])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "of_grad"), GRADS)
def test_norms_are_summed_in_one_order(
    host: checks.Device,
    dtype: str,
    of_grad: str,
    size: int,
    start: int,
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables, "CHECK_BLOCKS", blocks)
    grad = checks.draw(np.random.RandomState(6), size, of_grad)
    squares, bad = check_norm(host, [grad], dtype, 1 / 3, start)
    assert bad == 0
    expected = np.square(checks.mean_of(grad, np.dtype(dtype), 1 / 3).astype(np.float64)).sum()
    assert squares == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("dtype", "of_grad"), GRADS)
def test_non_finite_elements_are_counted(host: checks.Device, dtype: str, of_grad: str) -> None:
    for index in (0, 4999, 9000):
        grads = [np.ones(size, of_grad) for size in (9001, 0, 3)]
        grads[0][index] = np.nan
        grads[2][:2] = np.inf, -np.inf
        squares, bad = check_norm(host, grads, dtype)
        assert bad == 3
        assert not np.isfinite(squares)


def test_large_finite_elements_are_finite(host: checks.Device) -> None:
    assert check_norm(host, [np.full(10, 3e38, np.float32)], "float32")[1] == 0
    assert check_norm(host, [np.full(10, 1e300)], "float64").tolist() == [np.inf, 0]
    # A mean beyond the range of float16 is what the CPU finds as well.
    assert check_norm(host, [np.full(10, 1e5, np.float32)], "float16")[1] == 10


def arrays(**changes: object) -> Arrays:
    whole = Arrays(*(np.ones(10, np.float32) for _ in range(5)))
    return whole._replace(**changes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (arrays(param=np.ones(9, np.float32)), "param has 9 elements, but 10 are to be used"),
        (arrays(grad=np.ones(10, np.float16)), "grad has dtype float16, not float32"),
        (arrays(mem=np.ones(10, np.float64)), "mem has dtype float64, not float32"),
        (arrays(g2=np.ones(20, np.float32)[::2]), "g2 is not contiguous"),
        (arrays(param=np.ones(10, np.int32)), "param has dtype int32"),
        (arrays(param=np.ones(10, np.float16)), "float16 parameters and float32 states need"),
        (arrays(master=np.ones(10, np.float32)), "leave nothing for masters to do"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    host: checks.Device, wrong: Arrays, message: str
) -> None:
    table = tables.UpdateTable(host.launcher, [Run(0, 0, 0, 10)])
    table.set_rates([checks.RATES])
    with pytest.raises(ValueError, match=message):
        table.update(wrong)


def test_gradients_that_do_not_fit_are_refused(host: checks.Device) -> None:
    table = PackTable(host.launcher, [PackedPart(0, 4, 0), PackedPart(2, 4, 4)])
    good = np.ones(6, np.float32)
    with pytest.raises(ValueError, match="gradient 1 has 5 elements, but 6 are to be used"):
        table.pack([good, good[:5]], np.ones(8, np.float32))
    with pytest.raises(ValueError, match="bucket has 7 elements, but 8 are to be used"):
        table.pack([good, good], np.ones(7, np.float32))
    with pytest.raises(ValueError, match="must not be negative"):
        PackTable(host.launcher, [PackedPart(0, -1, 0)])
    with pytest.raises(ValueError, match="grad has 5 elements, but 6 are to be used"):
        GradientCheck(host.launcher, [6]).run([good[:5]], np.dtype(np.float32))


def test_a_missing_cupy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"pip install 'smorms3-dist\[cuda12\]'"):
        cuda.CupyLauncher()


def test_gpus_that_are_missing_or_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDriverError(Exception):
        pass

    class Device:
        id = 3
        compute_capability = "61"

    def fail() -> None:
        raise NoDriverError("insufficient driver")

    runtime = types.SimpleNamespace(CUDARuntimeError=NoDriverError)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(Device=Device, runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(RuntimeError, match=r"GPU 3 has compute capability 6\.1.* 7\.0 or newer"):
        cuda.CupyLauncher()
    cupy.cuda.Device = fail
    with pytest.raises(RuntimeError, match="no usable GPU: insufficient driver"):
        cuda.CupyLauncher()
