"""What the kernels for GPUs must do, on whatever device a launcher serves."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smorms3_dist.kernels import reference, selection, tables
from smorms3_dist.kernels.chainer_rules import SMORMS3, Constants, Formula
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.tables import Arrays, PackedPart, Preparation, Rates, Run

import models
import numpy as np

compiled = selection.compiled_update(np.dtype("f"))

DTYPES = [
    *((dtype, dtype, dtype) for dtype in ("float64", "float32", "float16")),
    *(("float16", *others) for others in (("float32", "float16"), ("float16", "float32"))),
    ("float16", "float32", "float32"),
]
"""Of parameters, gradients and states."""

RATES = Rates((1, 1e-3, 1e-16))

FULL_NAN = float(np.array([2**63 - 1]).view(np.float64)[0])

SQUARES = {"g2", "v", "vhat", "h", "msg", "msdx", "ms", "n"}
"""The states, of all formulas, that are no less than 0."""

TIES = np.array([1 + 2**-8, 1 + 3 * 2**-8, 3.3e38, -3.3e38, 2.0**-133 + 2.0**-134, FULL_NAN])
"""Numbers that bfloat16 rounds to even, or has only just; a nan that rounding up would spoil."""

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, 6e-8, 5e-324, 1e-38, 3e38, 65504]

Compare = Callable[[str, np.ndarray, np.ndarray], None]


@dataclasses.dataclass
class Device:
    """Where kernels run: a launcher, and copies to and from its memory."""

    launcher: tables.KernelLauncher
    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]


def same_bits(name: str, ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == expected.dtype, name
    if ours.dtype == tables.BFLOAT16:
        assert (ours == expected).all(), name
        return
    assert models.bits(ours) == models.bits(expected), name


def close(name: str, ours: np.ndarray, expected: np.ndarray) -> None:
    """What contraction may change after twenty steps from fresh states.

    32 units in the last place of 1, or of the value where that is more; of rounded float16
    parameters one.
    """
    assert ours.dtype == expected.dtype, name
    units = 1 if ours.dtype == np.float16 else 32
    tolerance = units * float(np.finfo(ours.dtype).eps)
    with np.errstate(invalid="ignore"):
        error = np.abs(ours.astype(np.float64) - expected.astype(np.float64))
    allowed = tolerance * np.maximum(1, np.abs(expected.astype(np.float64)))
    same = (ours == expected) | (np.isnan(ours) & np.isnan(expected))
    assert (same | (error <= allowed)).all(), (name, np.nanmax(error / allowed))


def roughly_close(name: str, ours: np.ndarray, expected: np.ndarray) -> None:
    """The same for divisions and roots that are only nearly right: 64 units."""
    error = np.abs(ours.astype(np.float64) - expected)
    allowed = 64 * float(np.finfo(ours.dtype).eps) * np.maximum(1, np.abs(expected))
    assert (error <= allowed).all(), (name, np.max(error / allowed))


class Rough(np.ndarray):
    """Numbers whose quotients and roots are off by up to 2 units in the last place, at random.

    A stand-in for a GPU's approximate instructions: what it makes of an update is what they may.
    """

    random = np.random.RandomState(0)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(value) for value in inputs]
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc in (np.divide, np.sqrt):
            units = self.random.randint(-2, 3, result.shape).astype(result.dtype)
            result = result + units * np.spacing(np.abs(result))
        return result.view(Rough)


def numbers(rng: np.random.RandomState, size: int, dtype: str) -> np.ndarray:
    """Numbers of many magnitudes, subnormal ones included."""
    with np.errstate(all="ignore"):
        return (rng.standard_normal(size) * 10.0 ** rng.randint(-21, 3, size)).astype(dtype)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Numbers rounded to bfloat16, to the nearest and ties to even, as their bits."""
    with np.errstate(all="ignore"):
        whole = np.ascontiguousarray(values, np.float32)
    bits = whole.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(whole), 0x7FC0, rounded).astype(np.uint16)


