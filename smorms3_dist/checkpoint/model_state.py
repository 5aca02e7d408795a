"""What a checkpoint says of models besides their arrays, and where a model differs from it."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals.loss_scale import LossScaling
from smorms3_dist.chainer_internals.optimizers import master_of, set_master
from smorms3_dist.checkpoint.files.manifest import (
    Manifest,
    ParameterGroup,
    Value,
    full_name,
    is_count,
)
from smorms3_dist.kernels.segments import MASTER
from smorms3_dist.optimizer.optimizer import ShardedOptimizer
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.rules import has_progress, progress_of
from smorms3_dist.sharding.sharded_model import AnyGroup
from smorms3_dist.sharding.states import IN_FLIGHT
from smorms3_dist.sharding.whole_group import WholeGroup
from smorms3_dist.version import __version__

import chainer
import numpy as np

_logger = logging.getLogger(__name__)

Optimizers = Mapping[str, ShardedOptimizer]
"""Sharded optimizers by name; ``main`` is the name of the one that a training usually has."""


class SavedGroup(NamedTuple):
    """Parameters of a model that are a group of a manifest, too.

    Attributes:
        optimizer: The name of their optimizer.
        number: The number of their group in the laid-out model.
        group: That group.
        arrays: The sharded states that they have; others of the same group may have none yet.
        members: Their indices in the laid-out group.
        starts: Where each parameter of the laid-out group begins in a line; -1 for others.
    """

    optimizer: str
    number: int
    group: AnyGroup
    arrays: frozenset[str]
    members: Sequence[int]
    starts: np.ndarray


def saved_groups(optimizers: Optimizers) -> list[SavedGroup]:
    """The groups of a manifest, in its order: the same on all ranks."""
    found = []
    for name, optimizer in optimizers.items():
        for index, group in enumerate(optimizer.sharded_model.groups):
            # Of all parameters one of these, or the other.
            full, least = frozenset[str](), frozenset[str]()
            has = np.zeros(len(group.layout.slots), bool)
            if isinstance(group, ShardedGroup):
                full, least = frozenset(group.states), frozenset(group.always_there)
                has[:] = group.have_states if full != least else False
            sizes = np.array([slot.size for slot in group.layout.slots], np.int64)
            parts = [(full, np.flatnonzero(has)), (least, np.flatnonzero(~has))]
            for arrays, members in sorted(parts, key=lambda part: part[1][:1].tolist()):
                if members.size:
                    starts = np.full(sizes.size, -1, np.int64)
                    starts[members] = np.cumsum(sizes[members]) - sizes[members]
                    found.append(SavedGroup(name, index, group, arrays, members.tolist(), starts))
    return found


def groups_of(optimizers: Optimizers, saved: Sequence[SavedGroup]) -> tuple[ParameterGroup, ...]:
    """What a manifest says of the parameters in its groups: the same on all ranks."""
    found = []
    for name, _, group, arrays, members, _ in saved:
        states = {key: of for key, of in (_dtypes(group) or {}).items() if key in arrays}
        master = states.pop(MASTER, None)
        names, shapes = _names_of(name, group), group.layout.shapes
        rules: list[Any] = [param.update_rule for param in group.buffers.params]
        if len(members) < len(names):
            names = tuple([names[index] for index in members])
            shapes = tuple([shapes[index] for index in members])
            rules = [rules[index] for index in members]
        alike = isinstance(group, ShardedGroup) and group.rules_are_alike()
        alike = alike and rules[0].hyperparam.parent is optimizers[name].actual_optimizer.hyperparam
        own = {} if alike else _own_hyperparameters(names, rules, optimizers[name])
        found.append(
            ParameterGroup(
                dtype=group.dtype.name,
                update=group.plan.label,
                states=states,
                master=master,
                names=names,
                shapes=shapes,
                rule_t=tuple([0 if rule is None else int(rule.t) for rule in rules]),
                hyperparameters=own,
            )
        )
    return tuple(found)


def _own_hyperparameters(
    names: Iterable[str], rules: Iterable[Any], optimizer: ShardedOptimizer
) -> dict[str, dict[str, Value]]:
    """Those of the update rules of named parameters that differ from the optimizer's."""
    shared, found = hyperparameters_of(optimizer), {}
    for name, rule in zip(names, rules, strict=True):
        every = {} if rule is None else rule.hyperparam.get_dict()
        values = {key: _value(value) for key, value in every.items()}
        own = {key: value for key, value in values.items() if value != shared.get(key)}
        if own:
            found[name] = own
    return found


def _dtypes(group: AnyGroup) -> dict[str, str] | None:
    """The dtypes of the sharded states and masters of a group; ``None`` if none are sharded."""
    if not isinstance(group, ShardedGroup):
        return None
    return {name: array.dtype.name for name, array in group.states.items()}


def hyperparameters_of(optimizer: ShardedOptimizer) -> dict[str, Value]:
    """The hyperparameters of an optimizer, as a manifest can hold them."""
    return {key: _value(value) for key, value in optimizer.hyperparam.get_dict().items()}


