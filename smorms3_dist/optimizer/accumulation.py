"""Gradients of micro-batches, held back until one update takes their mean.

An update of k micro-batches is that of one batch k times as large, where the loss is a mean over
the batch: nothing is communicated before the last of them, and hooks, loss scale and ``t`` see one
update.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import chainer
import numpy as np


class _Held(NamedTuple):
    param: chainer.Parameter
    total: Any


class Accumulation:
    """Adds up the gradients of one rank.

    Sums of float16 are held in float32, and everything else in its own dtype: one more array for
    each parameter, from the first micro-batch of an update to the last.

    Args:
        micro_batches: How many make one update.
    """

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.count = 0
        self._held: dict[int, _Held] = {}
        self._holds_back = False
        self._loss_scale: float | None = None

    @contextlib.contextmanager
    def hold_back(self) -> Iterator[None]:
        """Lets all updates within the context add to the next one after it."""
        before, self._holds_back = self._holds_back, True
        try:
            yield
        finally:
            self._holds_back = before

    @property
    def is_next_held_back(self) -> bool:
        """Whether another micro-batch of the same update comes after the next."""
        return self._holds_back or self.count + 1 < self.micro_batches

    def add(self, params: Iterable[chainer.Parameter], loss_scale: float | None) -> None:
        """Takes the gradients of a micro-batch from the parameters, which have none then.

        Raises:
            RuntimeError: If the loss scale is not that of the micro-batches before.
        """
        if self.count and loss_scale != self._loss_scale:
            raise RuntimeError(
                f"the loss scale has become {loss_scale}, with gradients of {self.count} "
                f"micro-batches held that have {self._loss_scale}. Set it between two updates"
            )
        self._loss_scale = loss_scale
        self.count += 1
        for param in params:
            if param.array is None or param.grad is None:
                continue
            held = self._held.get(id(param))
            if held is not None:
                np.add(held.total, param.grad, out=held.total)
            elif param.dtype == np.float16:
                self._held[id(param)] = _Held(param, param.grad.astype(np.float32))
            else:
                # Others may see the gradient, as those who have summed up two branches do.
                self._held[id(param)] = _Held(param, param.grad.copy())
            param.grad = None

    def release(self) -> int:
        """Gives the parameters the means of all micro-batches; returns how many these are."""
        count = self.count
        for param, total in self._held.values():
            total /= count
            with np.errstate(over="ignore"):
                param.grad = total.astype(param.dtype, copy=False)
        self.count = 0
        self._held = {}
        return count

    def mean_with(self, param: chainer.Parameter, grad: Any | None) -> Any | None:
        """The gradient that `release` is going to give a parameter, bit for bit, in a new array.

        Args:
            param: The parameter.
            grad: Its gradient of the last micro-batch, which has not been added yet.
        """
        if not self.count:
            return grad
        held = self._held.get(id(param))
        if held is not None:
            total = held.total.copy() if grad is None else held.total + grad
        elif grad is not None:
            total = grad.astype(np.float32 if param.dtype == np.float16 else param.dtype)
        else:
            return None
        total /= self.count + 1
        with np.errstate(over="ignore"):
            return total.astype(param.dtype, copy=False)

    def refuse_unfinished(self, occasion: str) -> None:
        """Refuses what must not happen between two micro-batches of one update.

        Raises:
            RuntimeError: If there are gradients of any.
        """
        if self.count:
            raise RuntimeError(
                f"{occasion} comes after {self.count} micro-batches of an update that is not made "
                "yet: their gradients would be lost. Make the update first"
            )


def make_iterations_of(updater: Any, micro_batches: int) -> None:
    """Lets one iteration of an updater take several micro-batches, once for an updater.

    What it reports of them is averaged.

    Raises:
        RuntimeError: If it has no ``update_core`` that takes one batch.
    """
    if updater in _updaters:
        return
    core = getattr(updater, "update_core", None)
    if core is None:
        raise RuntimeError(
            f"{type(updater).__name__} has no update_core(), so accumulate={micro_batches} cannot "
            "make an iteration of that many batches. Use optimizer.accumulate() in its update()"
        )

    def update_core() -> None:
        try:
            reporter = chainer.reporter.get_current_reporter()
        except IndexError:
            # Nobody listens.
            reporter = chainer.Reporter()
        summary = chainer.reporter.DictSummary()
        last: dict[str, Any] = {}
        for _ in range(micro_batches):
            last = {}
            with reporter.scope(last):
                core()
            summary.add(last)
        reporter.observation.update({**last, **summary.compute_mean()})

    updater.update_core = update_core
    _updaters.add(updater)


_updaters: weakref.WeakSet[Any] = weakref.WeakSet()
