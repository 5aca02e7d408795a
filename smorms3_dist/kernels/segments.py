"""The fused update of many segments: by runs on CPUs, by one launch of a table on GPUs.

An update takes the place of hooks, too: see `CommonSettings`. It applies any formula of
`smorms3_dist.kernels.chainer_rules`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from smorms3_dist.kernels import reference, selection, tables
from smorms3_dist.kernels.chainer_rules import SMORMS3, Constants, Formula
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.narrow import is_rounded, round_to
from smorms3_dist.kernels.operations import (
    Operation,
    OperationKind,
    Operations,
    apply,
    sees_parameters,
)
from smorms3_dist.layout import Segment

import numpy as np

MASTER = "fp32_param"
"""The name under which the masters stand beside the states: in float32, but for float64."""

_FOLLOWED = 1 << 15
"""Elements."""


class CommonSettings(NamedTuple):
    """What a fused update does in the place of the optimizer's hooks.

    Attributes:
        operations: What is done to all gradients alike, before the division by the loss scale; on a
            GPU one decay at most.
        first: What is done before to the gradients of single parameters, by name; nothing on a GPU.
        last: What is done after to those of single parameters, by name, in the place of the
            division by the loss scale and of their rules' hooks; nothing on a GPU.
        clip: On a GPU, a number there that gradients are multiplied by first, unless it is 1 or
            more; or ``None``.
        skip: A number on the GPU that keeps the update from doing anything unless it is 0; or
            ``None``.
    """

    operations: Operations = ()
    first: Mapping[str, Operations] = types.MappingProxyType({})
    last: Mapping[str, Operations] = types.MappingProxyType({})
    clip: Any | None = None
    skip: Any | None = None

    def of(self, name: str) -> Operations:
        """What is done to the gradient of one parameter."""
        return self.first.get(name, ()) + self.operations + self.last.get(name, ())

    @property
    def are_alike(self) -> bool:
        """Whether the same is done to all parameters."""
        return not (self.first or self.last)

    def on_host(self) -> CommonSettings | None:
        """The settings with the numbers that are on a GPU read, which waits for it.

        Returns:
            Settings without such numbers; or ``None`` if nothing is to be done at all.
        """
        if self.skip is not None and self.skip.get().item() != 0:
            return None
        factor = 1.0 if self.clip is None else self.clip.get().item()
        scaling = () if factor >= 1 else (Operation(OperationKind.SCALE, factor),)
        return CommonSettings(scaling + self.operations, self.first, self.last)


class ParameterSettings(NamedTuple):
    """How one parameter is updated in this step.

    Attributes:
        formula: What is done with each element; ``None`` if the rule's own code does it.
        constants: The constants of the formula, for each time.
        loss_scale: What gradients are divided by first, or ``None``.
        times: How often the update is applied: once for each path by which the link reaches the
            parameter.
        operations: What is done to the gradient after the division by the loss scale, in the place
            of hooks of the rule; on a GPU one decay at most.
        first: What is done to the gradient before all else: see `CommonSettings`.
    """

    formula: Formula | None
    constants: tuple[Constants, ...]
    loss_scale: float | None
    times: int
    operations: Operations = ()
    first: Operations = ()

    @property
    def own_operations(self) -> Operations:
        """The division by the loss scale, and the operations after it."""
        if self.loss_scale is None:
            return self.operations
        return Operation(OperationKind.DIVIDE, self.loss_scale), *self.operations


States = Mapping[str, Any]
Items = Sequence[tuple[Segment, ParameterSettings]]
Run = tuple[Segment, Segment, ParameterSettings]
"""The first and the last segment of a range without gaps, which are updated alike."""


class HostUpdate:
    """Updates in host memory: neighbours that touch and share settings are one kernel call."""

    def __init__(self, dtype: np.dtype, rank: int, seen_as: np.dtype | None = None) -> None:
        self._compiled = selection.compiled_update(dtype, rank)
        self._seen_as = seen_as

    def applies(self, formula: Formula) -> bool:
        """Whether a formula can be applied here; if not, the rule's own code has to run."""
        return self._compiled is not None or formula == SMORMS3

    def update(
        self, flat: Any, states: States, items: Items, mean: Mean, base: int, common: CommonSettings
    ) -> None:
        """Updates segments of a piece in place.

        Args:
            flat: The parameters' flat buffer.
            states: The states of the formulas and perhaps `MASTER`, in shard coordinates.
            items: The segments that are updated, in order, and how.
            mean: The mean gradients of the piece; not written to. In the dtype of the parameters or
                of the update.
            base: The start of the piece, in shard coordinates.
            common: The settings of all parameters; nothing is skipped in host memory.
        """
        self.update_runs(flat, states, _runs(items), mean, base, common)

    def update_runs(
        self,
        flat: Any,
        states: States,
        runs: Iterable[Run],
        mean: Mean,
        base: int,
        common: CommonSettings,
    ) -> None:
        """Updates ranges that each are one kernel call; see `update`."""
        assert common.clip is None and common.skip is None
        master = states.get(MASTER)
        for first, last, settings in runs:
            formula = settings.formula
            assert formula is not None
            shard = slice(first.start_s, last.stop_s)
            written = flat[first.start_f : last.stop_f]
            param = written if master is None else master[shard]
            part = mean.part(shard.start - base, shard.stop - base)
            own = [states[name][shard] for name in formula.states]
            if self._compiled is not None:
                before, operations = settings.first + common.operations, settings.own_operations
                # The loop knows masters alone, and hooks of the optimizer see what they round to.
                sees_others = written is not param and sees_parameters(before)
                if written.dtype == param.dtype and not sees_others:
                    operations = before + operations
                else:
                    part = _in_dtype(_treated(part, written, before), param.dtype)
                for constants in settings.constants:
                    self._compiled(formula, param, part, own, constants, operations)
            else:
                part = prepared(part, written, param, settings, common)
                for _, lr, eps in settings.constants:
                    reference.smorms3(param, part, own, lr, eps)
            if master is not None:
                round_into(written, param, self._seen_as)


