"""The fused SMORMS3 update of many segments: by runs on CPUs, by one launch of a table on GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from smorms3_dist.kernels import selection, tables
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import Segment

import numpy as np

MASTER = "fp32_param"
"""The name under which the fp32 masters stand beside the states."""


class CommonSettings(NamedTuple):
    """What a fused update does to all parameters alike, in the place of hooks, in this order.

    Attributes:
        clip: A number on the device that gradients are multiplied by unless it is 1 or more; or
            ``None``.
        decay: What parameters are multiplied by, before they are added to the gradients.
        skip: A number on the device that keeps the update from doing anything unless it is 0; or
            ``None``.
    """

    clip: Any | None = None
    decay: float = 0.0
    skip: Any | None = None


class ParameterSettings(NamedTuple):
    """How one parameter is updated in this step.

    Attributes:
        lr: Largest step of SMORMS3; 0 for other rules, which read their hyperparameters themselves.
        eps: Added to the denominators of SMORMS3; 0 likewise.
        loss_scale: What gradients are divided by first, or ``None``.
        times: How often the update is applied: once for each path by which the link reaches the
            parameter.
        decay: A weight decay of its own, after the division by the loss scale.
    """

    lr: float
    eps: float
    loss_scale: float | None
    times: int
    decay: float = 0.0


States = Mapping[str, Any]
Items = Sequence[tuple[Segment, ParameterSettings]]


class HostUpdate:
    """Updates in host memory: neighbours that touch and share settings are one kernel call."""

    def __init__(self, dtype: np.dtype, rank: int) -> None:
        self._kernel = selection.select_kernel(dtype, rank)

    def update(
        self, flat: Any, states: States, items: Items, mean: Mean, base: int, common: CommonSettings
    ) -> None:
        """Updates segments of a piece in place.

        Args:
            flat: The parameters' flat buffer.
            states: ``mem``, ``g``, ``g2`` and perhaps `MASTER`, in shard coordinates.
            items: The segments that are updated, in order, and how.
            mean: The mean gradients of the piece; not written to. In the dtype of the parameters or
                of the update.
            base: The start of the piece, in shard coordinates.
            common: The settings of all parameters; in host memory nothing but a decay.
        """
        assert common.clip is None and common.skip is None
        master = states.get(MASTER)
        for first, last, settings in _runs(items):
            shard = slice(first.start_s, last.stop_s)
            written = flat[first.start_f : last.stop_f]
            param = written if master is None else master[shard]
            part = mean.part(shard.start - base, shard.stop - base)
            part = _decayed(part, written, common.decay)
            part = unscaled(part, param.dtype, settings.loss_scale)
            part = _decayed(part, param, settings.decay)
            own = [states[name][shard] for name in ("mem", "g", "g2")]
            for _ in range(settings.times):
                self._kernel(param, part, own, settings.lr, settings.eps)
            if master is not None:
                round_into(written, param)


class CudaUpdate:
    """Updates on a GPU: one launch for any number of segments; nothing waits for the GPU."""

    def __init__(self, launcher: tables.KernelLauncher) -> None:
        self._launcher = launcher
        self._tables: dict[tuple[int, tuple[Segment, ...]], tables.UpdateTable] = {}

    def update(
        self, flat: Any, states: States, items: Items, mean: Mean, base: int, common: CommonSettings
    ) -> None:
        """See `HostUpdate.update`."""
        arrays = tables.Arrays(
            flat, mean.first, states["mem"], states["g"], states["g2"], states.get(MASTER)
        )
        assert mean.second is None
        # A parameter to which several paths lead is updated again.
        for turn in range(max((settings.times for _, settings in items), default=0)):
            again = [item for item in items if item[1].times > turn]
            table = self._table(tuple(segment for segment, _ in again), base)
            table.set_rates([tables.Rates(s.lr, s.eps, s.decay) for _, s in again])
            clip, decay, skip = common
            scale = again[0][1].loss_scale
            scale = 1.0 if scale is None else scale
            table.update(arrays, tables.Preparation(mean.scale, clip, decay, scale, skip))

    def _table(self, segments: tuple[Segment, ...], base: int) -> tables.UpdateTable:
        key = base, segments
        table = self._tables.get(key)
        if table is None:
            runs = [tables.Run(s.start_f, s.start_s - base, s.start_s, s.size) for s in segments]
            table = self._tables[key] = tables.UpdateTable(self._launcher, runs)
        return table


def unscaled(mean: Mean, dtype: np.dtype, loss_scale: float | None) -> Mean:
    """The mean in the dtype of the update, without the loss scale."""
    if mean.first.dtype != dtype:
        # Rounded to the narrow dtype first, as Chainer's mean is.
        mean = Mean(mean.evaluated().astype(dtype))
    return mean if loss_scale is None else mean.divided_by(loss_scale)


def _decayed(mean: Mean, values: Any, rate: float) -> Mean:
    """The mean with the values times a rate added, as Chainer's weight decay adds them."""
    if not rate:
        return mean
    with np.errstate(all="ignore"):
        return Mean(mean.evaluated() + values.dtype.type(rate) * values)


def round_into(flat: Any, master: Any) -> None:
    """Writes fp32 masters into float16 parameters; what is beyond their range becomes inf."""
    with np.errstate(over="ignore"):
        flat[...] = master


def _runs(items: Items) -> Iterator[tuple[Segment, Segment, ParameterSettings]]:
    """First and last segments of the longest ranges without gaps that have the same settings."""
    start = 0
    for index, (last, settings) in enumerate(items, 1):
        if index < len(items):
            following, then = items[index]
            touches = last.stop_s == following.start_s
            if touches and last.stop_f == following.start_f and then == settings:
                continue
        yield items[start][0], last, settings
        start = index
