"""Fingerprints: equal for equal bits, and for no others; on a GPU as plain Python has them."""

from __future__ import annotations

import tracemalloc
from typing import Any

from smorms3_dist.device.memory import CudaMemory, HostMemory
from smorms3_dist.sharding import fingerprints
from smorms3_dist.sharding.fingerprints import (
    Fingerprint,
    combined,
    fingerprints_of,
    hash_on_device,
    hash_on_host,
)
from smorms3_dist.sharding.model import ModelView
from smorms3_dist.sharding.own_gradients import OwnGradients, not_finite_gradients

import chainer
import chainer.links as L
import fake_cupy
import models
import numpy as np
import pytest

DTYPES = ["float16", "float32", "float64", "uint8", "int64"]


def on_device(*arrays: np.ndarray) -> list[int]:
    memory = CudaMemory(0, fake_cupy.module(), None)  # type: ignore[arg-type]
    return hash_on_device([np.array(a).view(fake_cupy.DeviceArray) for a in arrays], memory)


def on_host(*arrays: np.ndarray) -> list[int]:
    return [hash_on_host(array) for array in arrays]


WHERE = pytest.mark.parametrize("hashed", [on_host, on_device])


def values(dtype: str, size: int) -> np.ndarray:
    return (np.random.RandomState(size).standard_normal(size) * 100).astype(dtype)


def in_plain_python(array: np.ndarray, piece: int) -> int:
    """The formula of the module, by integers without bounds."""

    def mixed(number: int) -> int:
        number = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return number ^ number >> 31

    width = min(array.dtype.itemsize, 4)
    data = array.tobytes()
    total = 0
    for index in range(len(data) // width):
        word = int.from_bytes(data[index * width :][:width], "little")
        total += word * (mixed(index % piece) | 1) * (mixed(index // piece + 2**63) | 1)
    return total % 2**64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 37])
def test_on_a_gpu_it_is_the_formula(dtype: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "PIECE", 8)
    array = values(dtype, size)
    assert on_device(array) == [in_plain_python(array, 8)]


@WHERE
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(hashed: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "PIECE", 4)
    array = values(dtype, 9)
    (before,) = hashed(array)
    seen = {before}
    for byte in range(array.nbytes):
        for bit in range(8):
            other = array.copy()
            other.view(np.uint8)[byte] ^= 1 << bit
            seen |= set(hashed(other))
    assert len(seen) == 1 + 8 * array.nbytes
    assert hashed(array.copy()) == [before]


@WHERE
def test_nan_and_zero_count_by_their_bits(hashed: Any) -> None:
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32).reshape(2, 1)
    zero = np.zeros(1, "f")
    assert len(set(hashed(quiet, other, zero, -zero))) == 4
    assert hashed(quiet) == hashed(quiet.copy())


@WHERE
def test_elements_that_have_changed_places_differ(
    hashed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "PIECE", 4)
    array = np.arange(12, dtype="f")
    rolled = [np.roll(array, shift) for shift in range(12)]
    assert len(set(hashed(*rolled))) == 12


@WHERE
def test_the_last_bit_of_a_large_array_counts(hashed: Any) -> None:
    array = np.zeros((1 << 20) + 3, "f")
    other = array.copy()
    other[-1:].view(np.uint32)[0] = 1
    first, second = hashed(array, other)
    assert first != second


def test_what_is_not_contiguous_is_hashed_as_what_is() -> None:
    array = np.random.RandomState(0).standard_normal((300, 500)).astype("f")
    for other in (array.T, array[::2, ::-3], np.broadcast_to(array[0], (3, 500))):
        assert not other.flags.c_contiguous
        assert on_host(other) == on_host(np.ascontiguousarray(other))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_neither_hashing_nor_looking_takes_memory(dtype: str) -> None:
    model = ModelView(models.Model({"a": (1 << 11, 1 << 10)}, {"a": dtype}))
    model.initialized["/a"].grad = np.ones((1 << 11, 1 << 10), dtype)
    tracemalloc.start()
    try:
        fingerprints_of(model, HostMemory(), persistent=True)
        assert OwnGradients().are_finite(model, HostMemory())
        not_finite_gradients(model)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_all_parameters_and_persistent_values_are_there() -> None:
    link = chainer.Chain(l1=L.Linear(3, 4), norm=L.BatchNormalization(4), l2=L.Linear(None, 2))
    link.l1.b.update_rule = None
    link.norm.add_persistent("note", "text")
    link.norm.add_persistent("rate", 0.5)
    link.norm.add_persistent("nothing", None)

    def found(persistent: bool) -> dict[str, Fingerprint]:
        listed = fingerprints_of(ModelView(link), HostMemory(), persistent)
        return {each.name: each for each in listed}

    params = found(False)
    assert list(params) == sorted(f"parameter {name}" for name, _ in link.namedparams())
    assert params["parameter /l1/b"].what == "float32 of shape (4,)"
    assert params["parameter /l2/W"].what == "not initialized"
    before = found(True)
    paths = {name for name in before if name not in params}
    names = ("N", "avg_mean", "avg_var", "decay", "note", "nothing", "rate")
    expected = {f"persistent value /norm/{name}" for name in names}
    assert paths <= expected and {f"persistent value /norm/{n}" for n in names[1:3]} <= paths
    link.norm.rate = -0.5
    link.norm.note = "other"
    link.norm.avg_var[-1] += 1
    after = found(True)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {f"persistent value /norm/{name}" for name in ("rate", "note", "avg_var")}
    assert combined(list(after.values())) != combined(list(before.values()))
