"""What a checkpoint says of models besides their arrays, and where a model differs from it."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals import (
    LossScaling,
    RuleWatch,
    master_of,
    set_master,
)
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
from smorms3_dist.sharding.rules import progress_of
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
        members: Where each begins in a line, by its index in the laid-out group.
    """

    optimizer: str
    number: int
    group: AnyGroup
    arrays: frozenset[str]
    members: Mapping[int, int]


def saved_groups(optimizers: Optimizers) -> list[SavedGroup]:
    """The groups of a manifest, in its order: the same on all ranks."""
    found = []
    for name, optimizer in optimizers.items():
        for index, group in enumerate(optimizer.sharded_model.groups):
            sizes: dict[frozenset[str], int] = {}
            members: dict[frozenset[str], dict[int, int]] = {}
            # Of all parameters one of these, or the other.
            full, least = frozenset[str](), frozenset[str]()
            if isinstance(group, ShardedGroup):
                full, least = frozenset(group.states), frozenset(group.always_there)
            for slot in group.layout.slots:
                has = isinstance(group, ShardedGroup) and group.has_states_of(slot.index)
                arrays = full if has else least
                begin = sizes.setdefault(arrays, 0)
                members.setdefault(arrays, {})[slot.index] = begin
                sizes[arrays] = begin + slot.size
            found += [SavedGroup(name, index, group, *each) for each in members.items()]
    return found


def groups_of(optimizers: Optimizers) -> tuple[ParameterGroup, ...]:
    """What a manifest says of the parameters: the same on all ranks."""
    found = []
    for name, _, group, arrays, members in saved_groups(optimizers):
        shared = hyperparameters_of(optimizers[name])
        states = {key: of for key, of in (_dtypes(group) or {}).items() if key in arrays}
        master = states.pop(MASTER, None)
        slots = [group.layout.slots[index] for index in members]
        names = tuple(full_name(name, slot.name) for slot in slots)
        rules: list[Any] = [group.buffers.params[index].update_rule for index in members]
        alike = isinstance(group, ShardedGroup) and None not in rules
        alike = alike and RuleWatch(rules).are_alike()
        alike = alike and rules[0].hyperparam.parent is optimizers[name].actual_optimizer.hyperparam
        own = {
            parameter: _own_hyperparameters(rule, shared)
            for parameter, rule in zip(names, rules, strict=True)
            if rule is not None and not alike
        }
        found.append(
            ParameterGroup(
                dtype=group.dtype.name,
                update=group.plan.label,
                states=states,
                master=master,
                names=names,
                shapes=tuple(slot.shape for slot in slots),
                rule_t=tuple(0 if rule is None else int(rule.t) for rule in rules),
                hyperparameters={parameter: values for parameter, values in own.items() if values},
            )
        )
    return tuple(found)


def _own_hyperparameters(rule: Any, shared: Mapping[str, Value]) -> dict[str, Value]:
    """Those of an update rule that differ from the optimizer's."""
    values = {key: _value(value) for key, value in rule.hyperparam.get_dict().items()}
    return {key: value for key, value in values.items() if value != shared.get(key)}


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
    for name, param in optimizer.target.namedparams():
        if param.update_rule is not None and progress_of(param.update_rule):
            progress[name] = progress_of(param.update_rule)
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
    for kind in ("iterators", "positions"):
        for name, position in _items(notes.get(kind)):
            if position is not None and not (_is_number(position) and position >= 0):
                return f"has {position!r:.80} as the position of the iterator {name}"
    for name, each in _items(notes.get("optimizers")):
        fields = dict(_items(each))
        for key in ("t", "epoch"):
            if not is_count(fields.get(key, 0)):
                return f"has {fields[key]!r:.80} as {key} of the optimizer {name}"
        for key in ("loss_scale", "loss_scale_in_flight"):
            scale = fields.get(key)
            if scale is not None and not _is_number(scale):
                return f"has {scale!r:.80} as {key} of the optimizer {name}"
        for parameter, progress in _items(fields.get("progress")):
            for key, value in _items(progress):
                if not _is_number(value):
                    return f"has {value!r:.80} as {key} of the update rule of {parameter}"
    return None


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()


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


def differences(optimizers: Optimizers, manifest: Manifest) -> dict[str, str]:
    """Where models differ from a checkpoint.

    Args:
        optimizers: The optimizers of the models, laid out.
        manifest: That of the checkpoint.

    Returns:
        What differs in words, by the full names of parameters.
    """
    found = {}
    present = set()
    for name, optimizer in optimizers.items():
        for group in optimizer.sharded_model.groups:
            dtype, arrays = group.dtype.name, _dtypes(group)
            differ = [_states_differ(arrays, each) for each in manifest.groups]
            for slot in group.layout.slots:
                parameter = full_name(name, slot.name)
                present.add(parameter)
                place = manifest.places.get(parameter)
                if place is None:
                    found[parameter] = "is in the model, but not in the checkpoint"
                    continue
                saved = manifest.groups[place[0]]
                shape = saved.shapes[place[1]]
                if slot.shape != shape or dtype != saved.dtype:
                    found[parameter] = (
                        f"is {dtype} {slot.shape} in the model, {saved.dtype} {shape} in the file"
                    )
                elif differ[place[0]]:
                    found[parameter] = differ[place[0]]
    for parameter in manifest.places.keys() - present:
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