class CudaUpdate:
    """Updates on a GPU: one launch a formula for any number of segments; nothing waits for it."""

    def __init__(self, launcher: tables.KernelLauncher) -> None:
        self._launcher = launcher
        self._tables: dict[
            tuple[int, Formula, Segment, int], tuple[list[Segment], tables.UpdateTable]
        ] = {}

    @staticmethod
    def applies(formula: Formula, dtype: np.dtype) -> bool:
        """Whether an update in a dtype applies a formula; if not, the rule's own code has to run.

        In float16 Chainer's rules differ in what they compute in it, and only SMORMS3's does so all
        the way.
        """
        return dtype != np.float16 or formula == SMORMS3

    def load(self, formula: Formula, param: np.dtype, grad: np.dtype, state: np.dtype) -> None:
        """Makes the kernel ready that updates arrays of these dtypes."""
        self._launcher.load(tables.name_of_update(formula, param, grad, state))

    def update(
        self, flat: Any, states: States, items: Items, mean: Mean, base: int, common: CommonSettings
    ) -> None:
        """See `HostUpdate.update`."""
        assert mean.second is None
        self._update(flat, states, items, base, common, mean)

    def update_apart(
        self,
        flat: Any,
        states: States,
        items: Items,
        gradients: Sequence[Any],
        common: CommonSettings,
    ) -> None:
        """As `update`, for segments of a shard whose mean gradients are read where they lie.

        The gradients, one for each item, have the segments' sizes and the parameters' dtype.
        """
        self._update(flat, states, items, 0, common, gradients)

    def _update(
        self,
        flat: Any,
        states: States,
        items: Items,
        base: int,
        common: CommonSettings,
        mean: Mean | Sequence[Any],
    ) -> None:
        # A parameter to which several paths lead is updated again.
        for turn in range(max((settings.times for _, settings in items), default=0)):
            for formula, chosen in _by_formula(items, turn):
                own = [items[index] for index in chosen]
                table = self._table(formula, [segment for segment, _ in own], base)
                table.set_rates(
                    [tables.Rates(s.constants[turn], _decay(s.operations)) for _, s in own]
                )
                decay, scale = _decay(common.operations), own[0][1].loss_scale
                scale = 1.0 if scale is None else scale
                grad = mean.first if isinstance(mean, Mean) else None
                factor = mean.scale if isinstance(mean, Mean) else 1.0
                arrays = tables.Arrays(
                    flat, grad, [states[n] for n in formula.states], states.get(MASTER)
                )
                how = tables.Preparation(factor, common.clip, decay, scale, common.skip)
                if isinstance(mean, Mean):
                    table.update(arrays, how)
                else:
                    table.update_apart(arrays, [mean[index] for index in chosen], how)

    def _table(self, formula: Formula, segments: list[Segment], base: int) -> tables.UpdateTable:
        # Hundreds of segments are compared, by identity, in less time than they are hashed.
        key = base, formula, segments[0], len(segments)
        known, table = self._tables.get(key, (None, None))
        if table is None or known != segments:
            runs = [tables.Run(s.start_f, s.start_s - base, s.start_s, s.size) for s in segments]
            table = tables.UpdateTable(self._launcher, formula, runs)
            self._tables[key] = segments, table
        return table


