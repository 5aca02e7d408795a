"""Chainer's serializers: states whole and in Chainer's own keys, or this rank's part of them.

Chainer calls `serialize` on one rank, on all of them, or on the failing one, so nothing that it
leads to communicates. What is written is Chainer's where the whole states are at hand: on a single
rank, and after `consolidate`. Otherwise it is this rank's shard, by parameter and range, with which
nothing but the same world size can go on. Beside either stand, under a name of their own, the fp32
masters and the loss scale, which Chainer does not save.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals.loss_scale import LossScaling
from smorms3_dist.chainer_internals.optimizers import master_of, set_master, set_state, stand_in
from smorms3_dist.chainer_internals.trainers import is_missing
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.kernels.segments import MASTER
from smorms3_dist.sharding import rules
from smorms3_dist.sharding.gradients_in_flight import GradientsInFlight
from smorms3_dist.sharding.sharded_model import ShardedModel
from smorms3_dist.sharding.states import IN_FLIGHT
from smorms3_dist.step.agreement import REMEDY

import chainer
import numpy as np

VERSION = 1

_OWN = "smorms3_dist"
_PIECE = 1 << 18

States = dict[str, dict[str, np.ndarray]]
"""Whole states by parameter and name, fp32 masters included, in host memory.

Gradients in flight are under the name `IN_FLIGHT`, by parameter.
"""


class LeavesShardsOut:
    """Marks serializers to which sharded optimizers write nothing: their states go elsewhere."""


class _SavedPart(NamedTuple):
    """What a shard has of one parameter: ranges of its elements, and their states one by one."""

    ranges: np.ndarray
    states: dict[str, np.ndarray]


class ShardStates:
    """The states of one shard as a snapshot has them, independent of any layout."""

    def __init__(self, parts: dict[str, _SavedPart]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, sharded: ShardedModel) -> ShardStates:
        """Copies the states that a rank has."""
        parts = {}
        for group in sharded.sharded_groups:
            for slot, _ in group.parameters():
                names = group.has_arrays_of(slot.index)
                if names or group.has_states_of(slot.index):
                    segments = group.owned(slot.index)
                    states = {}
                    for name in names:
                        state = group.states[name]
                        values = [_on_host(state[segment.range_s]) for segment in segments]
                        states[name] = np.concatenate(values or [np.empty(0, state.dtype)])
                    ranges = [(segment.start_p, segment.stop_p) for segment in segments]
                    parts[slot.name] = _SavedPart(np.array(ranges, np.int64).reshape(-1, 2), states)
        return cls(parts)

    @classmethod
    def read(cls, serializer: Any, names: list[str]) -> ShardStates:
        """Reads the states of parameters from a deserializer."""
        parts = {}
        for name in names:
            child = serializer[name]
            ranges = _get(child, "ranges")
            if ranges is not None:
                keys = bytes(np.asarray(_get(child, "states"))).decode().split()
                states = {key: np.asarray(_get(child, "values", key)) for key in keys}
                parts[name] = _SavedPart(np.asarray(ranges), states)
        return cls(parts)

    @property
    def names(self) -> Collection[str]:
        """The parameters that have states."""
        return self._parts.keys()

    def write(self, serializer: Any) -> None:
        """Writes them to a serializer."""
        for name, part in self._parts.items():
            child = serializer[name]
            child("ranges", part.ranges)
            # As bytes: not every format has strings.
            child("states", np.frombuffer(" ".join(part.states).encode(), np.uint8))
            for state, values in part.states.items():
                child["values"](state, values)

    def check(self, sharded: ShardedModel) -> None:
        """Raises an error, naming the first parameter, if they do not fit a layout."""
        for group in sharded.sharded_groups:
            for slot, _ in group.parameters():
                part = self._parts.get(slot.name)
                if part is None:
                    continue
                mine = [[s.start_p, s.stop_p] for s in group.owned(slot.index)]
                if part.ranges.tolist() != mine:
                    raise RuntimeError(
                        f"rank {sharded.rank} cannot take its states from this snapshot: of "
                        f"parameter {slot.name} it holds the ranges {part.ranges.tolist()}, but "
                        f"the layout gives this rank {mine}. The snapshot is of another model or "
                        f"kind of memory. {REMEDY}"
                    )
                fitting = (group.states.keys(), group.always_there)
                if part.states.keys() - {IN_FLIGHT} not in [n - {IN_FLIGHT} for n in fitting]:
                    raise RuntimeError(
                        f"the snapshot has the states {', '.join(part.states)} of parameter "
                        f"{slot.name}, but its update rule {group.plan.rule} has "
                        f"{', '.join(group.states)}. Set up the same optimizer, with the same "
                        "use_fp32_update(), as when it was saved"
                    )

    def write_into(self, sharded: ShardedModel) -> None:
        """Overwrites the states of a rank; nothing is changed if they do not fit."""
        self.check(sharded)
        for group in sharded.sharded_groups:
            for slot, param in group.parameters():
                part = self._parts.get(slot.name)
                if part is None:
                    continue
                for state, values in part.states.items():
                    if state not in group.states:
                        continue
                    remaining = values
                    for start_p, stop_p in part.ranges.tolist():
                        size = stop_p - start_p
                        group.write_state(state, slot.index, start_p, remaining[:size])
                        remaining = remaining[size:]
                if part.states.keys() - {IN_FLIGHT} == group.states.keys() - {IN_FLIGHT}:
                    group.mark_filled({slot.index: param.update_rule})


class SavedInFlight(NamedTuple):
    """The gradients in flight that a snapshot has.

    Attributes:
        loss_scale: What they have been multiplied by, or ``None``.
        whole: The whole ones by parameter; none if they are among the states of a shard.
    """

    loss_scale: float | None
    whole: dict[str, np.ndarray]

    @classmethod
    def read(cls, optimizer: chainer.GradientMethod, serializer: Any) -> SavedInFlight | None:
        """Reads them from a deserializer; ``None`` if there are none."""
        own = serializer[_OWN]
        if _get(own, "has_gradient_in_flight") is None:
            return None
        scale = _get(own, "loss_scale_in_flight")
        found = {
            name: _get(own, IN_FLIGHT, name, "array")
            for name in _first_names(optimizer.target).values()
        }
        whole = {name: np.asarray(array) for name, array in found.items() if array is not None}
        return cls(None if scale is None else float(scale), whole)

    def write_into(self, sharded: ShardedModel, in_flight: GradientsInFlight) -> None:
        """Lets the next update apply them."""
        for group in sharded.sharded_groups:
            for slot, _ in group.parameters():
                if slot.name in self.whole:
                    group.write_state(IN_FLIGHT, slot.index, 0, self.whole[slot.name].ravel())
        in_flight.are_there, in_flight.loss_scale = True, self.loss_scale


def consolidate(
    sharded: ShardedModel,
    collectives: Collectives,
    root: int,
    in_flight: GradientsInFlight | None,
) -> States | None:
    """Brings the states of all ranks together, piece by piece. Collective.

    Besides the whole states on ``root``, which it returns there, no rank needs more memory than one
    piece.
    """
    whole: States = {}
    for group in sharded.sharded_groups:
        for slot, _ in group.parameters():
            if collectives.rank != root:
                break
            names = group.has_arrays_of(slot.index) - {IN_FLIGHT}
            if names or group.has_states_of(slot.index):
                whole[slot.name] = {
                    name: np.empty(slot.shape, group.states[name].dtype) for name in names
                }
            if in_flight is not None and in_flight.are_there:
                empty = np.empty(slot.shape, group.dtype)
                whole.setdefault(IN_FLIGHT, {})[slot.name] = empty
        for shard in group.layout.shards:
            for piece in shard.pieces(_PIECE):
                for name, state in group.states.items():
                    if collectives.rank == shard.rank:
                        values = state[piece.range_s]
                    else:
                        values = group.memory.empty(
                            piece.size, state.dtype, f"a piece of the state {name}"
                        )
                    collectives.broadcast(values, shard.rank)
                    if collectives.rank != root:
                        continue
                    values = _on_host(values)
                    for segment in piece.segments:
                        parameter = segment.slot.name
                        of, key = (name, parameter) if name == IN_FLIGHT else (parameter, name)
                        if key in whole.get(of, ()):
                            begin = segment.start_s - piece.start_s
                            target = whole[of][key].reshape(-1)
                            target[segment.range_p] = values[begin:][: segment.size]
    return whole if collectives.rank == root else None


def write(
    optimizer: chainer.GradientMethod,
    serializer: Any,
    whole: Mapping[str, Mapping[str, np.ndarray]] | None,
    shard: ShardStates | None,
    collectives: Collectives,
    in_flight: GradientsInFlight | None,
) -> None:
    """Writes an optimizer, with whole states or those of this rank's shard, to a serializer."""
    serializer("t", optimizer.t)
    serializer("epoch", optimizer.epoch)
    own = serializer[_OWN]
    own("version", VERSION)
    _write_loss_scale(optimizer, own)
    if shard is not None:
        own("rank", collectives.rank)
        own("world_size", collectives.size)
        shard.write(own["shard"])
    if in_flight is not None and in_flight.are_there:
        own("has_gradient_in_flight", 1)
        if in_flight.loss_scale is not None:
            own("loss_scale_in_flight", in_flight.loss_scale)
        for name, array in (whole or {}).get(IN_FLIGHT, {}).items():
            own[IN_FLIGHT][name]("array", array)
    names = _first_names(optimizer.target)
    for name, rule in _rules(optimizer):
        states = (whole or {}).get(names[name])
        if states is None or rule.state is not None:
            # What the rule holds itself: everything, or nothing but its t.
            rule.serialize(serializer[name])
            master = master_of(rule)
        else:
            serializer[name]("t", rule.t)
            for state, values in states.items():
                if state != MASTER:
                    serializer[name](state, values)
            master = states.get(MASTER)
        if master is not None:
            own["masters"][name]("array", master)
        for key, value in rules.progress_of(rule).items():
            own["progress"][name](key, value)


