"""The models whose optimizer and communication are measured: multi-layer perceptrons and vectors.

NumPy is all that this module needs, so that it runs in any system's interpreter.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

BATCH = 2
"""Samples a rank: few, so that a training step is mostly optimizer and communication."""


class Workload(NamedTuple):
    """A model in float32.

    Attributes:
        what: What it is, for a table.
        widths: Widths of the layers of a perceptron, input first; empty for vectors.
        bias: Whether these layers have biases.
        vectors: Sizes of parameters that no layer uses: their gradients are given to them.
    """

    what: str
    widths: tuple[int, ...] = ()
    bias: bool = True
    vectors: tuple[int, ...] = ()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its parameters."""
        pairs = itertools.pairwise(self.widths)
        layers = [[(n_out, n_in), (n_out,)][: 1 + self.bias] for n_in, n_out in pairs]
        return [*itertools.chain(*layers), *((size,) for size in self.vectors)]

    @property
    def size(self) -> int:
        """How many elements its parameters have."""
        return sum(map(math.prod, self.shapes))


def _small(count: int) -> tuple[int, ...]:
    return tuple(np.random.RandomState(0).randint(1, 2001, count).tolist())


TINY = Workload("a tiny perceptron", (64, 64))

_59 = (384, *[3072] * 7, 384)
_19 = (512, *[2048] * 5, 512)

WORKLOADS = {
    "59M": Workload("perceptron, 59M parameters", _59),
    "19M": Workload("perceptron, 19M parameters", _19),
    "powers of two": Workload("8 layers of 2048 x 4096, 67M", (2048, 4096) * 4 + (2048,), False),
    "one array": Workload("one array of 19M", vectors=(18_892_288,)),
    "200 small": Workload("200 arrays of 1 to 2000", vectors=_small(200)),
    "2000 small": Workload("2000 arrays of 1 to 2000", vectors=_small(2000)),
    "one element": Workload("one element", vectors=(1,)),
}
