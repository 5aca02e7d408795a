"""What hooks are called with: what a rank holds of each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from smorms3_dist.hooks.views import ParameterView, WholeParameter
from smorms3_dist.layout import Segment

import chainer
import numpy as np


class Values(NamedTuple):
    """The values of a segment, of parameter and gradient, as flat views."""

    array: np.ndarray
    grad: np.ndarray


class Part(NamedTuple):
    """What a rank holds of one parameter while hooks run.

    Attributes:
        name: Name of the parameter.
        rule: Its update rule.
        views: What hooks are called with: the segments that this rank owns, long ones in pieces
            that stay in the cache; or the parameter itself, if every rank has it.
        values: The segments in one, for norms; or the parameter itself.
        owners: The segments of all ranks, with their owners; empty if every rank has the whole.
        dtype: The dtype of the values, if they are in host memory; ``None`` on a GPU.
        whole: The parameter, flat, where every rank has all of it as it is now; or ``None``.
    """

    name: str
    rule: chainer.UpdateRule | None
    views: Sequence[ParameterView]
    values: Sequence[Values | WholeParameter]
    owners: Sequence[tuple[int, Segment]]
    dtype: np.dtype | None
    whole: np.ndarray | None = None
