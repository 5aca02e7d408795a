"""Chainer's serializers: states whole and in Chainer's own keys, or this rank's part of them.

Chainer calls `serialize` on one rank, on all of them, or on the failing one, so nothing that it
leads to communicates. What is written is Chainer's where the whole states are at hand: on a single
rank, and after `consolidate`. Otherwise it is this rank's shard, by parameter and range, with which
nothing but the same world size can go on. Beside either stand, under a name of their own, the fp32
masters and the loss scale, which Chainer does not save.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.kernels.segments import MASTER
from smorms3_dist.sharding import rules
from smorms3_dist.sharding.sharded_model import ShardedModel
from smorms3_dist.step.agreement import REMEDY

import chainer
import numpy as np

VERSION = 1

_OWN = "smorms3_dist"
_PIECE = 1 << 18

States = dict[str, dict[str, np.ndarray]]
"""Whole states by parameter and name, fp32 masters included, in host memory."""


class LeavesShardsOut:
    """Marks serializers to which sharded optimizers write nothing: their states go elsewhere."""


class _Part(NamedTuple):
    """What a shard has of one parameter: ranges of its elements, and their states one by one."""

    ranges: np.ndarray
    states: dict[str, np.ndarray]


class ShardStates:
    """The states of one shard as a snapshot has them, independent of any layout.

    Args:
        parts: What there is of each parameter, by name.
    """

    def __init__(self, parts: dict[str, _Part]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, shards: ShardedModel) -> ShardStates:
        """Copies the states that a rank has."""
        parts = {}
        for update in shards.sharded:
            for slot in update.buffers.group.slots:
                if update.has_states_of(slot.index):
                    segments = update.segments_of(slot.index)
                    states = {}
                    for name, state in update.states.items():
                        values = [_on_host(state[segment.shard]) for segment in segments]
                        states[name] = np.concatenate(values or [np.empty(0, state.dtype)])
                    ranges = [(segment.start, segment.stop) for segment in segments]
                    parts[slot.name] = _Part(np.array(ranges, np.int64).reshape(-1, 2), states)
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
                states = {key: np.asarray(_get(child["values"], key)) for key in keys}
                parts[name] = _Part(np.asarray(ranges), states)
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

    def check(self, shards: ShardedModel) -> None:
        """Finds out whether they fit a layout.

        Raises:
            RuntimeError: If they do not, naming the first parameter.
        """
        for update in shards.sharded:
            for slot in update.buffers.group.slots:
                part = self._parts.get(slot.name)
                if part is None:
                    continue
                mine = [[s.start, s.stop] for s in update.segments_of(slot.index)]
                if part.ranges.tolist() != mine:
                    raise RuntimeError(
                        f"rank {shards.rank} cannot take its states from this snapshot: of "
                        f"parameter {slot.name} it holds the ranges {part.ranges.tolist()}, but "
                        f"the layout gives this rank {mine}. The snapshot is of another model or "
                        f"kind of memory. {REMEDY}"
                    )
                if part.states.keys() != update.states.keys():
                    raise RuntimeError(
                        f"the snapshot has the states {', '.join(part.states)} of parameter "
                        f"{slot.name}, but its update rule {update.plan.rule} has "
                        f"{', '.join(update.states)}. Set up the same optimizer, with the same "
                        "use_fp32_update(), as when it was saved"
                    )

    def place(self, shards: ShardedModel) -> None:
        """Overwrites the states of a rank.

        Raises:
            RuntimeError: If they do not fit; nothing has been changed then.
        """
        self.check(shards)
        for update in shards.sharded:
            for slot in update.buffers.group.slots:
                part = self._parts.get(slot.name)
                if part is None:
                    continue
                for state, values in part.states.items():
                    offset = 0
                    for start, stop in part.ranges.tolist():
                        update.put(
                            state, slot.index, start, stop, values[offset : offset + stop - start]
                        )
                        offset += stop - start
                update.take_for_filled(slot.index)


def consolidate(shards: ShardedModel, collectives: Collectives, root: int) -> States | None:
    """Brings the states of all ranks together, piece by piece. Collective.

    Besides the whole states on ``root``, no rank needs more memory than one piece.

    Args:
        shards: The states.
        collectives: The ranks.
        root: Who gets them.

    Returns:
        The whole states on ``root``, ``None`` elsewhere.
    """
    whole: States = {}
    for update in shards.sharded:
        group = update.buffers.group
        for slot in group.slots:
            if update.has_states_of(slot.index) and collectives.rank == root:
                whole[slot.name] = {
                    name: np.empty(slot.shape, state.dtype) for name, state in update.states.items()
                }
        for shard in group.shards:
            for piece in shard.pieces(_PIECE):
                for name, state in update.states.items():
                    if collectives.rank == shard.rank:
                        values = state[piece.start : piece.stop]
                    else:
                        values = update.buffers.memory.empty(
                            piece.size, state.dtype, f"a piece of the state {name}"
                        )
                    collectives.broadcast(values, shard.rank)
                    if collectives.rank != root:
                        continue
                    values = _on_host(values)
                    for segment in piece.segments:
                        if segment.slot.name in whole:
                            begin = segment.shard_start - piece.start
                            target = whole[segment.slot.name][name].reshape(-1)
                            target[segment.start : segment.stop] = values[begin:][: segment.size]
    return whole if collectives.rank == root else None


def write(
    optimizer: chainer.GradientMethod,
    serializer: Any,
    whole: Mapping[str, Mapping[str, np.ndarray]] | None,
    shard: ShardStates | None,
    place: tuple[int, int],
) -> None:
    """Writes an optimizer to a serializer.

    Args:
        optimizer: The Chainer optimizer.
        serializer: Chainer's.
        whole: The whole states, or ``None`` to write the shard.
        shard: The states of this rank's shard, if they are to be written.
        place: This rank, and the world size.
    """
    serializer("t", optimizer.t)
    serializer("epoch", optimizer.epoch)
    own = serializer[_OWN]
    own("version", VERSION)
    _write_loss_scale(optimizer, own)
    if shard is not None:
        own("rank", place[0])
        own("world_size", place[1])
        shard.write(own["shard"])
    names = _first_names(optimizer.target)
    for name, rule in _rules(optimizer):
        states = (whole or {}).get(names[name])
        if states is None or rule._state is not None:
            # What the rule holds itself: everything, or nothing but its t.
            rule.serialize(serializer[name])
            master = None if rule._fp32_param is None else rule._fp32_param.array
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
    shards: ShardedModel | None,
    place: tuple[int, int],
) -> ShardStates | None:
    """Reads an optimizer from a deserializer.

    Whole states are left with the rules, where the next update takes this rank's part of them: the
    parameters need not be there yet.

    Args:
        optimizer: The Chainer optimizer.
        serializer: Chainer's.
        shards: The model as it is laid out, or ``None``.
        place: This rank, and the world size.

    Returns:
        The states, still to be placed, if the snapshot is of a shard, else ``None``.

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
        if (rank, size) != place:
            raise RuntimeError(
                f"the snapshot holds the optimizer states of rank {rank} of {size}, but this is "
                f"rank {place[0]} of {place[1]}. Start {size} ranks, each with its own file. "
                f"{REMEDY}"
            )
        shard = ShardStates.read(own["shard"], [name for name, _ in _rules(optimizer)])
        if shards is not None:
            shard.check(shards)
    t, epoch = serializer("t", optimizer.t), serializer("epoch", optimizer.epoch)
    loaded = []
    for name, rule in _rules(optimizer):
        twin = copy.copy(rule)
        twin._state = None
        master = None
        if shard is not None and name in shard.names:
            twin.t = serializer[name]("t", rule.t)
        else:
            twin.serialize(serializer[name])
            master = _get(own["masters"][name], "array")
        for key in rules.progress_of(rule):
            value = _get(own["progress"][name], key)
            if value is not None:
                setattr(twin, key, type(getattr(rule, key))(value))
        loaded.append((rule, twin, master))
    optimizer.t, optimizer.epoch = t, epoch
    _read_loss_scale(optimizer, own)
    for rule, twin, master in loaded:
        rule.t = twin.t
        vars(rule).update(rules.progress_of(twin))
        if twin._state is not None:
            rule._state = twin._state
        if master is not None:
            rule._fp32_param = chainer.Parameter(np.asarray(master))
    return shard


