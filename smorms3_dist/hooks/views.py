"""Chainer parameters that stand for a part of a parameter while hooks and update rules run on it.

A hook or an update rule that treats each element by itself does not see whether it is given a whole
parameter or a segment of one. What it assigns instead of writing in place (a new ``array``, a new
``grad``, or none) is brought back to where the values belong.
"""

from __future__ import annotations

from smorms3_dist.chainer_internals.loss_scale import loss_scale_of, note_loss_scale

import chainer
import numpy as np


class ParameterView:
    """A Chainer parameter whose array, and gradient, are views of other arrays.

    Args:
        array: The values, in the shape that hooks and rules see.
        grad: The gradient, in the same shape, if there is one yet.
        like: The parameter that this is a part of; gives the name.

    Attributes:
        param: What hooks and rules receive.
    """

    def __init__(self, array: np.ndarray, grad: np.ndarray | None, like: chainer.Parameter) -> None:
        self.param = chainer.Parameter(array, name=like.name)
        self.param.update_rule = like.update_rule
        self._array = self.param.array
        self._grad: np.ndarray | None = None
        self.show(grad, loss_scale_of(like))

    @property
    def array(self) -> np.ndarray:
        """The values, flat: a view."""
        return self._array.reshape(-1)

    @property
    def grad(self) -> np.ndarray:
        """The gradient, flat: a view."""
        assert self._grad is not None
        return self._grad.reshape(-1)

    def show(self, grad: np.ndarray | None, loss_scale: float | None) -> None:
        """Puts a gradient, and the scale it still has, into the parameter."""
        self._grad = grad
        self.param.grad = grad
        note_loss_scale(self.param, loss_scale)

    def settle(self) -> None:
        """Brings back what was assigned to the parameter; no gradient counts as zeros."""
        param = self.param
        if param.array is not self._array:
            self._array[...] = param.array
            param.array = self._array
        if self._grad is not None and param.grad is not self._grad:
            self._grad[...] = 0 if param.grad is None else param.grad
            param.grad = self._grad


class WholeParameter(ParameterView):
    """A parameter that stands for itself, because every rank has all of it."""

    def __init__(self, param: chainer.Parameter) -> None:
        self.param = param

    @property
    def array(self) -> np.ndarray:
        """See `ParameterView.array`."""
        return self.param.array.reshape(-1)

    @property
    def grad(self) -> np.ndarray:
        """See `ParameterView.grad`."""
        return self.param.grad.reshape(-1)

    def settle(self) -> None:
        """Gives the parameter zeros where a hook took the gradient away, as Chainer does."""
        if self.param.array is not None and self.param.grad is None:
            self.param.grad = np.zeros_like(self.param.array)