def of_bfloat16(bits: np.ndarray) -> np.ndarray:
    """What bits of bfloat16 mean, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def specials(dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.array(SPECIAL).astype(dtype)


@dataclasses.dataclass
class Values:
    """How gradients are prepared, by numbers that the host knows."""

    mean: float = 1.0
    clip: float | None = None
    decay: float | None = None
    loss_scale: float = 1.0
    skip: float | None = None

    def on(self, device: Device) -> Preparation:
        numbers = (self.clip, self.skip)
        clip, skip = (None if n is None else device.put(np.array([n])) for n in numbers)
        return Preparation(self.mean, clip, self.decay, self.loss_scale, skip)


def mean_of(grad: np.ndarray, dtype: np.dtype, mean: float) -> np.ndarray:
    """Gradients times a factor: formed in float32 or wider, rounded to the parameters' dtype."""
    wide = np.float64 if dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        return (grad.astype(wide) * wide(mean)).astype(dtype)


def update_on_host(
    arrays: Mapping[str, np.ndarray],
    runs: Sequence[Run],
    rates: Sequence[Rates],
    how: Values,
    formula: Formula = SMORMS3,
) -> None:
    """What the update must do: SMORMS3 in NumPy, others by the loops for CPUs, if there are any."""
    if how.skip is not None and how.skip != 0:
        return
    low = arrays["param"].dtype.type
    wide = arrays["master" if "master" in arrays else (*formula.states, "param")[0]].dtype.type
    for run, rate in zip(runs, rates, strict=True):
        states = slice(run.state, run.state + run.size)
        param = arrays["param"][run.param : run.param + run.size]
        value = arrays["master"][states] if "master" in arrays else param
        with np.errstate(all="ignore"):
            d = mean_of(arrays["grad"][run.grad : run.grad + run.size], param.dtype, how.mean)
            if how.clip is not None and not how.clip >= 1:
                d = d * low(how.clip)
            if how.decay is not None:
                d = d + low(how.decay) * param
            d = d.astype(wide)
            if how.loss_scale != 1:
                d = d / wide(how.loss_scale)
            if rate.decay is not None:
                d = d + wide(rate.decay) * value
            assert d.dtype == wide
            own = [arrays[name][states] for name in formula.states]
            if formula == SMORMS3:
                reference.smorms3(value, Mean(d), own, *rate.constants[1:])
            elif compiled is not None:
                compiled(formula, value, Mean(d), own, rate.constants)
            else:
                _update_in_numpy(formula, value, d, own, rate.constants)
            param[...] = value


def _update_in_numpy(
    formula: Formula,
    param: np.ndarray,
    d: np.ndarray,
    states: Sequence[np.ndarray],
    constants: Constants,
) -> None:
    """As the loops for CPUs, by the same arithmetic on whole arrays."""
    functions = {"smaller": np.minimum, "larger": np.maximum, "unless_nan": _unless_nan, "math": np}
    arithmetic = types.FunctionType(formula.arithmetic.__code__, functions)
    results = arithmetic(d, param, *states, *map(param.dtype.type, constants))
    for target, result in zip([param, *states], results if states else [results], strict=True):
        target[...] = result


def _unless_nan(one: np.ndarray, other: Any) -> np.ndarray:
    return np.where(one == one, one, other)


def arrays_of(arrays: Mapping[str, Any], formula: Formula = SMORMS3) -> Arrays:
    """Arrays by name, as the table of a formula takes them."""
    states = [arrays[name] for name in formula.states]
    return Arrays(arrays["param"], arrays["grad"], states, arrays.get("master"))