def _value(value: Any) -> Value:
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def notes_of(optimizer: ShardedOptimizer) -> dict[str, Any]:
    """What a checkpoint notes of an optimizer besides its arrays."""
    scaling = LossScaling.of(optimizer.actual_optimizer)
    progress = {}
    for group in optimizer.sharded_model.groups:
        rules = [param.update_rule for param in group.buffers.params]
        if any(map(has_progress, {type(rule): rule for rule in rules if rule}.values())):
            for name, rule in zip(group.layout.names, rules, strict=True):
                if rule is not None and (numbers := progress_of(rule)):
                    progress[name] = numbers
    in_flight = optimizer.in_flight
    late: dict[str, Any] = {}
    if in_flight is not None and in_flight.are_there:
        late = {IN_FLIGHT: True, "loss_scale_in_flight": in_flight.loss_scale}
    return {
        **late,
        "class": type(optimizer.actual_optimizer).__name__,
        "t": int(optimizer.t),
        "epoch": int(optimizer.epoch),
        "hyperparameters": hyperparameters_of(optimizer),
        "loss_scale": scaling and scaling.scale,
        "loss_scale_is_dynamic": scaling is not None and scaling.dynamic,
        "loss_scale_was_too_large": scaling is not None and scaling.was_too_large,
        "progress": dict(sorted(progress.items())),
    }


def restore_notes(
    optimizer: ShardedOptimizer, notes: Mapping[str, Any], manifest: Manifest
) -> None:
    """Gives an optimizer back what `notes_of` has noted; counts are in the manifest, too."""
    optimizer.t = int(notes.get("t", manifest.t))
    optimizer.epoch = int(notes.get("epoch", manifest.epoch))
    scale = notes.get("loss_scale")
    if scale is not None:
        dynamic = bool(notes.get("loss_scale_is_dynamic"))
        too_large = bool(notes.get("loss_scale_was_too_large"))
        LossScaling(float(scale), dynamic, too_large).restore(optimizer.actual_optimizer)
    if optimizer.in_flight is not None:
        optimizer.in_flight.are_there = bool(notes.get(IN_FLIGHT))
        optimizer.in_flight.loss_scale = notes.get("loss_scale_in_flight")
    elif notes.get(IN_FLIGHT) and optimizer.collectives.rank == 0:
        _logger.warning(
            "the checkpoint has a gradient in flight, which is dropped: this optimizer is made "
            "without double_buffering=True"
        )
    progress = notes.get("progress", {})
    for name, param in optimizer.target.namedparams() if progress else ():
        for key, value in progress.get(name, {}).items():
            if param.update_rule is not None and key in progress_of(param.update_rule):
                setattr(param.update_rule, key, value)


def notes_fault(notes: Mapping[str, Any]) -> str | None:
    """What in the notes of a manifest cannot be, in words, if anything cannot."""
    for what, value in _dictionaries(notes):
        if not isinstance(value, dict):
            return f"has {value!r:.80} as {what}"
    for kind in ("iterators", "positions"):
        for name, position in notes.get(kind, {}).items():
            if position is not None and not (_is_number(position) and position >= 0):
                return f"has {position!r:.80} as the position of the iterator {name}"
    for name, fields in notes.get("optimizers", {}).items():
        for key in ("t", "epoch"):
            if not is_count(fields.get(key, 0)):
                return f"has {fields[key]!r:.80} as {key} of the optimizer {name}"
        for key in ("loss_scale", "loss_scale_in_flight"):
            scale = fields.get(key)
            if scale is not None and not _is_number(scale):
                return f"has {scale!r:.80} as {key} of the optimizer {name}"
        for parameter, progress in fields.get("progress", {}).items():
            for key, value in progress.items():
                if not _is_number(value):
                    return f"has {value!r:.80} as {key} of the update rule of {parameter}"
    return None


