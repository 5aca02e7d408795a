"""What a rank holds of the parameters that share flat buffers: their values, and its states.

States exist for what this rank owns and for nothing else: arrays as long as the shard, one for each
state of the rule, and one of fp32 masters where parameters are float16 and updated in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set

from smorms3_dist.chainer_internals.optimizers import (
    forget_states,
    indices_of_rules_with_states,
    master_of,
    set_master,
    set_state,
)
from smorms3_dist.collectives.base import Collectives, Consume, Gradients
from smorms3_dist.device.memory import Memory, assign
from smorms3_dist.hooks.views import ParameterView
from smorms3_dist.kernels.narrow import SENT_AS, round_to
from smorms3_dist.kernels.segments import MASTER, follow
from smorms3_dist.layout import GroupLayout, Segment, Shard, Slot
from smorms3_dist.sharding import rules
from smorms3_dist.sharding.buffers import FlatBuffers
from smorms3_dist.sharding.states import IN_FLIGHT, States

import chainer
import numpy as np

_INITIAL = {"mem": 1}
"""What the states of Chainer's rules are at first, where that is not 0."""


class Group:
    """The parameters that share flat buffers, on this rank.

    Attributes:
        buffers: The flat buffers.
        plan: How the parameters are updated.
    """

    def __init__(self, buffers: FlatBuffers, plan: rules.Plan) -> None:
        self.buffers = buffers
        self.plan = plan

    @property
    def layout(self) -> GroupLayout:
        """Which element lies where."""
        return self.buffers.layout

    @property
    def dtype(self) -> np.dtype:
        """The dtype of parameters and gradients."""
        return self.buffers.layout.dtype

    @property
    def memory(self) -> Memory:
        """Allocates the arrays of the group."""
        return self.buffers.memory

    def parameters(self) -> Iterator[tuple[Slot, chainer.Parameter]]:
        """The parameters, with their slots, in the order of the flat buffer."""
        return self.buffers.parameters()

    def reduce_own(self, gradients: Gradients, collectives: Collectives, consume: Consume) -> None:
        """Averages the gradients that parameters have now, as they are sent. Collective."""
        with self.buffers.gradients():
            collectives.reduce_scatter(self.layout, gradients, consume)

    def reduce(self, gradients: Gradients, collectives: Collectives, consume: Consume) -> None:
        """Gives the mean gradients of the step to who consumes them. Collective."""
        self.reduce_own(gradients, collectives, consume)


