"""What hooks and loss scaling do to a gradient before an update rule sees it, as operations.

Each of Chainer's hooks that treat elements by themselves is one operation, and so are a clipping by
a norm that is known and the division by the loss scale. An update applies any sequence of them to
blocks of the gradient that stay in the cache: compiled (`smorms3_dist.kernels.cpu`), or here.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


class OperationKind(enum.IntEnum):
    """What becomes of the gradient ``d`` of a parameter ``p``."""

    SCALE = 0
    """``d * number``, in the wider dtype of both, rounded to that of ``d``."""

    DECAY = 1
    """``d + number * p``"""

    LASSO = 2
    """``d + number * sign(p)``"""

    CLIP = 3
    """The nearest number from ``number`` to ``upper``."""

    DIVIDE = 4
    """``d / number``"""


class Operation(NamedTuple):
    """One operation.

    Attributes:
        kind: What is done.
        number: A Python number, which counts in the gradient's dtype; one of NumPy's, with a dtype
            of its own, for `OperationKind.SCALE`.
        upper: The upper bound of `OperationKind.CLIP`.
    """

    kind: OperationKind
    number: Any
    upper: float = 0.0


Operations = tuple[Operation, ...]


def sees_parameters(operations: Iterable[Operation]) -> bool:
    """Whether any of them depends on the parameter."""
    return any(kind in (OperationKind.DECAY, OperationKind.LASSO) for kind, _, _ in operations)


def apply(operations: Iterable[Operation], grad: np.ndarray, param: np.ndarray) -> None:
    """Applies operations to a gradient in place, in NumPy: arrays of one shape and dtype."""
    # A non-finite gradient is the business of the loss scale, as in ChainerMN.
    with np.errstate(all="ignore"):
        for kind, number, upper in operations:
            match kind:
                case OperationKind.SCALE:
                    np.multiply(grad, number, out=grad, casting="same_kind")
                case OperationKind.DECAY:
                    grad += param.dtype.type(number) * param
                case OperationKind.LASSO:
                    grad += param.dtype.type(number) * np.sign(param)
                case OperationKind.CLIP:
                    np.clip(grad, number, upper, out=grad)
                case OperationKind.DIVIDE:
                    np.divide(grad, grad.dtype.type(number), out=grad)
