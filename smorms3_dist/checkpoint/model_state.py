"""What a rank owns of models: copies of it to be written, and what was read back into its place."""

from __future__ import annotations

import bisect
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import smorms3_dist
from smorms3_dist.checkpoint.manifest import Parameter, Value
from smorms3_dist.checkpoint.reading import StepReader
from smorms3_dist.checkpoint.writing import Part
from smorms3_dist.fused import MASTER
from smorms3_dist.layout import Segment
from smorms3_dist.memory import CudaMemory, Memory, assign
from smorms3_dist.optimizer import ShardedOptimizer
from smorms3_dist.rules import progress_of
from smorms3_dist.shards import Shards, Update
from smorms3_dist.update import ShardUpdate
from smorms3_dist.whole import WholeUpdate

import chainer
import numpy as np

Optimizers = Mapping[str, ShardedOptimizer]
"""Sharded optimizers by name; ``main`` is the name of the one that a training usually has."""


def full_name(optimizer: str, parameter: str) -> str:
    """The name of a parameter in a checkpoint: its path, after the optimizer's name if not main."""
    return parameter if optimizer == "main" else f"{optimizer}:{parameter}"


class HostCopies:
    """Memory on the host for a copy of what a rank owns, kept from one save to the next."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[Any, ...], np.ndarray] = {}

    def take(self, optimizers: Optimizers) -> list[Part]:
        """Copies what this rank owns of the parameters, masters and states.

        Returns:
            The parts, as views of this memory, valid until the next call.
        """
        parts = []
        used: dict[tuple[Any, ...], np.ndarray] = {}
        for name, optimizer in optimizers.items():
            for index, update in enumerate(optimizer.shards.updates):
                for key, source, pieces in _ranges(update, name, optimizer.shards.rank):
                    place = (name, index, *key)
                    values = self._copy(place, source, update.buffers.memory)
                    used[place] = values
                    for kind, state, parameter, segment, begin in pieces:
                        part = values[begin : begin + segment.size]
                        parts.append(Part(kind, state, parameter, segment.start, part))
        self._arrays = used
        return parts

    def _copy(self, key: tuple[Any, ...], source: Any, memory: Memory) -> np.ndarray:
        values = self._arrays.get(key)
        if values is None or values.shape != source.shape or values.dtype != source.dtype:
            values = _host_array(memory, source.size, source.dtype)
        if hasattr(source, "get"):
            source.get(out=values)
        else:
            np.copyto(values, source)
        return values


def _host_array(memory: Memory, size: int, dtype: np.dtype) -> np.ndarray:
    what = "the copy of a shard that a checkpoint is written from"
    if isinstance(memory, CudaMemory):
        return memory.pinned(size, dtype, what)
    return memory.empty(size, dtype, what)


_Piece = tuple[str, str | None, str, Segment, int]


def _ranges(
    update: Update, optimizer: str, rank: int
) -> Iterator[tuple[tuple[Any, ...], Any, list[_Piece]]]:
    """The contiguous ranges that a rank owns: a key, the values, and what lies where in them."""
    group = update.buffers.group
    segments = group.shards[rank].segments
    starts = [segment.flat_start for segment in segments]
    for index, bucket in enumerate(group.buckets):
        start, stop = bucket.part_of(rank)
        mine = segments[bisect.bisect_left(starts, start) : bisect.bisect_left(starts, stop)]
        yield (
            ("param", index),
            update.buffers.flat[start:stop],
            [
                ("param", None, full_name(optimizer, s.slot.name), s, s.flat_start - start)
                for s in mine
            ],
        )
    if isinstance(update, ShardUpdate):
        filled = [s for s in segments if update.has_states_of(s.slot.index)]
        for state, values in update.states.items():
            kind, name = _kind_of(state)
            yield (
                ("state", state),
                values,
                [(kind, name, full_name(optimizer, s.slot.name), s, s.shard_start) for s in filled],
            )


def _kind_of(array: str) -> tuple[str, str | None]:
    """What a checkpoint calls an array of an update: kind and state. Parameters are ``""``."""
    if not array:
        return "param", None
    return ("master", None) if array == MASTER else ("state", array)


def parameters_of(optimizers: Optimizers) -> tuple[Parameter, ...]:
    """What a manifest says of the parameters: the same on all ranks."""
    found = []
    for name, optimizer in optimizers.items():
        shared = hyperparameters_of(optimizer)
        for update in optimizer.shards.updates:
            group = update.buffers.group
            dtype, label, arrays = group.dtype.name, update.plan.label, _dtypes(update) or {}
            master = arrays.pop(MASTER, None)
            for slot, param in zip(group.slots, update.buffers.params, strict=True):
                rule = param.update_rule
                has_states = isinstance(update, ShardUpdate) and update.has_states_of(slot.index)
                own = {} if rule is None else rule.hyperparam.get_dict()
                own = {key: _value(v) for key, v in own.items()}
                found.append(
                    Parameter(
                        full_name(name, slot.name),
                        tuple(slot.shape),
                        dtype,
                        label,
                        arrays if has_states else {},
                        master if has_states else None,
                        0 if rule is None else int(rule.t),
                        {key: v for key, v in own.items() if v != shared.get(key)},
                    )
                )
    return tuple(sorted(found, key=lambda parameter: parameter.name))


def _dtypes(update: Update) -> dict[str, str] | None:
    """The dtypes of the sharded states and masters of a group; ``None`` if none are sharded."""
    if not isinstance(update, ShardUpdate):
        return None
    return {name: array.dtype.name for name, array in update.states.items()}


def hyperparameters_of(optimizer: ShardedOptimizer) -> dict[str, Value]:
    """The hyperparameters of an optimizer, as a manifest can hold them."""
    return {key: _value(value) for key, value in optimizer.hyperparam.get_dict().items()}


def _value(value: Any) -> Value:
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def notes_of(optimizer: ShardedOptimizer) -> dict[str, Any]:
    """What a checkpoint notes of an optimizer besides its arrays."""
    scale = optimizer._loss_scale
    progress = {}
    for name, param in sorted(optimizer.target.namedparams(), key=lambda item: item[0]):
        if param.update_rule is not None and progress_of(param.update_rule):
            progress[name] = progress_of(param.update_rule)
    return {
        "class": type(optimizer.actual_optimizer).__name__,
        "t": int(optimizer.t),
        "epoch": int(optimizer.epoch),
        "hyperparameters": hyperparameters_of(optimizer),
        "loss_scale": None if scale is None else float(scale),
        "loss_scale_is_dynamic": bool(optimizer._loss_scaling_is_dynamic),
        "loss_scale_was_too_large": bool(getattr(optimizer, "_loss_scaling_isnan_ever", False)),
        "progress": progress,
    }


class _WholeRules:
    """The update rules of an optimizer whose states every rank has whole."""

    def __init__(self, updates: list[WholeUpdate]) -> None:
        self._updates = updates

    def serialize(self, serializer: Any) -> None:
        for update in self._updates:
            for slot, param in zip(update.buffers.group.slots, update.buffers.params, strict=True):
                rule, child = param.update_rule, serializer[slot.name]
                rule.serialize(child)
                if isinstance(serializer, chainer.serializer.Deserializer):
                    master = _get(child, MASTER)
                    if master is not None:
                        array = param.device.send(np.asarray(master))
                        rule._fp32_param = chainer.Parameter(array, name=param.name)
                elif getattr(rule, "_fp32_param", None) is not None:
                    # Chainer does not save it.
                    child(MASTER, rule._fp32_param.array)


def _get(serializer: Any, key: str) -> Any:
    try:
        return serializer(key, None)
    except KeyError:
        return None


def rules_of(optimizers: Optimizers) -> dict[str, Any]:
    """The update rules whose states every rank has whole, as objects to be serialized, by name."""
    return {
        f"rules/{name}": _WholeRules(whole)
        for name, optimizer in optimizers.items()
        if (whole := list(optimizer.shards.whole))
    }


def versions() -> dict[str, str]:
    """The versions of what makes a checkpoint."""
    return {
        "smorms3_dist": smorms3_dist.__version__,
        "chainer": importlib.metadata.version("chainer"),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def differences(optimizers: Optimizers, saved: Mapping[str, Parameter]) -> dict[str, str]:
    """Where models differ from a checkpoint.

    Args:
        optimizers: The optimizers of the models, laid out.
        saved: The parameters of the checkpoint by full name.

    Returns:
        What differs in words, by the full names of parameters.
    """
    found = {}
    present = set()
    for name, optimizer in optimizers.items():
        for update in optimizer.shards.updates:
            dtype, arrays = update.buffers.group.dtype.name, _dtypes(update)
            for slot in update.buffers.group.slots:
                parameter = full_name(name, slot.name)
                present.add(parameter)
                words = _difference(dtype, slot.shape, arrays, saved.get(parameter))
                if words:
                    found[parameter] = words
    for parameter in saved.keys() - present:
        found[parameter] = "is in the checkpoint, but not in the model"
    return dict(sorted(found.items()))


def _difference(
    dtype: str,
    shape: tuple[int, ...],
    arrays: Mapping[str, str] | None,
    saved: Parameter | None,
) -> str | None:
    if saved is None:
        return "is in the model, but not in the checkpoint"
    if (tuple(shape), dtype) != (saved.shape, saved.dtype):
        return f"is {dtype} {tuple(shape)} in the model, {saved.dtype} {saved.shape} in the file"
    theirs = saved.states if saved.master is None else {**saved.states, MASTER: saved.master}
    if arrays is not None and theirs and arrays != theirs:
        listed = f"{_listed(arrays)} in the optimizer, {_listed(theirs)} in the checkpoint"
        return f"has the states {listed}"
    return None


def _listed(states: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({dtype})" for name, dtype in sorted(states.items())) or "none"


class _Read(NamedTuple):
    """Values that were read one behind the other, and the ranges of an array where they belong."""

    target: Any
    places: list[slice]
    values: np.ndarray


def _joined(places: list[slice]) -> Iterator[slice]:
    """Makes one of ranges that follow each other without a gap."""
    start = stop = 0
    for place in places:
        if place.start != stop:
            if start < stop:
                yield slice(start, stop)
            start = place.start
        stop = place.stop
    if start < stop:
        yield slice(start, stop)


class Reading:
    """What a rank owns of an optimizer's model, read into memory of its own first.

    Args:
        name: The name of the optimizer.
        optimizer: The optimizer, laid out.
        reader: The step.
        leave: Full names of the parameters that are left as they are.

    Raises:
        CheckpointError: If a file is missing or damaged; nothing has been changed then.
    """

    def __init__(
        self, name: str, optimizer: ShardedOptimizer, reader: StepReader, leave: set[str]
    ) -> None:
        self._name = name
        self._shards: Shards = optimizer.shards
        self._saved = {p.name: p for p in reader.manifest.parameters if p.name not in leave}
        self._read: list[_Read] = []
        for update in self._shards.updates:
            for array in ("", *(update.states if isinstance(update, ShardUpdate) else ())):
                self._read.append(self._read_array(reader, update, array))

    def _read_array(self, reader: StepReader, update: Update, array: str) -> _Read:
        """Reads a rank's part of the parameters of a group, or of one of their states, at once.

        That is the order of the files. One array for all is memory of few pages.
        """
        kind, state = _kind_of(array)
        segments = [
            (saved.name, segment)
            for segment in update.buffers.group.shards[self._shards.rank].segments
            if (saved := self._saved.get(full_name(self._name, segment.slot.name))) is not None
            and (kind == "param" or (state in saved.states if state else saved.master is not None))
        ]
        target = update.states[array] if isinstance(update, ShardUpdate) and array else None
        dtype = update.buffers.group.dtype if target is None else target.dtype
        values = np.empty(sum(segment.size for _, segment in segments), dtype)
        begin = 0
        for name, segment in segments:
            part = values[begin : begin + segment.size]
            reader.read(kind, state, name, segment.start, segment.stop, part)
            begin += segment.size
        if target is None:
            return _Read(update.buffers.flat, [segment.flat for _, segment in segments], values)
        return _Read(target, [segment.shard for _, segment in segments], values)

    def place(self) -> None:
        """Puts everything into its place on this rank, and frees the memory."""
        while self._read:
            target, slices, values = self._read.pop()
            begin = 0
            for place in _joined(slices):
                part = values[begin : begin + place.stop - place.start]
                assign(target[place], part)
                begin += part.size
        for update in self._shards.updates:
            for slot, param in zip(update.buffers.group.slots, update.buffers.params, strict=True):
                saved = self._saved.get(full_name(self._name, slot.name))
                if saved is None or param.update_rule is None:
                    continue
                param.update_rule.t = saved.rule_t
                if isinstance(update, ShardUpdate) and (saved.states or saved.master):
                    update.take_for_filled(slot.index)
