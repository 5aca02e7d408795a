"""What a rank has besides its shard: its trainer, what models keep beside parameters, randomness.

Chainer's objects serialize themselves into arrays by key; parameters and sharded states are left
out. Nothing is pickled: what is no array of numbers is text in the metadata of the rank's file.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals.links import without_parameters
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.safetensors import DTYPES
from smorms3_dist.optimizer.serialization import LeavesShardsOut
from smorms3_dist.sharding.sharded_model import ShardedModel

import numpy as np
from chainer.serializers import DictionarySerializer, NpzDeserializer

_VALUES, _ELSEWHERE = "values", "elsewhere"


class RankState(NamedTuple):
    """What is written of a rank."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def copy_state(objects: Mapping[str, Any], models: Sequence[ShardedModel]) -> RankState:
    """Copies the state of objects, and of Python's, NumPy's and CuPy's random numbers.

    Args:
        objects: Anything that Chainer can serialize, by name.
        models: The models, laid out, whose parameters are saved elsewhere, and on whose GPUs CuPy's
            random numbers are drawn.

    Raises:
        CheckpointError: If an object wants to keep what only pickle could.
    """
    more = _random_states(models)
    writer = _written(objects, models)
    state = _copied({**writer.target, **more})
    # For those who export it.
    keys = [begin + name for begin, names in writer.passed_over for name in names]
    return state._replace(metadata={**state.metadata, _ELSEWHERE: json.dumps(keys)})


def copy_objects(objects: Mapping[str, Any], models: Sequence[ShardedModel]) -> RankState:
    """Copies the state of objects alone, as `copy_state` does, to be restored if not strictly."""
    return _copied(_written(objects, models).target)


def _written(objects: Mapping[str, Any], models: Sequence[ShardedModel]) -> _Writer:
    # Whole parameters; not the part of one that an object may have a view of.
    buffers = [group.buffers for model in models for group in model.groups]
    elsewhere = set().union(*(map(id, each.views) for each in buffers))
    writer = _Writer({}, "", elsewhere, [])
    with without_parameters_of(models):
        for name, item in objects.items():
            item.serialize(writer[name])
    return writer


def without_parameters_of(models: Sequence[ShardedModel]) -> AbstractContextManager[None]:
    """Lets models be serialized without parameters: see `without_parameters`."""
    # One by one, Chainer's way to an array takes longer than all the rest.
    return without_parameters((model.model.link, model.is_whole) for model in models)


def _copied(values: Mapping[str, Any]) -> RankState:
    arrays: dict[str, np.ndarray] = {}
    texts: dict[str, Any] = {}
    for key, value in values.items():
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
    return RankState(arrays, {_VALUES: json.dumps(texts), _ELSEWHERE: "[]"})


def restore(
    state: RankState,
    objects: Mapping[str, Any],
    strict: bool,
    left_out: tuple[str, ...] = (),
) -> None:
    """Lets objects take back what `copy_state` has copied.

    Args:
        state: As it was read.
        objects: The objects by name.
        strict: Whether everything that they ask for must be there.
        left_out: What keys begin with that are to be passed over.

    Raises:
        KeyError: If something is missing that must be there.
        ValueError: If something is of another shape or type than what it is to replace.
    """
    values: dict[str, Any] = dict(state.arrays)
    for key, text in json.loads(state.metadata[_VALUES]).items():
        values[key] = np.array(text)
    elsewhere = frozenset(json.loads(state.metadata[_ELSEWHERE]))
    reader = _Reader(values, "", strict, _PassedOver(elsewhere, left_out))
    for name, item in objects.items():
        item.serialize(reader[name])


def extensions_in(state: RankState) -> frozenset[str]:
    """The names of a trainer's extensions that have a state, or whose triggers have."""
    texts = json.loads(state.metadata[_VALUES])
    begin = re.compile("trainer/extension(?:s|_triggers)/([^/]*)/")
    return frozenset(found[1] for key in [*state.arrays, *texts] if (found := begin.match(key)))


class _Writer(DictionarySerializer, LeavesShardsOut):
    """Gathers arrays by key, but for those that are saved elsewhere.

    Attributes:
        passed_over: The keys of these: how some begin, and how each of these goes on.
    """

    def __init__(
        self,
        target: dict[str, Any],
        path: str,
        elsewhere: set[int],
        passed_over: list[tuple[str, Collection[str]]],
    ) -> None:
        super().__init__(target, path)
        self.passed_over = passed_over
        self._elsewhere = elsewhere

    def __getitem__(self, key: str) -> _Writer:
        path = f"{self.path}{key.strip('/')}/"
        return _Writer(self.target, path, self._elsewhere, self.passed_over)

    def __reduce__(self) -> Any:
        # ChainerMN's multi-node iterator sends it to other ranks, which want nothing of it.
        return _Writer, ({}, self.path, set(), [])

    def pass_over(self, path: str, names: Collection[str]) -> None:
        """Notes what of a link at a path is saved elsewhere; see `without_parameters`."""
        self.passed_over.append((f"{self.path}{path}/" if path else self.path, names))

    def __call__(self, key: str, value: Any) -> Any:
        if id(value) in self._elsewhere:
            self.pass_over("", [key.lstrip("/")])
            return value
        return super().__call__(key, value)


@dataclasses.dataclass(frozen=True)
class _PassedOver:
    """Says which keys are passed over: names, and what names begin with."""

    names: frozenset[str]
    prefixes: tuple[str, ...]

    def __call__(self, key: str) -> bool:
        return key in self.names or key.startswith(self.prefixes)


class _Reader(NpzDeserializer, LeavesShardsOut):
    """Gives arrays by key."""

    def __reduce__(self) -> Any:
        # ChainerMN's multi-node iterator sends it to other ranks: what is read below its path.
        values = {key: value for key, value in self.npz.items() if key.startswith(self.path)}
        return _Reader, (values, self.path, self.strict, self.ignore_names)

    def __getitem__(self, key: str) -> _Reader:
        path = f"{self.path}{key.strip('/')}/"
        return _Reader(self.npz, path, self.strict, self.ignore_names)

    def __call__(self, key: str, value: Any) -> Any:
        if self.ignore_names(self.path + key.lstrip("/")):
            return value
        try:
            return super().__call__(key, value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}{key.lstrip('/')} does not fit: {error}") from error


def _random_states(models: Sequence[ShardedModel]) -> dict[str, Any]:
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
    for key, cupy in _generators_on_gpus(models):
        # The state of a generator on a GPU cannot be read. So it goes on from a seed of its own
        # drawing, here and after loading alike.
        seed = int(cupy.random.randint(0, 1 << 31))
        cupy.random.seed(seed)
        states[key] = seed
    return states


def _generators_on_gpus(models: Sequence[ShardedModel]) -> Iterator[tuple[str, Any]]:
    """The key of each model's generator, and CuPy, whose current GPU is the generator's then."""
    cupy = _cupy_with_a_gpu()
    for index, model in enumerate(models if cupy is not None else ()):
        with model.groups[0].memory.current():
            yield "random/cupy/seed" + (f"/{index}" if index else ""), cupy


def _cupy_with_a_gpu() -> Any | None:
    """CuPy, if it is in use and there is a GPU; asking it where there is none raises."""
    cupy = sys.modules.get("cupy")
    try:
        return cupy if cupy is not None and cupy.cuda.runtime.getDeviceCount() else None
    except Exception:
        return None


def restore_random_states(state: RankState, models: Sequence[ShardedModel]) -> None:
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
    for key, cupy in _generators_on_gpus(models):
        if key in arrays:
            cupy.random.seed(int(arrays[key]))
