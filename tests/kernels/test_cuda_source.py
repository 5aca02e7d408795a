"""The kernels for GPUs, on the CPU by g++ and on a GPU: the same bits as in NumPy."""

from __future__ import annotations

import pathlib
import platform
import sys
from collections.abc import Iterator
from typing import Any

from smorms3_dist.kernels import cuda, tables
from smorms3_dist.kernels.chainer_rules import ADAM, MOMENTUM_SGD, SMORMS3, Constants, Formula
from smorms3_dist.kernels.tables import Arrays, PackedPart, PackTable, Rates, Run

import cuda_host
import fake_cupy
import kernel_cases as cases
import kernel_checks as checks
import numpy as np
import pytest
from hypothesis import example, given, settings
from kernel_checks import DTYPES, Values, check_norm, check_pack, check_update

FLOAT32 = ("float32", "float32", "float32")

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
wide = settings(max_examples=200, deadline=None)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 128 bytes, as device memory does."""
    raw = np.empty(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 128
    copy = raw[start : start + array.nbytes].view(array.dtype)
    copy[...] = array
    return copy


def on_host(launcher: Any) -> checks.Device:
    return checks.Device(launcher, aligned, lambda array: array)


def on_gpu(exact: bool) -> checks.Device:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    try:
        launcher = cuda.CupyLauncher(exact)
    except RuntimeError as error:
        pytest.skip(str(error))
    return checks.Device(launcher, cupy.asarray, cupy.asnumpy)


@pytest.fixture(scope="module")
def host(host_launcher: Any) -> checks.Device:
    return on_host(host_launcher)


HOST_AND_GPU = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=HOST_AND_GPU)
def device(request: pytest.FixtureRequest) -> checks.Device:
    """Where nothing is contracted."""
    if request.param == "gpu":
        return on_gpu(exact=True)
    return on_host(request.getfixturevalue("host_launcher"))


@pytest.fixture(scope="module", params=HOST_AND_GPU)
def contracting(request: pytest.FixtureRequest) -> checks.Device:
    if request.param == "gpu":
        return on_gpu(exact=False)
    cpu = pathlib.Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or " fma " not in cpu.read_text():
        pytest.skip("this CPU is not known to have fused multiply-adds")
    return on_host(cuda_host.build("-ffp-contract=fast", "-mfma"))


@given(cases.updates(), cases.few_blocks)
@wide
def test_an_update_equals_numpy(device: checks.Device, case: dict[str, Any], blocks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "MAX_BLOCKS", blocks)
        check_update(device, **case)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_update_reads_gradients_where_they_lie(device: checks.Device, dtype: str) -> None:
    rng = np.random.RandomState(0)
    sizes, starts = [1, 3, 9001, 40], [0, 64, 128, 9152]
    total = starts[-1] + sizes[-1]
    names = ("param", "grad", "mem", "g", "g2")
    start = {name: np.abs(checks.numbers(rng, total, dtype)) for name in names}
    runs = [Run(a, a, a, size) for a, size in zip(starts, sizes, strict=True)]
    how = tables.Preparation(decay=0.25, loss_scale=8.0)
    table = tables.UpdateTable(device.launcher, SMORMS3, runs)
    table.set_rates([checks.RATES] * len(runs))
    ours, theirs = ({name: device.put(a) for name, a in start.items()} for _ in range(2))
    for step in range(3):
        table.update(checks.arrays_of(theirs), how)
        # Some of them are not aligned as the states are.
        behind = [
            checks.put_behind(device, start["grad"][a:][:n], step)
            for a, n in zip(starts, sizes, strict=True)
        ]
        table.update_apart(checks.arrays_of(ours)._replace(grad=None), behind, how)
    for name in names:
        checks.same_bits(name, device.get(ours[name]), device.get(theirs[name]))
    for wrong in (behind[:1] + behind[2:] + behind[1:2], [b.astype("i4") for b in behind]):
        with pytest.raises(ValueError, match=r"gradient [02] has "):
            table.update_apart(checks.arrays_of(ours), wrong, how)


@given(cases.packs(), cases.few_blocks)
@wide
def test_packing_equals_numpy(device: checks.Device, case: dict[str, Any], blocks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "MAX_BLOCKS", blocks)
        check_pack(device, **case)


@given(cases.norms(), cases.few_blocks)
@example({"grads": [np.full(10, 3e38, np.float32)], "dtype": "float32"}, 3)
# A square beyond the range of float64 is no element that is not finite.
@example({"grads": [np.full(10, 1e300)], "dtype": "float64"}, 3)
# A mean beyond the range of float16 is what the CPU finds as well.
@example({"grads": [np.full(10, 1e5, np.float32)], "dtype": "float16"}, 3)
@wide
def test_norms_are_summed_in_one_order_and_what_is_not_finite_is_counted(
    device: checks.Device, case: dict[str, Any], blocks: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "CHECK_BLOCKS", blocks)
        squares, nonfinite = check_norm(device, **case)
    mean = case.get("mean", 1.0)
    means = [checks.mean_of(grad, np.dtype(case["dtype"]), mean) for grad in case["grads"]]
    every = np.concatenate(means).astype(np.float64)
    assert nonfinite == np.count_nonzero(~np.isfinite(every))
    if nonfinite:
        assert not np.isfinite(squares)
    else:
        with np.errstate(over="ignore"):
            assert squares == pytest.approx(np.square(every).sum(), rel=1e-12)


@each_dtype
def test_one_array_alone_may_start_off_an_aligned_address(
    device: checks.Device, dtypes: tuple[str, str, str]
) -> None:
    for name in ("param", "grad", "mem", "g", "g2", "master"):
        check_update(device, dtypes, [Run(0, 0, 0, 1023)], starts={name: 1}, steps=1)


@each_dtype
def test_zeros_subnormals_infinities_and_nans(
    device: checks.Device, dtypes: tuple[str, str, str]
) -> None:
    values = checks.specials(dtypes[1])
    first, second = (a.reshape(-1) for a in np.meshgrid(values, values, indexing="ij"))
    after = check_update(
        device, dtypes, [Run(0, 0, 0, first.size)], grads=[first, second, first], steps=3
    )
    assert np.isnan(after["param"]).any()
    assert np.isfinite(after["param"][: first.size]).any()


def test_many_runs_and_many_gradients_are_one_launch(host: checks.Device) -> None:
    host.launcher.launches.clear()
    check_update(host, FLOAT32, [Run(i, i, i, 1) for i in range(99)], steps=1)
    gradients = [np.ones(3, dtype) for dtype in ("float16", "float32", "float64")]
    check_pack(host, "float64", gradients, [PackedPart(0, 3, offset) for offset in (0, 4, 8)])
    assert host.launcher.launches == ["update<Smorms3, float, float, float>", "pack<double>"]


@each_dtype
def test_training_equals_numpy(device: checks.Device, dtypes: tuple[str, str, str]) -> None:
    checks.check_training(device, dtypes, checks.same_bits)


@pytest.mark.gpu
@each_dtype
def test_millions_of_elements(dtypes: tuple[str, str, str]) -> None:
    gpu = on_gpu(exact=True)
    check_update(gpu, dtypes, [Run(0, 0, 0, 3_000_001)])
    grads = [checks.numbers(np.random.RandomState(6), size, dtypes[1]) for size in (5_000_001, 9)]
    check_norm(gpu, grads, dtypes[0], 1 / 3)


@each_dtype
def test_contraction_stays_within_its_tolerances(
    dtypes: tuple[str, str, str], contracting: checks.Device
) -> None:
    checks.check_training(contracting, dtypes, checks.close)
    if dtypes == FLOAT32:
        with pytest.raises(AssertionError):
            checks.check_training(contracting, dtypes, checks.same_bits)


@pytest.mark.parametrize(
    ("formula", "constants"),
    [(MOMENTUM_SGD, (0.1, 0.9)), (ADAM, (1e-2, 0.1, 1e-3, 1e-8, 0.99, -1.0))],
)
def test_so_it_does_with_other_rules(
    formula: Formula, constants: Constants, contracting: checks.Device
) -> None:
    rates = Rates(constants, 0.1)
    checks.check_training(contracting, FLOAT32, checks.close, formula, rates)
    with pytest.raises(AssertionError):
        checks.check_training(contracting, FLOAT32, checks.same_bits, formula, rates)


@pytest.mark.parametrize(
    ("formula", "constants"),
    [
        (SMORMS3, checks.RATES.constants),
        (MOMENTUM_SGD, (0.1, 0.9)),
        (ADAM, (1e-2, 0.1, 1e-3, 1e-8, 0.99, -1.0)),
    ],
)
def test_approximate_quotients_and_roots_change_little(
    formula: Formula, constants: Constants
) -> None:
    checks.check_approximation(formula, constants)


def test_each_preparation_changes_the_gradient_that_numpy_sees() -> None:
    """The comparisons above would mean little if what they compare with ignored it."""
    seen = set()
    clips = [Values(clip=clip) for clip in (None, 0.3, np.nan)]
    others = [Values(mean=0.5), Values(decay=0.01), Values(loss_scale=3.0), Values(skip=1.0)]
    for how in clips + others:
        arrays = {name: np.full(3, 0.7, np.float32) for name in ("param", "grad", "mem", "g", "g2")}
        checks.update_on_host(arrays, [Run(0, 0, 0, 3)], [checks.RATES], how)
        seen.add(arrays["g2"].tobytes())
    assert len(seen) == 7
    assert checks.bfloat16(checks.TIES)[:2].tolist() == [0x3F80, 0x3F82]


def test_hyperparameters_are_copied_to_the_device_only_when_they_change(
    host: checks.Device,
) -> None:
    table = tables.UpdateTable(host.launcher, SMORMS3, [Run(0, 0, 0, 8)] * 2)
    uploads = [host.launcher.uploads]
    for lr in (0.1, 0.1, 0.2, np.nan, np.nan):
        table.set_rates([Rates((1, lr, 1e-8))] * 2)
        uploads.append(host.launcher.uploads)
    assert np.diff(uploads).tolist() == [1, 0, 1, 1, 0]
    with pytest.raises(ValueError, match="a table of 2 rows cannot take 3"):
        table.set_rates([Rates((1, 0.1, 1e-8))] * 3)


def test_a_non_finite_gradient_skips_the_step_without_the_host(device: checks.Device) -> None:
    grad = device.put(np.array([1, np.inf, 2], np.float32))
    check = tables.GradientCheck(device.launcher, [3])
    table = tables.UpdateTable(device.launcher, SMORMS3, [Run(0, 0, 0, 3)])
    table.set_rates([checks.RATES])
    param, *states = (device.put(np.ones(3, np.float32)) for _ in range(4))
    arrays = Arrays(param, grad, states)
    check.run([grad], np.dtype(np.float32))
    table.update(arrays, tables.Preparation(skip=check.result[1:]))
    assert (device.get(arrays.param) == 1).all()
    grad[1] = 0
    check.run([grad], np.dtype(np.float32))
    table.update(arrays, tables.Preparation(skip=check.result[1:]))
    assert (device.get(arrays.param)[[0, 2]] < 1).all()


FAR = 2**32 + 8


@pytest.fixture
def long_arrays(device: checks.Device, tmp_path: pathlib.Path) -> Iterator[list[Any]]:
    """Five arrays of float16 with more elements than 32 bits can count."""
    if not isinstance(device.launcher, cuda.CupyLauncher):
        # Files with holes: memory that is not touched does not exist.
        names = (tmp_path / f"{i}" for i in range(5))
        yield [np.memmap(name, np.float16, "w+", shape=(FAR + 100,)) for name in names]
        return
    import cupy

    size = 5 * 2 * (FAR + 100)
    if cupy.cuda.runtime.memGetInfo()[0] < size + (1 << 30):
        pytest.skip(f"less than {size >> 30} GiB of GPU memory are free")
    yield [cupy.zeros(FAR + 100, np.float16) for _ in range(5)]
    cupy.get_default_memory_pool().free_all_blocks()


def test_offsets_have_64_bits(device: checks.Device, long_arrays: list[Any]) -> None:
    param, grad, mem, g, g2 = long_arrays
    for array in long_arrays[1:]:
        array[FAR:] = 0.5
    table = tables.UpdateTable(device.launcher, SMORMS3, [Run(FAR, FAR, FAR, 100)])
    table.set_rates([checks.RATES])
    table.update(Arrays(param, grad, [mem, g, g2]))
    assert bool((param[FAR:] < 0).all())
    assert bool((mem[FAR:] != 0.5).all())
    assert not any(array[:1000].any() for array in long_arrays)
    PackTable(device.launcher, [PackedPart(0, 100, FAR)]).pack([grad[FAR:]], param)
    assert bool((param[FAR:] == 0.5).all())
    PackTable(device.launcher, [PackedPart(FAR, 100, 0)]).pack([param], g[:100])
    assert bool((g[:100] == 0.5).all())


def test_addresses_of_gradients_are_copied_to_the_device_only_when_they_change(
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


def test_arrays_that_do_not_fit_are_refused(host: checks.Device) -> None:
    table = tables.UpdateTable(host.launcher, SMORMS3, [Run(0, 0, 0, 10)])
    table.set_rates([checks.RATES])
    whole = {n: np.ones(10, np.float32) for n in ("param", "grad", "mem", "g", "g2")}
    for name, wrong, message in (
        ("param", np.ones(9, np.float32), "param has 9 elements, but 10 are to be used"),
        ("grad", np.ones(10, np.float16), "grad has dtype float16, not float32"),
        ("mem", np.ones(10, np.float64), "mem has dtype float64, not float32"),
        ("g2", np.ones(20, np.float32)[::2], "g2 is not contiguous"),
        ("param", np.ones(10, np.int32), "param has dtype int32"),
        ("param", np.ones(10, np.float16), "float16 parameters and float32 states need"),
        ("master", np.ones(10, np.float32), "leave nothing for masters to do"),
    ):
        with pytest.raises(ValueError, match=message):
            table.update(checks.arrays_of({**whole, name: wrong}))


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
        tables.GradientCheck(host.launcher, [6]).run([good[:5]], np.dtype(np.float32))


def test_a_missing_cupy_and_gpus_that_are_missing_or_too_old_are_refused(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_cupy.Device, "compute_capability", "61")
    with pytest.raises(RuntimeError, match=r"GPU 0 has compute capability 6\.1.* 7\.0 or newer"):
        cuda.CupyLauncher()

    def fail() -> None:
        raise fake_cupy.CUDARuntimeError(100)

    cupy.cuda.Device = fail
    with pytest.raises(RuntimeError, match="no usable GPU: status 100"):
        cuda.CupyLauncher()
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"pip install 'smorms3-dist\[cuda12\]'"):
        cuda.CupyLauncher()