def is_called_by(method: Any) -> bool:
    """Whether a method is being executed further up in this thread."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is method.__code__:
            return True
        frame = frame.f_back
    return False


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
    if optimizer._loss_scale is not None:
        own("loss_scale", float(optimizer._loss_scale))
        own("loss_scale_is_dynamic", int(optimizer._loss_scaling_is_dynamic))
    if optimizer._loss_scaling_is_dynamic:
        own("loss_scale_was_too_large", int(optimizer._loss_scaling_isnan_ever))


def _read_loss_scale(optimizer: chainer.GradientMethod, own: Any) -> None:
    """A dynamic scale goes on; a static one is a setting, which the script may have changed."""
    scale = _get(own, "loss_scale")
    if scale is None:
        return
    dynamic = bool(int(_get(own, "loss_scale_is_dynamic")))
    if dynamic and optimizer._loss_scaling_is_dynamic:
        optimizer._loss_scale = float(scale)
        optimizer._loss_scaling_isnan_ever = bool(int(_get(own, "loss_scale_was_too_large")))
    elif not dynamic and optimizer._loss_scale is None:
        optimizer._loss_scale = float(scale)


def _get(serializer: Any, key: str) -> Any:
    """A value of a snapshot, or ``None`` if it has none of that name."""
    try:
        return serializer(key, None)
    except KeyError:
        return None


def _on_host(values: Any) -> np.ndarray:
    return np.array(values.get() if hasattr(values, "get") else values)