def _dictionaries(notes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What must be a dictionary in notes, with a name: each before what is in it."""
    for kind in ("iterators", "positions", "optimizers"):
        yield f"its {kind}", notes.get(kind, {})
    for name, fields in notes.get("optimizers", {}).items():
        yield f"the notes of the optimizer {name}", fields
        for key in ("hyperparameters", "progress"):
            yield f"{key} of the optimizer {name}", fields.get(key, {})
        for parameter, progress in fields.get("progress", {}).items():
            yield f"progress of the update rule of {parameter}", progress


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


class _WholeRules:
    """The update rules of an optimizer whose states every rank has whole."""

    def __init__(self, groups: list[WholeGroup]) -> None:
        self._groups = groups

    def serialize(self, serializer: Any) -> None:
        for group in self._groups:
            for slot, param in group.parameters():
                rule, child = param.update_rule, serializer[slot.name]
                rule.serialize(child)
                if isinstance(serializer, chainer.serializer.Deserializer):
                    master = _get(child, MASTER)
                    if master is not None:
                        array = param.device.send(np.asarray(master))
                        set_master(rule, array, param.name)
                elif isinstance(rule, chainer.UpdateRule) and master_of(rule) is not None:
                    # Chainer does not save it.
                    child(MASTER, master_of(rule))


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
        if (whole := list(optimizer.sharded_model.whole_groups))
    }


def versions() -> dict[str, str]:
    """The versions of what makes a checkpoint."""
    return {
        "smorms3_dist": __version__,
        "chainer": importlib.metadata.version("chainer"),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


class Places(NamedTuple):
    """Where a manifest has the parameters of a group of a model: columns, by slot.

    Attributes:
        groups: The numbers of their groups in the manifest; -1 for those that it does not have.
        indices: Their indices there.
        starts: Their first elements in a line.
    """

    groups: np.ndarray
    indices: np.ndarray
    starts: np.ndarray


def places_of(name: str, group: AnyGroup, manifest: Manifest, leave: Collection[str]) -> Places:
    """Where a manifest has the parameters of an optimizer's group, but for those that are left.

    Args:
        name: The name of the optimizer.
        group: A group of its model.
        manifest: The manifest.
        leave: Full names of the parameters that are left as they are.
    """
    names = _names_of(name, group)
    number = None if leave else _number_of(names, manifest)
    numbers: np.ndarray
    indices: np.ndarray
    if number is not None:
        numbers, indices = np.full(len(names), number), np.arange(len(names))
    else:
        found = [(-1, 0) if n in leave else manifest.places.get(n, (-1, 0)) for n in names]
        numbers, indices = np.array(found, np.int64).reshape(-1, 2).T
    starts = np.zeros(len(names), np.int64)
    for number, saved in enumerate(manifest.groups):
        which = numbers == number
        starts[which] = np.array(saved.starts, np.int64)[indices[which]]
    return Places(numbers, indices, starts)


def _names_of(name: str, group: AnyGroup) -> tuple[str, ...]:
    """The full names of the parameters of an optimizer's group."""
    names, prefix = group.layout.names, full_name(name, "")
    return tuple([prefix + each for each in names]) if prefix else names


def _number_of(names: tuple[str, ...], manifest: Manifest) -> int | None:
    """The number of a manifest's group of just these parameters, in their order, if it has one."""
    return next((n for n, saved in enumerate(manifest.groups) if saved.names == names), None)


def differences(optimizers: Optimizers, manifest: Manifest) -> dict[str, str]:
    """Where models differ from a checkpoint.

    Args:
        optimizers: The optimizers of the models, laid out.
        manifest: That of the checkpoint.

    Returns:
        What differs in words, by the full names of parameters.
    """
    found = {}
    present: set[str] = set()
    same: set[int] = set()
    for name, optimizer in optimizers.items():
        for group in optimizer.sharded_model.groups:
            dtype, arrays, shapes = group.dtype.name, _dtypes(group), group.layout.shapes
            differ = [_states_differ(arrays, each) for each in manifest.groups]
            names = _names_of(name, group)
            number = _number_of(names, manifest)
            if number is not None and not differ[number]:
                # As nearly always: then there is nothing to say of any of them.
                saved = manifest.groups[number]
                if saved.dtype == dtype and saved.shapes == shapes:
                    same.add(number)
                    continue
            present.update(names)
            for parameter, own_shape in zip(names, shapes, strict=True):
                place = manifest.places.get(parameter)
                if place is None:
                    found[parameter] = "is in the model, but not in the checkpoint"
                    continue
                saved = manifest.groups[place[0]]
                shape = saved.shapes[place[1]]
                if own_shape != shape or dtype != saved.dtype:
                    found[parameter] = (
                        f"is {dtype} {own_shape} in the model, {saved.dtype} {shape} in the file"
                    )
                elif differ[place[0]]:
                    found[parameter] = differ[place[0]]
    for number, saved in enumerate(manifest.groups):
        for parameter in () if number in same else set(saved.names) - present:
            found[parameter] = "is in the checkpoint, but not in the model"
    return dict(sorted(found.items()))


def _states_differ(arrays: Mapping[str, str] | None, saved: ParameterGroup) -> str:
    """Where states differ from those of saved parameters, in words; empty if nowhere."""
    theirs = saved.states if saved.master is None else {**saved.states, MASTER: saved.master}
    # A master in the parameter's own dtype is the parameter before it was rounded for all to see;
    # and gradients in flight are no rule's.
    ignored = ((MASTER, saved.dtype), (IN_FLIGHT, saved.dtype))
    theirs, mine = (
        {name: of for name, of in each.items() if (name, of) not in ignored}
        for each in (theirs, arrays or {})
    )
    if arrays is not None and theirs and mine != theirs:
        arrays = mine
        listed = f"{_listed(arrays)} in the optimizer, {_listed(theirs)} in the checkpoint"
        return f"has the states {listed}"
    return ""


def _listed(states: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({dtype})" for name, dtype in sorted(states.items())) or "none"
