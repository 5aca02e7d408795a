"""The mean gradient of a piece, handed to a kernel before it is evaluated."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Mean(NamedTuple):
    """The mean of one piece over the ranks, not yet evaluated: ``(first + second) * scale``.

    Left to whoever takes it, the last sum and the scaling cost no pass over memory of their own.

    Attributes:
        first: The sum over all ranks but the last; or over all, if ``second`` is ``None``.
        second: The gradient of the last rank, or ``None``.
        scale: One over the world size, to be used in the dtype of the gradients; or 1, if what is
            there is the mean already.
    """

    first: np.ndarray
    second: np.ndarray | None = None
    scale: float = 1.0

    def part(self, start: int, stop: int) -> Mean:
        """The mean of a range of the piece."""
        second = None if self.second is None else self.second[start:stop]
        return Mean(self.first[start:stop], second, self.scale)

    def evaluated(self) -> np.ndarray:
        """The mean as an array, which may be ``first`` itself."""
        if self.second is None and self.scale == 1.0:
            return self.first
        out = np.empty_like(self.first)
        self.evaluate(out)
        return out

    def kept_in(self, out: np.ndarray) -> Mean:
        """Writes it into an array of the piece's size; a sum as it is, to be scaled by its user."""
        if self.second is not None:
            self.evaluate(out)
            return Mean(out)
        out[...] = self.first
        return Mean(out, None, self.scale)

    def evaluate(self, out: np.ndarray) -> None:
        """Writes the mean into an array of the piece's size, which may be ``first`` itself."""
        # A non-finite gradient is the business of the loss scale or of hooks, as in ChainerMN.
        with np.errstate(all="ignore"):
            if self.second is None:
                if out is not self.first:
                    out[...] = self.first
            else:
                np.add(self.first, self.second, out=out)
            if self.scale != 1.0:
                np.multiply(out, out.dtype.type(self.scale), out=out)
