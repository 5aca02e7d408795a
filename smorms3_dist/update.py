"""The update of a shard: optimizer states in shard coordinates, hyperparameters, and kernel calls.

States exist for what this rank owns and for nothing else: three arrays a group, each as long as the
shard. A parameter's hyperparameters are read from its own update rule at each step, as Chainer
does; neighbours that share them and touch
each other make a *run*, which is one kernel call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from smorms3_dist import kernels
from smorms3_dist.buffers import FlatBuffers
from smorms3_dist.collectives.base import Collectives, Mean
from smorms3_dist.layout import Piece, Segment, Shard, Slot

import chainer
import numpy as np
from chainer.optimizers.smorms3 import SMORMS3Rule

STATE_NAMES = ("mem", "g", "g2")
"""The states of SMORMS3, by the names that Chainer gives them."""

_MOVED_AT_ONCE = 1 << 18

_INITIAL = {"mem": 1, "g": 0, "g2": 0}


class Settings(NamedTuple):
    """How one parameter is updated in this step.

    Attributes:
        lr: Largest step.
        eps: Added to the denominators.
        loss_scale: What gradients are divided by first, or ``None``.
        times: How often the update is applied: once for each path by which the link reaches the
            parameter.
    """

    lr: float
    eps: float
    loss_scale: float | None
    times: int


class Run(NamedTuple):
    """Neighbouring elements with the same settings.

    Attributes:
        start: First element in shard coordinates.
        stop: One past the last.
        flat_start: Offset of ``start`` in the flat buffer.
        settings: How they are updated.
    """

    start: int
    stop: int
    flat_start: int
    settings: Settings


class ShardUpdate:
    """The optimizer states of one group on this rank, and their update.

    Args:
        buffers: The flat buffers of the group.
        shard: What this rank owns of it.
        kernel: The update of a contiguous range.

    Attributes:
        buffers: The flat buffers of the group.
        shard: What this rank owns.
        states: Arrays of ``shard.size`` elements by the names of `STATE_NAMES`.
    """

    def __init__(self, buffers: FlatBuffers, shard: Shard, kernel: kernels.Kernel) -> None:
        self.buffers = buffers
        self.shard = shard
        dtype = buffers.group.dtype
        self.states = {name: np.empty(shard.size, dtype) for name in STATE_NAMES}
        self._kernel = kernel
        self._rules: list[chainer.UpdateRule | None] = [p.update_rule for p in buffers.params]
        self._settings: list[Settings | None] = []
        self._segments: dict[int, list[Segment]] = {}
        for segment in shard.segments:
            self._segments.setdefault(segment.slot.index, []).append(segment)
        # The segments cover the shard, so this fills the states.
        for index in range(len(buffers.params)):
            self._take_states(index)

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(state.nbytes for state in self.states.values())

    def segments_of(self, index: int) -> Sequence[Segment]:
        """The segments of this rank that belong to the slot of that index."""
        return self._segments.get(index, ())

    def names_kept_by(self, places: Mapping[str, tuple[ShardUpdate, Slot]]) -> Iterator[str]:
        """Names of the parameters that stand in a new layout, with their rules, as they do here.

        Args:
            places: The updates and slots of the new layout by name.
        """
        group = self.buffers.group
        for slot, param, rule in zip(group.slots, self.buffers.params, self._rules, strict=True):
            update, place = places.get(slot.name, (None, None))
            if (
                update is not None
                and place is not None
                and update.buffers.params[place.index] is param
                and param.update_rule is rule
                and update.buffers.group.dtype == group.dtype
                and place.shape == slot.shape
            ):
                yield slot.name

    def start_step(self, times: Mapping[int, int], loss_scale: float | None) -> None:
        """Reads what the update rules say now, and counts the step in their ``t``.

        A parameter whose rule has been replaced since the last step takes the states of the new
        one, which are fresh if that has none, as in Chainer. A parameter without a rule, or with a
        disabled one, stays as it is.

        Args:
            times: How many paths of the link lead to a parameter, by ``id``.
            loss_scale: What gradients are still to be divided by, or ``None``.
        """
        self._settings = []
        for index, param in enumerate(self.buffers.params):
            rule = param.update_rule
            if rule is not self._rules[index]:
                self._rules[index] = rule
                self._take_states(index)
            if rule is None or not rule.enabled:
                self._settings.append(None)
                continue
            rule.t += times[id(param)]
            hyperparam = rule.hyperparam
            self._settings.append(
                Settings(hyperparam.lr, hyperparam.eps, loss_scale, times[id(param)])
            )

    def update(self, segments: tuple[Segment, ...], mean: Mean) -> None:
        """Updates neighbouring segments of the shard.

        Args:
            segments: What to update, in order and without gaps in shard coordinates.
            mean: Their mean gradients, one behind the other; not written to.
        """
        flat = self.buffers.flat
        begin = segments[0].shard_start
        mem, g, g2 = (self.states[name] for name in STATE_NAMES)
        for run in self._runs(segments):
            shard = slice(run.start, run.stop)
            param = flat[run.flat_start : run.flat_start + run.stop - run.start]
            lr, eps, loss_scale, times = run.settings
            part = mean.part(run.start - begin, run.stop - begin)
            if loss_scale is not None:
                part = part.divided_by(loss_scale)
            for _ in range(times):
                self._kernel(param, *part, mem[shard], g[shard], g2[shard], lr, eps)

    def update_piece(self, piece: Piece, mean: Mean) -> None:
        """Updates a piece of the shard: a `smorms3_dist.collectives.base.Consume`."""
        self.update(piece.segments, mean)

    def _runs(self, segments: tuple[Segment, ...]) -> Iterator[Run]:
        run: Run | None = None
        for segment in segments:
            settings = self._settings[segment.slot.index]
            if settings is None:
                continue
            if (
                run is not None
                and run.settings == settings
                and run.stop == segment.shard_start
                and run.flat_start + run.stop - run.start == segment.flat_start
            ):
                run = run._replace(stop=segment.shard_stop)
                continue
            if run is not None:
                yield run
            run = Run(segment.shard_start, segment.shard_stop, segment.flat_start, settings)
        if run is not None:
            yield run

    def _take_states(self, index: int) -> None:
        """Keeps this rank's part of the states that a rule has, and frees the whole ones.

        A rule has states if it was used, or loaded, before the optimizer was wrapped.
        """
        rule = self._rules[index]
        whole = {} if rule is None or rule.state is None else rule.state
        for segment in self.segments_of(index):
            shard = slice(segment.shard_start, segment.shard_stop)
            for name, state in self.states.items():
                if name in whole:
                    state[shard] = np.ravel(whole[name])[segment.start : segment.stop]
                else:
                    state[shard] = _INITIAL[name]
        if rule is not None:
            rule._state = None


def move_states(
    old: Sequence[ShardUpdate], new: Sequence[ShardUpdate], collectives: Collectives
) -> None:
    """Carries the states of the parameters that are still there into a new layout. Collective.

    A parameter keeps its states if it is the same object with the same update rule, shape and dtype
    on every rank.

    Args:
        old: The updates of the old layout.
        new: Those of the new one, whose states are overwritten.
        collectives: The ranks.
    """
    if not old:
        return
    places = {slot.name: (update, slot) for update in new for slot in update.buffers.group.slots}
    kept = set.intersection(
        *collectives.all_gather_object({name for u in old for name in u.names_kept_by(places)})
    )
    for update in old:
        for shard in update.buffers.group.shards:
            for piece in shard.pieces(_MOVED_AT_ONCE):
                for segment in piece.segments:
                    if segment.slot.name in kept:
                        target, slot = places[segment.slot.name]
                        _move_segment(update, shard.rank, segment, target, slot, collectives)


def _move_segment(
    source: ShardUpdate,
    owner: int,
    segment: Segment,
    target: ShardUpdate,
    slot: Slot,
    collectives: Collectives,
) -> None:
    for name in STATE_NAMES:
        if collectives.rank == owner:
            values = source.states[name][segment.shard_start : segment.shard_stop]
        else:
            values = np.empty(segment.size, source.buffers.group.dtype)
        collectives.broadcast(values, owner)
        for mine in target.segments_of(slot.index):
            start, stop = max(mine.start, segment.start), min(mine.stop, segment.stop)
            if start < stop:
                offset = mine.shard_start - mine.start
                target.states[name][offset + start : offset + stop] = values[
                    start - segment.start : stop - segment.start
                ]


def check_rule(name: str, rule: chainer.UpdateRule | None, dtype: np.dtype) -> None:
    """Refuses an update rule whose arithmetic the kernels do not have.

    Args:
        name: The parameter.
        rule: Its update rule.
        dtype: Its dtype.

    Raises:
        TypeError: Naming parameter, rule and remedy.
    """
    if rule is None:
        return
    if not is_smorms3(rule):
        raise TypeError(
            f"parameter {name} has the update rule {type(rule).__name__}, but only the rule of "
            "chainer.optimizers.SMORMS3 can be sharded. Give the parameter a rule made by that "
            "optimizer's create_update_rule(), or use chainermn.create_multi_node_optimizer for "
            "this model"
        )
    if rule._use_fp32_update and dtype == np.float16:
        raise TypeError(
            f"parameter {name} is float16 and its rule uses fp32 updates, which are not supported "
            "yet. Keep the parameters in float32, or use chainermn.create_multi_node_optimizer "
            "for this model"
        )


def is_smorms3(rule: chainer.UpdateRule) -> bool:
    """Whether a rule is Chainer's SMORMS3 and nothing else.

    A subclass with an update of its own is not: the kernels would pass over what it does.
    """
    return isinstance(rule, SMORMS3Rule) and all(
        getattr(type(rule), name) is getattr(SMORMS3Rule, name)
        for name in ("update", "update_core", "update_core_cpu", "init_state")
    )
