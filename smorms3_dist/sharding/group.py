"""The update of a shard: how each parameter is updated in a step, and by whom.

A parameter's hyperparameters are read from its own update rule at each step, as Chainer does. Rules
that have a formula are updated by the fused update; others run their own code on segments.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smorms3_dist.chainer_internals.optimizers import RuleWatch
from smorms3_dist.collectives.base import Collectives, Consume, Gradients
from smorms3_dist.hooks.recognition import operations_of
from smorms3_dist.hooks.views import ParameterView
from smorms3_dist.kernels import tables
from smorms3_dist.kernels.chainer_rules import (
    SMORMS3,
    Application,
    application_of,
    count_on,
)
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.operations import Operations
from smorms3_dist.kernels.segments import (
    MASTER,
    CommonSettings,
    CudaUpdate,
    HostUpdate,
    ParameterSettings,
    prepared,
    round_into,
    touching,
)
from smorms3_dist.layout import ALIGNMENT, Piece, Segment, Shard, Slot
from smorms3_dist.sharding import rules
from smorms3_dist.sharding.buffers import FlatBuffers
from smorms3_dist.sharding.elementwise import run_rule, run_rules_on_nothing, runs_of
from smorms3_dist.sharding.owned_states import OwnedStates
from smorms3_dist.sharding.states import IN_FLIGHT

import chainer
import numpy as np

_logger = logging.getLogger(__name__)


class ShardedGroup(OwnedStates):
    """The parameters of one group, and the update of this rank's shard of them."""

    def __init__(
        self, buffers: FlatBuffers, shard: Shard, plan: rules.Plan, late: bool = False
    ) -> None:
        super().__init__(buffers, shard, plan, late)
        self._fused = self._make_fused()
        # Of the rules, when nothing sets them apart: see `start_step`.
        self._watch = RuleWatch()
        # Whether the rules are alike in what they have counted, too.
        self._same_counts = False
        self._settings: list[ParameterSettings | None] = [None] * len(buffers.params)
        self._times = [0] * len(buffers.params)
        # What the last step was told of how often parameters are updated, while the rules are the
        # same, and what that is.
        self._times_told: Mapping[str, int] = {}
        self._counts: set[int] = set()
        # Whether nothing sets the parameters apart in this step.
        self._alike = False
        # How all are updated in this step by the fused update, if they are alike.
        self._told: ParameterSettings | None = None
        # The largest gap in a run that a rule's own code is given: none holds a parameter.
        on_gpu = self.memory.launcher is not None
        self._reach = ALIGNMENT // self.dtype.itemsize - 1 if on_gpu else -1
        self._ranges: dict[tuple[int, int], list[tuple[Segment, Segment]]] = {}
        # What the rules counted besides ``t`` before a step that the device may skip.
        self._progress: list[dict[str, int | float]] = []
        # What the update does in the place of hooks; ``None`` if these are called.
        self._common: CommonSettings | None = None
        self._kinds: list[tuple[Any, int, type | None]] = [(None, 0, None)] * len(buffers.params)
        self._has_axes = {bool(slot.shape) for slot in self.layout.slots}

    def __getstate__(self) -> dict[str, Any]:
        # Views into the buffers would be copied as arrays of their own; compiled kernels stay here.
        return {**self.__dict__, "_views": {}, "_fused": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fused = self._make_fused()

    def _make_fused(self) -> HostUpdate | CudaUpdate | None:
        if self.plan.kind is not rules.Kind.FUSED:
            return None
        if self.memory.launcher is None:
            return HostUpdate(self.plan.dtype, self.shard.rank, self.seen_as)
        return CudaUpdate(self.memory.launcher)

    def load_kernels(self) -> None:
        """Loads the kernels that a step launches on a GPU, as rules are now."""
        launcher = self.memory.launcher
        if launcher is None or self.plan.kind is rules.Kind.NONE:
            return
        for name in tables.names_of_check(self.dtype):
            launcher.load(name)
        if isinstance(self._fused, CudaUpdate):
            formulas = map(rules.formula_of, filter(None, self._rules))
            for formula in dict.fromkeys(formulas):
                if formula is not None and self._fused.applies(formula, self.plan.dtype):
                    self._fused.load(formula, self.dtype, self.dtype, self.plan.dtype)

    def start_step(self, times: Mapping[str, int], alike: bool | None = None) -> None:
        """Counts the step in the update rules' ``t``; their hooks may run then.

        A parameter whose rule has been replaced since the last step takes the states of the new
        one, which are fresh if that has none, as in Chainer. So does one whose rule has been given
        states, by a snapshot for instance. A parameter without a rule, or with a disabled one,
        stays as it is.

        Args:
            times: How often each parameter is updated in this step, by name; others are not.
            alike: Whether nothing sets the rules of the model apart, if it is known (see
                `RuleWatch.are_alike`). If so, no parameter has got another rule since a step that
                was given the same object as ``times``.
        """
        self._alike = self._start_alike(times, alike)
        if not self._alike:
            self._start_each(times)
        self.follow_parameters()

    def _start_each(self, times: Mapping[str, int]) -> None:
        for slot, param in self.parameters():
            index, rule = slot.index, param.update_rule
            if rule is not self._rules[index]:
                self._rules[index] = rule
                self._has_states[index] = False
            count = times.get(slot.name, 0) if rule is not None and rule.enabled else 0
            self._times[index] = count
            if not count:
                continue
            if rule.state is not None or not self._has_states[index]:
                self._adopt_whole_states_of(slot, rule)
            if not self._has_states[index]:
                self._start_afresh(index)
            rule.t += count

    def rules_are_alike(self) -> bool:
        """Whether nothing sets the present rules apart: see `RuleWatch.are_alike`."""
        rules_now = [param.update_rule for param in self.buffers.params]
        if None in rules_now:
            return False
        # Rules have no meaning of equality but identity.
        if rules_now != self._watch.rules:
            self._watch = RuleWatch(rules_now)
        return self._watch.are_alike()

    def _start_alike(self, times: Mapping[str, int], alike: bool | None) -> bool:
        """Starts a step in which nothing sets parameters apart; false if something does."""
        if times is not self._times_told or not alike:
            self._times_told = {}
            rules_now = [param.update_rule for param in self.buffers.params]
            # Rules have no meaning of equality but identity.
            if rules_now != self._rules or not all(self._has_states) or None in rules_now:
                return False
            if rules_now != self._watch.rules:
                self._watch = RuleWatch(rules_now)
            self._times_told = times
            self._counts = {times.get(slot.name, 0) for slot in self.layout.slots}
        (count, *other) = self._counts
        if other or not count or not (self._watch.are_alike() if alike is None else alike):
            return False
        self._same_counts = self._watch.add_to_counts(count)
        self._times = [count] * len(self._rules)
        return True

    def read_rules(
        self,
        loss_scale: float | None = None,
        common: CommonSettings | None = None,
        hooked: bool = False,
    ) -> None:
        """Reads what the update rules say of this step, when all hooks have run that come first.

        Args:
            loss_scale: What gradients are still to be divided by, or ``None``.
            common: What the update does in the place of all hooks, those of the rules included;
                ``None`` if these are called, or there are none.
            hooked: Whether hooks of rules may have run since the step was started.
        """
        self._common = common
        # A step that the device skips has changed nothing.
        skipping = common is not None and common.skip is not None
        known = self._rules if skipping else ()
        self._progress = [rules.progress_of(rule) for rule in known if rule]
        alike = self._alike and not hooked
        if self._fused is not None:
            alike = alike and self._has_axes == {True}
            alike = alike and rules.numbers_are_alike(self._watch.own, self._same_counts)
        self._told = None
        slots = self.layout.slots
        if not alike:
            for slot, rule, count in zip(slots, self._rules, self._times, strict=True):
                told = self._settings_of(rule, slot, loss_scale) if count else None
                self._settings[slot.index] = told
            return
        first, *others = self._rules
        told = self._settings_of(first, slots[0], loss_scale)
        self._settings = [told] * len(slots)
        if common is not None and common.first:
            self._settings = [told._replace(first=common.first.get(s.name, ())) for s in slots]
        if told.formula is not None:
            self._told = None if common is not None and common.first else told
            for rule in others if rules.has_progress(first) else ():
                count_on(rule, told.times)

    def _settings_of(
        self, rule: chainer.UpdateRule, slot: Slot, loss_scale: float | None
    ) -> ParameterSettings:
        """What a rule says of this step; powers that it keeps for itself count on."""
        times = self._times[slot.index]
        formula, constants = None, []
        # Each time has its own count.
        rule.t -= times
        for _ in range(times):
            rule.t += 1
            application = self._application(rule, slot)
            if application is not None:
                formula, numbers = application
                constants.append(numbers)
                count_on(rule, 1)
        fused = self.plan.kind is rules.Kind.FUSED
        operations: Operations = ()
        if self._common is not None and fused:
            last = self._common.last.get(slot.name)
            if last is not None:
                operations, loss_scale = last, None
            else:
                # Chainer's decay multiplies by the scale again, although it has been divided out.
                operations = operations_of(rule, None if MASTER in self.states else loss_scale)
        first = () if self._common is None else self._common.first.get(slot.name, ())
        return ParameterSettings(formula, tuple(constants), loss_scale, times, operations, first)

    def _application(self, rule: chainer.UpdateRule, slot: Slot) -> Application | None:
        """What the fused update does with a parameter in this step; ``None`` if nothing."""
        if self._fused is None:
            return None
        known, size, kind = self._kinds[slot.index]
        # A method that is put into a rule in the place of its class's makes it another kind.
        if known is not rule or size != len(vars(rule)):
            kind = rules.chainer_rule(rule)
            self._kinds[slot.index] = rule, len(vars(rule)), kind
        if kind is None:
            return None
        application = application_of(kind, rule, self.plan.dtype)
        if application is None:
            return None
        formula, constants = application
        if isinstance(self._fused, CudaUpdate):
            return application if self._fused.applies(formula, self.plan.dtype) else None
        if not self._fused.applies(formula):
            return None
        if formula == SMORMS3:
            return application
        # NumPy 1 computes with numbers, not with arrays, what Chainer does to a single one.
        if not slot.shape:
            return None
        if not all(type(constant) in (int, float) for constant in constants):
            if self.shard.rank == 0:
                _say_that_numbers_widen(type(rule).__name__, str(self.plan.dtype))
            return None
        return application

    def finish_step(self) -> None:
        """Lets rules that change themselves do so, alike on all ranks, whatever these own."""
        self._needs_init_state.clear()
        self._common = None
        if self._told is not None:
            return
        changing = [
            (rule, settings.times)
            for rule, settings in zip(self._rules, self._settings, strict=True)
            if rule is not None and settings is not None and settings.formula is None
            if rules.has_progress(rule)
        ]
        run_rules_on_nothing(changing, self.plan, self.memory)

    def undo_count(self) -> None:
        """Takes a step that the device has skipped out of what the rules count again."""
        for rule, count in zip(self._rules, self._times, strict=True):
            if rule is not None:
                rule.t -= count
        for rule, progress in zip(filter(None, self._rules), self._progress, strict=True):
            vars(rule).update(progress)

    def is_updated(self, index: int) -> bool:
        """Whether the slot of that index takes part in this step."""
        return bool(self._times[index])

    def updated_parameters(self) -> Iterator[chainer.Parameter]:
        """The parameters that take part in this step."""
        for param, count in zip(self.buffers.params, self._times, strict=True):
            if count:
                yield param

    def round_masters(self) -> None:
        """Writes the masters of what was updated into the parameters again, after hooks."""
        if MASTER in self.states:
            for segment in self.shard.segments:
                if self.is_updated(segment.slot.index):
                    master = self.states[MASTER][segment.range_s]
                    round_into(self.buffers.flat[segment.range_f], master, self.seen_as)

    def reduce(self, gradients: Gradients, collectives: Collectives, consume: Consume) -> None:
        """See `Group.reduce`: where they are applied late, those of the update before."""
        if IN_FLIGHT not in self.states:
            self.reduce_own(gradients, collectives, consume)
            return
        layout, rank = self.layout, self.shard.rank
        pieces: Sequence[Piece] = (
            collectives.pieces(layout)[rank]
            if layout.dense
            else [layout.piece_of_bucket(rank, index) for index in range(len(layout.buckets))]
        )
        for piece in pieces:
            consume(piece, Mean(self.states[IN_FLIGHT][piece.range_s]))

    def update_shard(self, grad: Any) -> None:
        """Updates the whole shard by its mean gradient, in the dtype of parameters or update."""
        for piece in self.pieces:
            self.update_piece(piece, Mean(grad[piece.range_s]))

    def update_segment(self, segment: Segment, grad: Any) -> None:
        """Updates a segment, or a part of one, by its mean gradient, flat."""
        self.update_piece(Piece(segment.start_s, segment.stop_s, (segment,)), Mean(grad))

    def update_piece(self, piece: Piece, mean: Mean) -> None:
        """Updates a piece of the shard: a `smorms3_dist.collectives.base.Consume`."""
        if self._told is not None and isinstance(self._fused, HostUpdate):
            self._update_alike(self._fused, piece, mean, self._told)
            return
        fused: list[tuple[Segment, ParameterSettings]] = []
        own: list[tuple[Segment, ParameterSettings]] = []
        common = self._common or CommonSettings()
        for segment in piece.segments:
            settings = self._settings[segment.slot.index]
            if settings is not None:
                (own if settings.formula is None else fused).append((segment, settings))
        if fused:
            assert self._fused is not None
            self._fused.update(self.buffers.flat, self.states, fused, mean, piece.start_s, common)
        told = common.on_host() if own else None
        if told is None or self.plan.kind is rules.Kind.NONE:
            return
        for segments, settings in runs_of(own, self._rules, self._needs_init_state, self._reach):
            begin, stop = segments[0].start_s, segments[-1].stop_s
            part = mean.part(begin - piece.start_s, stop - piece.start_s)
            written = self.buffers.flat[segments[0].start_f : segments[-1].stop_f]
            values = self.states[MASTER][begin:stop] if MASTER in self.states else written
            part = prepared(part, written, values, settings, told)
            self._run_rule(segments, part, settings)

    def update_by_own_gradients(self) -> bool:
        """Updates the shard of the only rank by its gradients, read where they lie on a GPU.

        Returns:
            Whether that could be done: by formulas alone, with all gradients there, and none in
            flight. Otherwise nothing has been done.
        """
        if IN_FLIGHT in self.states or not isinstance(self._fused, CudaUpdate):
            return False
        items = [
            (segment, settings)
            for segment in self.shard.segments
            if (settings := self._settings[segment.slot.index]) is not None
        ]
        if any(settings.formula is None for _, settings in items):
            return False
        with self.buffers.gradients():
            gradients = [self.buffers.gradient(segment) for segment, _ in items]
            if any(gradient is None for gradient in gradients):
                return False
            common = self._common or CommonSettings()
            self._fused.update_apart(self.buffers.flat, self.states, items, gradients, common)
        return True

    def update_by_whole_gradients(self) -> None:
        """Updates the shard by the mean gradients that parameters hold; those without stay."""
        common = self._common or CommonSettings()
        with self.buffers.gradients():
            segments = [segment for piece in self.pieces for segment in piece.segments]
            if isinstance(self._fused, CudaUpdate):
                # In one launch.
                fused = [
                    (segment, settings)
                    for segment in segments
                    if (settings := self._settings[segment.slot.index]) is not None
                    if settings.formula is not None and self.buffers.gradient(segment) is not None
                ]
                gradients = [self.buffers.gradient(segment) for segment, _ in fused]
                self._fused.update_apart(self.buffers.flat, self.states, fused, gradients, common)
                done = {segment for segment, _ in fused}
                segments = [segment for segment in segments if segment not in done]
            for segment in segments:
                grad = self.buffers.gradient(segment)
                if grad is not None:
                    self.update_segment(segment, grad)

    def _update_alike(
        self, fused: HostUpdate, piece: Piece, mean: Mean, told: ParameterSettings
    ) -> None:
        """Updates a piece in which nothing sets parameters apart: its ranges are always those."""
        key = piece.start_s, piece.stop_s
        if key not in self._ranges:
            self._ranges[key] = [(run[0], run[-1]) for run in touching(piece.segments)]
        runs = [(first, last, told) for first, last in self._ranges[key]]
        common = self._common or CommonSettings()
        fused.update_runs(self.buffers.flat, self.states, runs, mean, piece.start_s, common)

    def _run_rule(
        self, segments: Sequence[Segment], mean: Mean, settings: ParameterSettings
    ) -> None:
        """Runs the rules' own code on a segment, a part of one, or a run."""
        index = segments[0].slot.index
        rule = self._rules[index]
        assert rule is not None
        view = self.view(segments[0]) if len(segments) == 1 else self._view_of_run(segments)
        shard = slice(segments[0].start_s, segments[-1].stop_s)
        states = {name: self.states[name][shard] for name, _ in self.plan.states}
        run_rule(rule, view, mean, states, settings.times, index in self._needs_init_state)
        if MASTER in self.states:
            written = self.buffers.flat[segments[0].start_f : segments[-1].stop_f]
            round_into(written, view.array, self.seen_as)

    def _view_of_run(self, segments: Sequence[Segment]) -> ParameterView:
        first, last = segments[0], segments[-1]
        key = (first.slot.index, first.start_p, last.slot.index, last.stop_p)
        view = self._views.get(key)
        if view is None:
            masters = self.states.get(MASTER)
            flat = self.buffers.flat[first.start_f : last.stop_f]
            array = flat if masters is None else masters[first.start_s : last.stop_s]
            param = self.buffers.params[first.slot.index]
            view = self._views[key] = ParameterView(array, None, param)
        view.param.update_rule = self._rules[first.slot.index]
        return view

    def view(self, segment: Segment) -> ParameterView:
        """`values` of a segment, or of a part of one, as its update rule and its hooks see them."""
        key = (segment.slot.index, segment.start_p, segment.stop_p)
        view = self._views.get(key)
        if view is None:
            param = self.buffers.params[segment.slot.index]
            view = ParameterView(in_shape(self.values(segment), segment), None, param)
            self._views[key] = view
        view.param.update_rule = self._rules[segment.slot.index]
        return view


def in_shape(array: np.ndarray, segment: Segment) -> np.ndarray:
    """The values of a segment, in the parameter's shape if the segment is all of it."""
    return array.reshape(segment.slot.shape) if segment.size == segment.slot.size else array


@functools.cache
def _say_that_numbers_widen(rule: str, dtype: str) -> None:
    _logger.warning(
        "%s has hyperparameters that are NumPy's numbers and no Python floats: they widen its "
        "arithmetic, which its own code does, several times slower than the compiled one in %s. "
        "Give it Python floats",
        rule,
        dtype,
    )