def check_update(
    device: Device,
    dtypes: tuple[str, str, str],
    runs: Sequence[Run],
    rates: Sequence[Rates] | None = None,
    how: Values | None = None,
    starts: Mapping[str, int] | None = None,
    grads: Sequence[np.ndarray] | None = None,
    steps: int = 3,
    seed: int = 1,
    fresh: bool = False,
    compare: Compare = same_bits,
    formula: Formula = SMORMS3,
    special: bool = False,
) -> dict[str, np.ndarray]:
    """Updates the same arrays on the device and on the host, step by step.

    Arrays may start a few elements behind an aligned address. Parameters are not all finite if they
    are to be special. States are those of an optimizer if
    they are to be fresh, else any numbers. Elements outside of the runs are compared, too. Returns
    the arrays of the host.
    """
    how = how or Values()
    rates = rates or [RATES] * len(runs)
    low, of_grad, wide = dtypes
    rng = np.random.RandomState(seed)
    of_params, of_grads, of_states = (
        max([run[column] + run.size for run in runs], default=0) + 9 for column in range(3)
    )
    whole = {
        "param": rng.standard_normal(of_params).astype(low),
        "grad": numbers(rng, of_grads, of_grad),
    }
    if special:
        whole["param"] = rng.choice(specials(low), of_params)
    for name in formula.states:
        whole[name] = numbers(rng, of_states, wide)
        if name in SQUARES:
            whole[name] = np.abs(whole[name])
    if "mem" in whole:
        whole["mem"] = (1 + rng.uniform(size=of_states)).astype(wide)
    if low != wide:
        whole["master"] = rng.standard_normal(of_states).astype(wide)
    if fresh:
        whole |= {name: np.full(of_states, name == "mem", wide) for name in formula.states}
    starts = starts or {}
    host = {name: array[starts.get(name, 0) :].copy() for name, array in whole.items()}
    there = {name: device.put(array)[starts.get(name, 0) :] for name, array in whole.items()}
    table = tables.UpdateTable(device.launcher, formula, runs)
    table.set_rates(rates)
    for step in range(steps):
        grad = numbers(rng, host["grad"].size, of_grad) if grads is None else grads[step]
        host["grad"][: grad.size] = grad
        there["grad"][: grad.size] = device.put(grad)
        update_on_host(host, runs, rates, how, formula)
        table.update(arrays_of(there, formula), how.on(device))
    for name, expected in host.items():
        compare(name, device.get(there[name]), expected)
    return host


def check_training(
    device: Device,
    dtypes: tuple[str, str, str],
    compare: Compare,
    formula: Formula = SMORMS3,
    rates: Rates = RATES,
) -> None:
    """Twenty steps from fresh states with gradients such as training has."""
    rng = np.random.RandomState(7)
    size = 40000
    scales = 10.0 ** rng.randint(-6, 2, size)
    grads = [(rng.standard_normal(size) * scales).astype(dtypes[1]) for _ in range(20)]
    how = Values(mean=1 / 3, decay=0.01, loss_scale=3.0)
    options = {"how": how, "grads": grads, "steps": len(grads), "fresh": True, "compare": compare}
    check_update(device, dtypes, [Run(0, 0, 0, size)], [rates], formula=formula, **options)


def check_approximation(formula: Formula, constants: Constants) -> None:
    """The same twenty steps with `Rough` numbers, beside exact ones: `roughly_close`, not equal."""
    rng = np.random.RandomState(7)
    size = 40000
    scales = 10.0 ** rng.randint(-6, 2, size)
    names = ("param", *formula.states)
    exact = {name: np.full(size, name == "mem", np.float32) for name in names}
    exact["param"] = rng.standard_normal(size).astype(np.float32)
    rough = {name: array.copy() for name, array in exact.items()}
    for _ in range(20):
        grad = (rng.standard_normal(size) * scales).astype(np.float32)
        for arrays, kind in ((exact, np.ndarray), (rough, Rough)):
            param, *states = (arrays[name].view(kind) for name in names)
            with np.errstate(all="ignore"):
                d = grad.view(kind) / np.float32(3)
                _update_in_numpy(formula, param, d, states, constants)
    for name, expected in exact.items():
        roughly_close(name, rough[name], expected)
    assert any((rough[name] != expected).any() for name, expected in exact.items())