class OwnedStates(Group):
    """The optimizer states of one group on this rank, which its rules have or get.

    Attributes:
        shard: What this rank owns.
        pieces: The shard in pieces of as many elements as hooks and rules are given at once.
        states: Arrays of ``shard.size`` elements by name: the states of the rule, `MASTER`, and
            `IN_FLIGHT` if gradients are applied one update late.
        seen_as: The narrow dtype to which all ranks see the masters rounded, where these are in the
            dtype of the parameters; else ``None``. Such masters have values at any time.
    """

    def __init__(
        self, buffers: FlatBuffers, shard: Shard, plan: rules.Plan, late: bool = False
    ) -> None:
        super().__init__(buffers, plan)
        self.shard = shard
        dtypes = dict(plan.states)
        self.seen_as = None if plan.seen_as is None else SENT_AS[plan.seen_as]
        if plan.kind is not rules.Kind.NONE and (plan.dtype != self.dtype or self.seen_as):
            dtypes[MASTER] = plan.dtype
        if late:
            dtypes[IN_FLIGHT] = self.dtype
        self.states = States(self.memory, shard.size, dtypes, plan.rule)
        if late:
            self.states[IN_FLIGHT][...] = 0
        # The rules whose states these are.
        self._rules: list[chainer.UpdateRule | None] = [p.update_rule for p in buffers.params]
        self._has_states = [False] * len(buffers.params)
        # Parameters whose states the rule itself fills, as it does at its first update.
        self._needs_init_state: set[int] = set()
        self.pieces = shard.pieces(self.memory.block)
        self._segments: dict[int, list[Segment]] = {}
        for segment in shard.segments:
            self._segments.setdefault(segment.slot.index, []).append(segment)
        self._cuts: dict[int, list[Segment]] = {}
        for piece in self.pieces:
            for segment in piece.segments:
                self._cuts.setdefault(segment.slot.index, []).append(segment)
        self._views: dict[tuple[int, ...], ParameterView] = {}

    def fill_masters(self, indices: Collection[int] | None = None) -> None:
        """Gives masters that need values at any time those of the parameters: all, or of slots."""
        if self.seen_as is not None:
            for segment in self.shard.segments:
                if indices is None or segment.slot.index in indices:
                    self.states[MASTER][segment.range_s] = self.buffers.flat[segment.range_f]

    def follow_parameters(self) -> None:
        """Takes over into such masters what somebody has written to the parameters."""
        if self.seen_as is not None:
            self.buffers.adopt()
            master, flat, empty = self.states[MASTER], self.buffers.flat, self.memory.empty
            for segment in self.shard.segments:
                follow(master[segment.range_s], flat[segment.range_f], self.seen_as, empty)

    def round_parameters(self) -> None:
        """Rounds parameters that all ranks have written to, to what they are seen as."""
        self.follow_parameters()
        if self.seen_as is not None:
            round_to(self.seen_as, self.buffers.flat, self.buffers.flat)

    def adopt_whole_states(self) -> None:
        """Keeps this rank's part of the states that the rules have now, and frees the whole ones.

        To be called when the parameters have their values.
        """
        for index in indices_of_rules_with_states(self.buffers.params):
            rule = self.buffers.params[index].update_rule
            if rule.state is not None:
                self._rules[index] = rule
            self._adopt_whole_states_of(self.layout.slots[index], rule)

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(state.nbytes for state in self.states.values())

    def owned(self, index: int) -> Sequence[Segment]:
        """The segments of the slot of that index which this rank owns."""
        return self._segments.get(index, ())

    def owned_in_pieces(self, index: int) -> Sequence[Segment]:
        """The same, as they are cut in ``pieces``."""
        return self._cuts.get(index, ())

    def has_states_of(self, index: int) -> bool:
        """Whether the slot of that index has states of the rule that its parameter has now."""
        return self._has_states[index] and (
            self.buffers.params[index].update_rule is self._rules[index]
        )

    @property
    def have_states(self) -> list[bool]:
        """The same of all slots."""
        now = zip(self._has_states, self.buffers.params, self._rules, strict=True)
        return [has and param.update_rule is rule for has, param, rule in now]

    def has_arrays_of(self, index: int) -> Set[str]:
        """The names of the arrays in `states` that hold something of the slot of that index."""
        return self.states.keys() if self.has_states_of(index) else self.always_there

    @property
    def always_there(self) -> Set[str]:
        """The names of the arrays that hold something of all slots at any time."""
        names = set() if self.seen_as is None else {MASTER}
        return names | ({IN_FLIGHT} & self.states.keys())

    def write_state(self, name: str, index: int, start_p: int, values: np.ndarray) -> None:
        """Overwrites a state of a parameter from ``start_p`` on, as far as this rank owns it."""
        for mine in self.owned(index):
            low_p, high_p = max(mine.start_p, start_p), min(mine.stop_p, start_p + values.size)
            if low_p < high_p:
                low_s = mine.start_s + (low_p - mine.start_p)
                target = self.states[name][low_s:][: high_p - low_p]
                assign(target, values[low_p - start_p :][: high_p - low_p])
        if name not in self.always_there:
            self._has_states[index] = True

    def replace_block(self, block: np.ndarray) -> None:
        """Overwrites all states; see `smorms3_dist.sharding.states.States.replace_block`."""
        self.states.replace_block(block)
        self._views.clear()

    def mark_filled(self, rules_now: Mapping[int, chainer.UpdateRule | None]) -> None:
        """Notes that the states of slots are there, and are those of the rules they have now."""
        for index, rule in rules_now.items():
            self._rules[index] = rule
            self._has_states[index] = True
        self._needs_init_state.difference_update(rules_now)
        forget_states(filter(None, rules_now.values()))

    def values(self, segment: Segment) -> np.ndarray:
        """What is updated of a segment: the masters, if there are, else the parameter itself."""
        if MASTER in self.states:
            return self.states[MASTER][segment.range_s]
        return self.buffers.flat[segment.range_f]

    def _start_afresh(self, index: int) -> None:
        for segment in self.owned(index):
            if MASTER in self.states and self.seen_as is None:
                self.states[MASTER][segment.range_s] = self.buffers.flat[segment.range_f]
            if self.plan.kind is rules.Kind.FUSED:
                for name, _ in self.plan.states:
                    self.states[name][segment.range_s] = _INITIAL.get(name, 0)
        self._needs_init_state.add(index)
        self._has_states[index] = True

    def _adopt_whole_states_of(self, slot: Slot, rule: chainer.UpdateRule) -> None:
        """Keeps this rank's part of the states that a rule has, and frees the whole ones.

        A rule has states if it was used, or loaded, outside of this class.
        """
        whole = {} if rule.state is None else dict(rule.state)
        names = [name for name, _ in self.plan.states]
        master = master_of(rule)
        if master is not None:
            whole[MASTER] = master
            if self.seen_as is not None and np.size(master) == slot.size:
                self.write_state(MASTER, slot.index, 0, master.ravel())
                set_master(rule, None)
        if rule.state is None or any(name not in whole for name in names):
            return
        for name in names:
            if np.size(whole[name]) != slot.size:
                raise ValueError(
                    f"the state {name} of parameter {slot.name} has shape {np.shape(whole[name])},"
                    f" but the parameter has shape {slot.shape}; it belongs to another model"
                )
        self._start_afresh(slot.index)
        self._needs_init_state.discard(slot.index)
        for name in self.states.keys() & whole.keys():
            self.write_state(name, slot.index, 0, whole[name].ravel())
        set_state(rule, None)
        set_master(rule, None)
