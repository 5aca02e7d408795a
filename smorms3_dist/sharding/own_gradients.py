"""Whether the gradients that a rank brings are finite, before the mean hides whose were not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from smorms3_dist.device.memory import Memory
from smorms3_dist.kernels.narrow import narrower, round_to
from smorms3_dist.kernels.tables import GradientCheck, KernelLauncher
from smorms3_dist.sharding.fingerprints import pieces_of
from smorms3_dist.sharding.model import ModelView

import numpy as np

_AT_ONCE = 1 << 18
"""Elements."""

_EXPONENT = 0x7C00
"""The bits of a float16 that are all set if it is infinite or nan."""


class NotFinite(NamedTuple):
    """A gradient that is not finite.

    Attributes:
        name: Of the parameter.
        elements: How many are infinite or nan.
        of: How many there are.
    """

    name: str
    elements: int
    of: int


class OwnGradients:
    """Looks at this rank's gradients; remembers tables on the GPU from step to step."""

    def __init__(self) -> None:
        self._checks: dict[np.dtype, tuple[tuple[int, ...], GradientCheck]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_checks": {}}

    def are_finite(self, model: ModelView, memory: Memory, sent: str | None = None) -> bool:
        """Whether all of them are; in one pass, without memory. Waits for a GPU.

        In host memory, also whether they are when they are rounded to be ``sent``.
        """
        grads = [param.grad for param in model.initialized.values() if param.grad is not None]
        if memory.launcher is not None:
            return self._are_finite_on_device(grads, memory.launcher)
        with np.errstate(all="ignore"):
            return all(_is_finite(grad, narrower(sent, grad.dtype)) for grad in grads)

    def _are_finite_on_device(self, grads: list[Any], launcher: KernelLauncher) -> bool:
        by_dtype: dict[np.dtype, list[Any]] = {}
        for grad in grads:
            by_dtype.setdefault(grad.dtype, []).append(grad.ravel())
        answers = []
        for dtype, flat in by_dtype.items():
            sizes = tuple(each.size for each in flat)
            known, check = self._checks.get(dtype, ((), None))
            if check is None or known != sizes:
                check = GradientCheck(launcher, sizes)
                self._checks[dtype] = sizes, check
            check.run(flat, dtype)
            answers.append(launcher.fetch(check.result))
        return not any(answer()[1] for answer in answers)


def not_finite_gradients(model: ModelView, sent: str | None = None) -> list[NotFinite]:
    """Names this rank's gradients that are not finite, in the order of the names.

    As for `OwnGradients.are_finite`.
    """
    found = []
    for name, param in model.initialized.items():
        if param.grad is not None:
            on_host = isinstance(param.grad, np.ndarray)
            dtype = narrower(sent, param.dtype) if on_host else None
            pieces = (_as_sent(piece, dtype) for piece in _pieces(param.grad))
            count = sum(int((~np.isfinite(piece)).sum()) for piece in pieces)
            if count:
                found.append(NotFinite(name, count, param.size))
    return found


def _pieces(array: Any) -> Iterator[Any]:
    for flat in [array.ravel()] if hasattr(array, "get") else pieces_of(array):
        for start in range(0, flat.size, _AT_ONCE):
            yield flat[start : start + _AT_ONCE]


def _is_finite(grad: np.ndarray, sent: np.dtype | None) -> bool:
    array = grad.T if grad.flags.f_contiguous else grad
    return all(_is_finite_piece(flat, sent) for flat in pieces_of(array))


def _as_sent(flat: np.ndarray, sent: np.dtype | None) -> np.ndarray:
    if sent is None:
        return flat
    rounded = np.empty_like(flat)
    round_to(sent, flat, rounded)
    return rounded


def _is_finite_piece(flat: np.ndarray, sent: np.dtype | None) -> bool:
    if flat.dtype == np.float16:
        scratch = np.empty(min(flat.size, _AT_ONCE), np.uint16)
        for piece in _pieces(flat.view(np.uint16)):
            exponents = np.bitwise_and(piece, _EXPONENT, out=scratch[: piece.size])
            if exponents.max() == _EXPONENT:
                return False
        return True
    # Squares that add up to something finite come of nothing infinite, and of no nan. Those of
    # large numbers overflow, or the numbers do when they are sent: that has to be looked into.
    if np.dot(flat, flat) < _surely_finite(sent):
        return True
    return all(bool(np.isfinite(_as_sent(piece, sent)).all()) for piece in _pieces(flat))


def _surely_finite(sent: np.dtype | None) -> float:
    """A sum of squares of numbers that stay finite when they are sent."""
    if sent is None:
        return math.inf
    largest = np.finfo(np.float16 if sent == np.float16 else np.float32).max
    return (float(largest) / 2) ** 2
