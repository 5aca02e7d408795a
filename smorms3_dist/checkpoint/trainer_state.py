"""What a rank has besides its shard: its trainer, what models keep beside parameters, randomness.

Chainer's objects serialize themselves into arrays by key; parameters and sharded states are left
out. Nothing is pickled: what is no array of numbers is text in the metadata of the rank's file.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.safetensors import DTYPES
from smorms3_dist.optimizer.serialization import LeavesShardsOut

import chainer
import numpy as np
from chainer.serializers import DictionarySerializer, NpzDeserializer

_VALUES, _ELSEWHERE = "values", "elsewhere"


class RankState(NamedTuple):
    """What is written of a rank."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def copy_state(objects: Mapping[str, Any], models: Iterable[chainer.Link]) -> RankState:
    """Copies the state of objects, and of Python's, NumPy's and CuPy's random numbers.

    Args:
        objects: Anything that Chainer can serialize, by name.
        models: The models whose parameters are saved elsewhere.

    Raises:
        CheckpointError: If an object wants to keep what only pickle could.
    """
    elsewhere = {id(p.array) for m in models for p in m.params() if p.array is not None}
    writer = _Writer({}, "", elsewhere, [])
    for name, item in objects.items():
        item.serialize(writer[name])
    arrays: dict[str, np.ndarray] = {}
    texts: dict[str, Any] = {}
    for key, value in {**writer.target, **_random_states()}.items():
        array = np.asarray(value)
        if array.dtype.newbyteorder("=") in DTYPES.values():
            arrays[key] = np.array(array)
        elif array.dtype.kind == "U" or (array.dtype.kind == "O" and array.tolist() is None):
            texts[key] = array.tolist()
        else:
            raise CheckpointError(
                key,
                f"cannot be saved: it is an array of {array.dtype}, which only pickle could keep. "
                "Let the object serialize numbers or strings",
            )
    metadata = {_VALUES: json.dumps(texts), _ELSEWHERE: json.dumps(writer.passed_over)}
    return RankState(arrays, metadata)


def restore(
    state: RankState,
    objects: Mapping[str, Any],
    strict: bool,
    left_out: Callable[[str], bool] = lambda key: False,
) -> None:
    """Lets objects take back what `copy_state` has copied.

    Args:
        state: As it was read.
        objects: The objects by name.
        strict: Whether everything that they ask for must be there.
        left_out: Says of a key whether it is to be passed over.

    Raises:
        KeyError: If something is missing that must be there.
        ValueError: If something is of another shape or type than what it is to replace.
    """
    values: dict[str, Any] = dict(state.arrays)
    for key, text in json.loads(state.metadata[_VALUES]).items():
        values[key] = np.array(text)
    elsewhere = frozenset(json.loads(state.metadata[_ELSEWHERE]))
    reader = _Reader(values, "", strict, lambda key: key in elsewhere or left_out(key))
    for name, item in objects.items():
        item.serialize(reader[name])


class _Writer(DictionarySerializer, LeavesShardsOut):
    """Gathers arrays by key, but for those that are saved elsewhere."""

    def __init__(
        self, target: dict[str, Any], path: str, elsewhere: set[int], passed_over: list[str]
    ) -> None:
        super().__init__(target, path)
        self.passed_over = passed_over
        self._elsewhere = elsewhere

    def __getitem__(self, key: str) -> _Writer:
        path = f"{self.path}{key.strip('/')}/"
        return _Writer(self.target, path, self._elsewhere, self.passed_over)

    def __call__(self, key: str, value: Any) -> Any:
        if id(value) in self._elsewhere:
            self.passed_over.append(self.path + key.lstrip("/"))
            return value
        return super().__call__(key, value)


class _Reader(NpzDeserializer, LeavesShardsOut):
    """Gives arrays by key."""

    def __getitem__(self, key: str) -> _Reader:
        path = f"{self.path}{key.strip('/')}/"
        return _Reader(self.npz, path, self.strict, self.ignore_names)

    def __call__(self, key: str, value: Any) -> Any:
        try:
            return super().__call__(key, value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}{key.lstrip('/')} does not fit: {error}") from error


def _random_states() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "random/python/version": version,
        "random/python/state": np.array(internal, np.uint32),
        "random/python/gauss": np.array([] if gauss is None else [gauss]),
    }
    kind, keys, position, has_gauss, cached = np.random.get_state()
    if kind == "MT19937":
        states["random/numpy/keys"] = keys
        states["random/numpy/rest"] = np.array([position, has_gauss, cached], np.float64)
    cupy = sys.modules.get("cupy")
    if cupy is not None and cupy.cuda.runtime.getDeviceCount():
        # The state of a generator on a GPU cannot be read. So it goes on from a seed of its own
        # drawing, here and after loading alike.
        seed = int(cupy.random.randint(0, 1 << 31))
        cupy.random.seed(seed)
        states["random/cupy/seed"] = seed
    return states


def restore_random_states(state: RankState) -> None:
    """Lets Python's, NumPy's and CuPy's random numbers go on from where they were."""
    arrays = state.arrays
    if "random/python/state" not in arrays:
        # Versions before 0.2 made steps of snapshots of Chainer's, which saves none.
        return
    gauss = arrays["random/python/gauss"].tolist()
    internal = tuple(arrays["random/python/state"].tolist())
    random.setstate((int(arrays["random/python/version"]), internal, gauss[0] if gauss else None))
    if "random/numpy/keys" in arrays:
        position, has_gauss, cached = arrays["random/numpy/rest"].tolist()
        keys = arrays["random/numpy/keys"]
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    cupy = sys.modules.get("cupy")
    if cupy is not None and "random/cupy/seed" in arrays:
        cupy.random.seed(int(arrays["random/cupy/seed"]))


def position_of(iterator: Any) -> float | None:
    """How many passes over its dataset an iterator has made; ``None`` if unknown."""
    detail = getattr(iterator, "epoch_detail", None)
    return float(detail) if isinstance(detail, (int, float)) else None


def move_to(iterator: Any, epoch_detail: float) -> bool:
    """Moves an iterator to where another one was whose dataset was divided otherwise.

    The order of what is left of the pass is drawn anew.

    Args:
        iterator: An iterator that serializes itself as Chainer's do.
        epoch_detail: The position, as `position_of` gives it.

    Returns:
        Whether that was possible.
    """
    if not (hasattr(iterator, "reset") and hasattr(iterator, "dataset")):
        return False
    iterator.reset()
    size = len(iterator.dataset)
    epoch = int(epoch_detail)
    batch = getattr(iterator, "batch_size", 1)
    position = min(round((epoch_detail - epoch) * size), size - 1)
    values = {
        "current_position": np.array(position),
        "epoch": np.array(epoch),
        "is_new_epoch": np.array(False),
        "previous_epoch_detail": np.array(max(epoch_detail - batch / size, 0.0)),
    }
    order = ("order", "_order")
    reader = NpzDeserializer(values, "", True, lambda key: key in order)
    try:
        iterator.serialize(reader)
    except KeyError:
        return False
    return True