def read(
    optimizer: chainer.GradientMethod,
    serializer: Any,
    sharded: ShardedModel | None,
    collectives: Collectives,
) -> ShardStates | None:
    """Reads an optimizer from a deserializer.

    Whole states are left with the rules, where the next update takes this rank's part of them: the
    parameters need not be there yet.

    Returns:
        The states, still to be written into a layout, if the snapshot is of a shard, else ``None``.

    Raises:
        RuntimeError: If the snapshot is of another rank's shard, of another world size, of another
            model, or by a later version of this package; nothing has been changed then.
        KeyError: If the snapshot lacks something, likewise.
    """
    own = serializer[_OWN]
    version = _get(own, "version")
    if version is not None and int(version) > VERSION:
        raise RuntimeError(
            f"the snapshot was written by a later version of smorms3_dist (format {int(version)}; "
            f"this one reads up to {VERSION}): update the package"
        )
    size = _get(own, "world_size")
    shard = None
    if size is not None:
        rank, size = int(_get(own, "rank")), int(size)
        if (rank, size) != (collectives.rank, collectives.size):
            raise RuntimeError(
                f"the snapshot holds the optimizer states of rank {rank} of {size}, but this is "
                f"rank {collectives.rank} of {collectives.size}. Start {size} ranks, each with "
                f"its own file. {REMEDY}"
            )
        shard = ShardStates.read(own["shard"], [name for name, _ in _rules(optimizer)])
        if sharded is not None:
            shard.check(sharded)
    t, epoch = serializer("t", optimizer.t), serializer("epoch", optimizer.epoch)
    loaded = []
    for name, rule in _rules(optimizer):
        twin = stand_in(rule, None)
        master = None
        child = serializer[name]
        if is_missing(child) and child.strict:
            raise KeyError(f"the snapshot has nothing of parameter {name}")
        if shard is not None and name in shard.names:
            twin.t = child("t", rule.t)
        else:
            twin.serialize(child)
            master = _get(own, "masters", name, "array")
        for key in rules.progress_of(rule):
            value = _get(own, "progress", name, key)
            if value is not None:
                setattr(twin, key, type(getattr(rule, key))(value))
        loaded.append((rule, twin, master))
    optimizer.t, optimizer.epoch = t, epoch
    _read_loss_scale(optimizer, own)
    for rule, twin, master in loaded:
        rule.t = twin.t
        vars(rule).update(rules.progress_of(twin))
        if twin.state is not None:
            set_state(rule, twin.state)
        if master is not None:
            set_master(rule, np.asarray(master))
    return shard