def _by_formula(items: Items, turn: int) -> list[tuple[Formula, list[int]]]:
    """The items that are updated in a turn, by their numbers.

    Rules of one class may have several formulas, by their hyperparameters.
    """
    found: list[tuple[Formula, list[int]]] = []
    for index, (_, settings) in enumerate(items):
        if settings.times > turn:
            formula = settings.formula
            assert formula is not None
            for other, chosen in found:
                if formula is other or formula == other:
                    chosen.append(index)
                    break
            else:
                found.append((formula, [index]))
    return found


def _decay(operations: Operations) -> float | None:
    """The rate of a decay, which is all that there may be."""
    for kind, rate, _ in operations:
        assert kind is OperationKind.DECAY and len(operations) == 1
        return float(rate)
    return None


def prepared(
    mean: Mean, written: Any, param: Any, settings: ParameterSettings, common: CommonSettings
) -> Mean:
    """The mean gradient as a rule has to see it, after all that stands in the place of hooks.

    Args:
        mean: The mean gradient, not written to.
        written: The parameters.
        param: What is updated of them: their masters, or themselves.
        settings: How they are updated.
        common: How all are, besides.

    Returns:
        It in the dtype of the update.
    """
    before = settings.first + common.operations
    mean = _in_dtype(_treated(mean, written, before), param.dtype)
    return _treated(mean, param, settings.own_operations)


def _treated(mean: Mean, values: Any, operations: Operations) -> Mean:
    """The mean after operations, evaluated if there are any."""
    if not operations:
        return mean
    grad = mean.evaluated()
    if grad is mean.first:
        grad = grad.copy()
    apply(operations, grad, values)
    return Mean(grad)


def _in_dtype(mean: Mean, dtype: np.dtype) -> Mean:
    # Rounded to the narrow dtype first, as Chainer's mean is.
    return mean if mean.first.dtype == dtype else Mean(mean.evaluated().astype(dtype))


def round_into(flat: Any, master: Any, seen_as: np.dtype | None = None) -> None:
    """Writes masters into parameters; what is beyond their range becomes inf.

    Args:
        flat: The parameters, float16; or in the masters' dtype, with values of a narrower one.
        master: Their masters.
        seen_as: That narrower dtype.
    """
    if seen_as is not None:
        round_to(seen_as, master, flat)
        return
    with np.errstate(over="ignore"):
        flat[...] = master


def follow(master: Any, values: Any, seen_as: np.dtype | None, empty: Callable[..., Any]) -> None:
    """Makes those masters that do not round to the values of parameters these values.

    Args:
        master: The masters, one-dimensional.
        values: What somebody may have written to the parameters.
        seen_as: As for `round_into`.
        empty: Allocates what is rounded, given size, dtype and what it is for.
    """
    if seen_as is not None and is_rounded(seen_as, master, values):
        return
    bits = np.dtype(f"u{values.itemsize}")
    scratch = empty(min(values.size, _FOLLOWED), values.dtype, "rounded masters")
    for start in range(0, values.size, _FOLLOWED):
        wide, seen = master[start : start + _FOLLOWED], values[start : start + _FOLLOWED]
        expected = scratch[: seen.size]
        round_into(expected, wide, seen_as)
        # By bits: -0.0 is not 0.0, and nan is nan.
        differs = expected.view(bits) != seen.view(bits)
        if differs.any():
            np.copyto(wide, seen, where=differs)


def _runs(items: Items) -> Iterator[Run]:
    """The longest ranges without gaps that have the same settings."""
    start = 0
    for index, (last, settings) in enumerate(items, 1):
        if index < len(items):
            following, then = items[index]
            if _touch(last, following) and then == settings:
                continue
        yield items[start][0], last, settings
        start = index


def touching(segments: Iterable[Segment]) -> list[list[Segment]]:
    """The segments of the longest ranges without gaps."""
    ranges: list[list[Segment]] = []
    for segment in segments:
        if ranges and _touch(ranges[-1][-1], segment):
            ranges[-1].append(segment)
        else:
            ranges.append([segment])
    return ranges


def _touch(segment: Segment, following: Segment) -> bool:
    return segment.stop_s == following.start_s and segment.stop_f == following.start_f