def check_pack(
    device: Device,
    dtype: str,
    gradients: Sequence[np.ndarray | None],
    parts: Sequence[PackedPart],
    scale: float = 1.0,
    start: int = 0,
    starts: Sequence[int] | None = None,
    compare: Compare = same_bits,
) -> None:
    """Packs on the device and on the host; what lies between the parts is compared, too."""
    size = max([part.start_b + part.size for part in parts], default=0) + 5
    host = np.full(size, 7, dtype)
    bucket = device.put(np.full(start + size, 7, dtype))[start:]
    there = []
    for gradient, part, first in zip(gradients, parts, starts or [0] * len(parts), strict=True):
        target = host[part.start_b : part.start_b + part.size]
        if gradient is None:
            target[...] = 0
            there.append(None)
            continue
        wide = np.float64 if "float64" in (dtype, gradient.dtype.name) else np.float32
        with np.errstate(all="ignore"):
            values = gradient[part.start_p : part.start_p + part.size]
            if values.dtype == tables.BFLOAT16:
                values = of_bfloat16(values)
            values = values.astype(wide) * wide(scale)
            target[...] = bfloat16(values) if dtype == tables.BFLOAT16 else values.astype(dtype)
        there.append(put_behind(device, gradient, first))
    tables.PackTable(device.launcher, parts).pack(there, bucket, scale)
    compare("bucket", device.get(bucket), host)


def put_behind(device: Device, array: np.ndarray, start: int) -> Any:
    """Copies an array so that it starts a few elements behind an aligned address."""
    return device.put(np.concatenate([np.zeros(start, array.dtype), array]))[start:]


def norm_on_host(grads: Sequence[np.ndarray], dtype: np.dtype, mean: float) -> np.ndarray:
    """The sum of squares in the documented order, and the number of non-finite elements."""
    threads = 256
    rows = []
    for grad in grads:
        blocks = min(-(-grad.size // 4096), tables.CHECK_BLOCKS)
        vector = 16 // grad.itemsize
        turn = blocks * threads * vector
        if not turn:
            continue
        with np.errstate(all="ignore"):
            d = mean_of(grad, dtype, mean).astype(np.float64)
            d = np.concatenate([d, np.zeros(-d.size % turn)]).reshape(-1, blocks, threads, vector)
            for found in d * d, ~np.isfinite(d):
                # One thread after the other adds what it meets in turn, vectors from left to right.
                mine = found.transpose(1, 2, 0, 3).reshape(blocks, threads, -1)
                rows.append(_in_order(_in_order(mine.astype(np.float64))))
    squares = np.concatenate([np.zeros(0), *rows[::2]])
    bad = np.concatenate([np.zeros(0), *rows[1::2]])
    with np.errstate(all="ignore"):
        return np.array([_finish(squares, threads), _finish(bad, threads)])


def _finish(partials: np.ndarray, threads: int) -> float:
    padded = np.concatenate([partials, np.zeros(-partials.size % threads)])
    mine = padded.reshape(-1, threads).T
    return float(_in_order(_in_order(mine))) if padded.size else 0.0


def _in_order(values: np.ndarray) -> np.ndarray:
    """Sums over the last axis, from left to right; numpy.sum would sum in pairs."""
    return np.cumsum(values, axis=-1)[..., -1]


def check_norm(
    device: Device,
    grads: Sequence[np.ndarray],
    dtype: str,
    mean: float = 1.0,
    start: int = 0,
    compare: Compare = same_bits,
) -> np.ndarray:
    """Norm and check on the device and on the host; returns what was found."""
    there = [put_behind(device, grad, start) for grad in grads]
    check = tables.GradientCheck(device.launcher, [g.size for g in grads])
    for _ in range(2):  # The second finds the memory as the first has left it.
        check.run(there, np.dtype(dtype), mean)
    found = device.get(check.result)
    compare("found", found, norm_on_host(grads, np.dtype(dtype), mean))
    return found