def _rules(optimizer: chainer.GradientMethod) -> list[tuple[str, chainer.UpdateRule]]:
    return [
        (name, param.update_rule)
        for name, param in optimizer.target.namedparams()
        if param.update_rule is not None
    ]


def _first_names(link: chainer.Link) -> dict[str, str]:
    """For each path to a parameter the first of all paths to it, by which layouts know it."""
    first: dict[int, str] = {}
    paths = sorted(link.namedparams(), key=lambda item: item[0])
    return {name: first.setdefault(id(param), name) for name, param in paths}


def _write_loss_scale(optimizer: chainer.GradientMethod, own: Any) -> None:
    scaling = LossScaling.of(optimizer)
    if scaling is not None:
        own("loss_scale", scaling.scale)
        own("loss_scale_is_dynamic", int(scaling.dynamic))
        if scaling.dynamic:
            own("loss_scale_was_too_large", int(scaling.was_too_large))


def _read_loss_scale(optimizer: chainer.GradientMethod, own: Any) -> None:
    scale = _get(own, "loss_scale")
    if scale is not None:
        dynamic = bool(int(_get(own, "loss_scale_is_dynamic")))
        too_large = dynamic and bool(int(_get(own, "loss_scale_was_too_large")))
        LossScaling(float(scale), dynamic, too_large).restore(optimizer)


def _get(serializer: Any, *path: str) -> Any:
    """A value of a snapshot, or ``None`` if it has none at that path."""
    *groups, key = path
    for group in groups:
        if is_missing(serializer):
            return None
        serializer = serializer[group]
    if is_missing(serializer):
        return None
    try:
        return serializer(key, None)
    except KeyError:
        return None


def _on_host(values: Any) -> np.ndarray:
    return np.array(values.get() if hasattr(values, "get") else values)
