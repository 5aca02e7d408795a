"""All that the kernels for GPUs can be asked for, as strategies of hypothesis."""

from __future__ import annotations

from typing import Any

from smorms3_dist.kernels import tables
from smorms3_dist.kernels.tables import PackedPart, Rates, Run

import numpy as np
from hypothesis import strategies as st
from kernel_checks import DTYPES, TIES, Values, bfloat16, numbers, specials

# Around what vectors (1 to 8 elements), the threads of a block (256), and chunks (8192) divide by.
sizes = st.sampled_from(
    [0, *sorted({max(2**k + d, 1) for k in range(14) for d in (-1, 0, 1)}), 20011, 40000]
)
shifts = st.integers(0, 8)
"""Elements that an array starts behind an aligned address."""

few_blocks = st.sampled_from([1, 3, tables.MAX_BLOCKS])


@st.composite
def updates(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `check_update`, with all that one launch can be asked for."""
    runs, rates, ends = [], [], np.zeros(3, int)
    for size in draw(st.lists(sizes, min_size=1, max_size=4)):
        ends += draw(st.tuples(*[st.integers(0, 5)] * 3))
        runs.append(Run(*ends.tolist(), size))
        possible = [0.0, 1e-3, 0.5], [1e-16, 1e-8], [None, 0.0, 0.1]
        lr, eps, decay = (draw(st.sampled_from(values)) for values in possible)
        rates.append(Rates((1, lr, eps), decay))
        ends += size
    how = Values(
        mean=draw(st.sampled_from([1.0, 1 / 3])),
        clip=draw(st.sampled_from([None, 0.3, 1.0, 2.0, np.nan])),
        decay=draw(st.sampled_from([None, 0.0, 0.01, 10.24])),
        loss_scale=draw(st.sampled_from([1.0, 3.0, 1024.0])),
        skip=draw(st.sampled_from([None, None, 0.0, 0.0, 1.0, np.nan])),
    )
    names = ("param", "grad", "mem", "g", "g2", "master")
    together = st.builds(dict.fromkeys, st.just(names), shifts)
    return {
        "dtypes": draw(st.sampled_from(DTYPES)),
        "runs": runs,
        "rates": rates,
        "how": how,
        "starts": draw(together | st.fixed_dictionaries({name: shifts for name in names})),
        "steps": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 99)),
    }


TYPES = ("float16", "float32", "float64", "uint16")


@st.composite
def packs(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `check_pack`: any gradients, missing ones among them, into any bucket."""
    rng = np.random.RandomState(draw(st.integers(0, 99)))
    gradients: list[np.ndarray | None] = []
    parts, end = [], 0
    for size in draw(st.lists(sizes, min_size=1, max_size=4)):
        first, offset = draw(shifts), end + draw(shifts)
        parts.append(PackedPart(first, size, offset))
        end = offset + size
        dtype = draw(st.sampled_from([*TYPES, None]))
        gradients.append(None if dtype is None else _gradient(rng, first + size, dtype))
    return {
        "dtype": draw(st.sampled_from(TYPES)),
        "gradients": gradients,
        "parts": parts,
        "scale": draw(st.sampled_from([1.0, 0.5, 1 / 3])),
        "start": draw(shifts),
        "starts": [draw(shifts) for _ in parts],
    }


def _gradient(rng: np.random.RandomState, size: int, dtype: str) -> np.ndarray:
    wide = "float32" if dtype == "uint16" else dtype
    with np.errstate(over="ignore"):
        ties = TIES.astype(wide)
    values = np.concatenate([specials(wide), ties, numbers(rng, size, wide)])[:size]
    return bfloat16(values) if dtype == "uint16" else values


@st.composite
def norms(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `check_norm`; a few elements are not finite."""
    dtype, of_grad, _ = draw(st.sampled_from([each for each in DTYPES if each[0] == each[2]]))
    rng = np.random.RandomState(draw(st.integers(0, 99)))
    grads = [numbers(rng, size, of_grad) for size in draw(st.lists(sizes, min_size=1, max_size=3))]
    for grad in grads:
        for value in draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), max_size=2)):
            if grad.size:
                grad[draw(st.integers(0, grad.size - 1))] = value
    return {
        "grads": grads,
        "dtype": dtype,
        "mean": draw(st.sampled_from([1.0, 1 / 3])),
        "start": draw(shifts),
    }
