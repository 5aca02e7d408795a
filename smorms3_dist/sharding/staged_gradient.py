"""The mean gradient of a shard, kept whole while hooks run on it.

Where no hook and no check wants it, a gradient is used for the update piece by piece and never
kept. Otherwise it is staged here, 1/N of the gradients on each rank, and hooks are given parameters
that are views of it and of the flat buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from smorms3_dist.hooks.parts import Part, Values
from smorms3_dist.hooks.views import ParameterView
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.segments import MASTER
from smorms3_dist.kernels.tables import GradientCheck
from smorms3_dist.layout import Piece, Segment, Shard
from smorms3_dist.sharding.group import ShardedGroup, in_shape

import numpy as np


class StagedGradient:
    """The mean gradient of one group's shard.

    Attributes:
        group: The parameters whose gradient it is.
        grad: The gradient in shard coordinates, in the dtype of the parameters.
    """

    def __init__(self, group: ShardedGroup) -> None:
        self.group = group
        dtype = group.dtype
        self.grad = group.memory.zeros(
            group.shard.size, dtype, f"the shard's mean gradient in {dtype}"
        )
        self._wide: np.ndarray | None = None
        self._check: GradientCheck | None = None
        self._views = {
            segment: ParameterView(
                in_shape(self._parameter(segment), segment),
                None,
                group.buffers.params[segment.slot.index],
            )
            for piece in group.pieces
            for segment in piece.segments
        }

    def store_piece(self, piece: Piece, mean: Mean) -> None:
        """Takes the mean of a piece: a `smorms3_dist.collectives.base.Consume`."""
        mean.evaluate(self.grad[piece.range_s])

    def read_parameters(self) -> None:
        """Copies this rank's part of the whole gradients that the parameters hold."""
        buffers = self.group.buffers
        with buffers.gradients():
            for segment in self.group.shard.segments:
                grad = buffers.gradient(segment)
                assert grad is not None
                self.grad[segment.range_s][...] = grad

    def show_in_parameters(self) -> None:
        """Copies the gradient into its place in the buffer of whole gradients."""
        flat_grad = self.group.buffers.flat_grad
        for segment in self.group.shard.segments:
            flat_grad[segment.range_f] = self.grad[segment.range_s]

    def not_finite(self) -> Iterator[str]:
        """Names of the parameters in whose segments here a gradient is infinite or nan."""
        pieces = (self.grad[piece.range_s] for piece in self.group.pieces)
        if not all(np.isfinite(piece).all() for piece in pieces):
            shard = self.group.shard
            yield from names_not_finite(shard, (self.grad[s.range_s] for s in shard.segments))

    def norm_and_nonfinite(self) -> Any:
        """Finds the norm, and what is not finite, on a GPU; nothing waits for it.

        Returns:
            The sum of squares and the number of elements that are not finite: float64 there.
        """
        if self._check is None:
            launcher = self.group.memory.launcher
            assert launcher is not None
            self._check = GradientCheck(launcher, [self.grad.size])
        self._check.run([self.grad], self.grad.dtype)
        return self._check.result

    def parts(self, loss_scale: float | None) -> Iterator[Part]:
        """The parameters as hooks of the optimizer see them."""
        for segment, view in self._views.items():
            view.param.update_rule = self.group.buffers.params[segment.slot.index].update_rule
            view.show(in_shape(self.grad[segment.range_s], segment), loss_scale)
        yield from self._parts(self._views, self._parameter, self.grad)

    def unscaled(self, loss_scale: float | None, again: bool) -> np.ndarray:
        """The gradient as update rules see it, in the dtype of the update.

        As in Chainer, parameters with fp32 masters keep the scaled gradient, and others do not.

        Args:
            loss_scale: What the gradients have been multiplied by.
            again: Whether this step has asked before.
        """
        grad = self.grad
        if MASTER in self.group.states:
            wide = self.group.plan.dtype
            if self._wide is None:
                self._wide = self.group.memory.empty(
                    grad.size, wide, f"the shard's mean gradient in {wide}"
                )
            grad = self._wide
            grad[...] = self.grad
            again = False
        if loss_scale is not None and not again:
            with np.errstate(all="ignore"):
                for segment in self.group.shard.segments:
                    if self.group.is_updated(segment.slot.index):
                        part = grad[segment.range_s]
                        np.divide(part, part.dtype.type(loss_scale), out=part)
        return grad

    def parts_of_rules(self, grad: np.ndarray, loss_scale: float | None) -> Iterator[Part]:
        """The parameters that are updated in this turn, as hooks of update rules see them.

        ``grad`` is what `unscaled` gave.
        """
        scale = None if MASTER in self.group.states else loss_scale
        views = {segment: self.group.view(segment) for segment in self._views}
        for segment, view in views.items():
            view.show(in_shape(grad[segment.range_s], segment), scale)
        parts = self._parts(views, self.group.values, grad)
        for (slot, _), part in zip(self.group.parameters(), parts, strict=True):
            if self.group.is_updated(slot.index):
                yield part

    def _parts(
        self,
        views: Mapping[Segment, ParameterView],
        values: Callable[[Segment], np.ndarray],
        grad: np.ndarray,
    ) -> Iterator[Part]:
        group = self.group
        for slot, param in group.parameters():
            yield Part(
                slot.name,
                param.update_rule,
                [views[segment] for segment in group.owned_in_pieces(slot.index)],
                [Values(values(s), grad[s.range_s]) for s in group.owned(slot.index)],
                group.layout.segments[slot.index],
                None if group.memory.launcher is not None else grad.dtype,
            )

    def _parameter(self, segment: Segment) -> np.ndarray:
        return self.group.buffers.flat[segment.range_f]


def names_not_finite(shard: Shard, grads: Iterable[np.ndarray]) -> list[str]:
    """Names, sorted, of the parameters in whose segments a gradient is infinite or nan."""
    pairs = zip(shard.segments, grads, strict=True)
    return sorted({segment.slot.name for segment, grad in pairs if not np.isfinite(grad).all()})
