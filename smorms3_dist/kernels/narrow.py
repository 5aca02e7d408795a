"""Narrow dtypes, in which values go over a network that is slower than memory.

Values are rounded once, to the nearest, in ties to the even one; what is too large becomes
infinite, and nan stays nan. float64 is rounded to float32 first on its way to bfloat16, as on GPUs.

NumPy does not know bfloat16. It is float32 without its lower 16 bits, and stands here as these bits
of uint16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smorms3_dist.kernels.selection import compiled_rounding

import numpy as np

if TYPE_CHECKING:
    from smorms3_dist.kernels.cpu import Rounding

BFLOAT16 = np.dtype(np.uint16)
"""What stands for bfloat16: its bits."""

SENT_AS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}
"""What values can be sent as besides their own dtype."""

_BLOCK = 1 << 15
"""Elements that are worked on at once, in a cache."""


def narrower(name: str | None, dtype: np.dtype) -> np.dtype | None:
    """The dtype of a name in `SENT_AS`, if its values take fewer bytes; else ``None``."""
    sent = None if name is None else SENT_AS[name]
    return sent if sent is not None and sent.itemsize < dtype.itemsize else None


def narrow(values: np.ndarray, out: np.ndarray) -> None:
    """Rounds values to a narrow dtype.

    Args:
        values: float32 or float64, contiguous and one-dimensional.
        out: As many elements of a dtype in `SENT_AS`, contiguous.
    """
    if out.dtype != BFLOAT16:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            out[...] = values
        return
    compiled = compiled_rounding()
    round_bits = _round_bits if compiled is None else compiled.narrow
    for start in range(0, values.size, _BLOCK):
        bits = _in_float32(values[start : start + _BLOCK]).view(np.uint32)
        round_bits(bits, out[start : start + _BLOCK])


def _in_float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(np.float32, copy=False)


def _round_bits(bits: np.ndarray, out: np.ndarray) -> None:
    """Rounds the bits of float32 to those of bfloat16."""
    # Half of the last place is added, or a little less where that place is even.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out[...] = rounded
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        # A nan may have nothing but lower bits: one of those that stay is set.
        out[nan] = bits[nan] >> 16 | 0x40


def widen(values: np.ndarray, out: np.ndarray) -> None:
    """Writes values of a narrow dtype into an array of another one, exactly.

    Args:
        values: As `narrow` gives them.
        out: As many elements of float32 or float64, contiguous and one-dimensional.
    """
    if values.dtype != BFLOAT16:
        out[...] = values
    elif out.dtype == np.float32:
        bits = out.view(np.uint32)
        bits[...] = values
        bits <<= 16
    else:
        for start in range(0, values.size, _BLOCK):
            bits = values[start : start + _BLOCK].astype(np.uint32)
            bits <<= 16
            out[start : start + _BLOCK] = bits.view(np.float32)


def round_to(dtype: np.dtype, values: np.ndarray, out: np.ndarray) -> None:
    """Writes values, rounded to a narrow dtype, into an array of their own dtype.

    ``out`` may be ``values`` itself.
    """
    compiled = _compiled_for(dtype, values)
    if compiled is not None:
        compiled.round(values.view(np.uint32), out.view(np.uint32))
        return
    scratch = np.empty(min(values.size, _BLOCK), dtype)
    for start in range(0, values.size, _BLOCK):
        part = values[start : start + _BLOCK]
        narrow(part, scratch[: part.size])
        widen(scratch[: part.size], out[start : start + _BLOCK])


def is_rounded(dtype: np.dtype, values: np.ndarray, rounded: np.ndarray) -> bool:
    """Whether an array has, bit for bit, what `round_to` would write into it."""
    compiled = _compiled_for(dtype, values)
    if compiled is not None:
        return compiled.is_rounded(values.view(np.uint32), rounded.view(np.uint32))
    bits = np.dtype(f"u{values.itemsize}")
    scratch = np.empty(min(values.size, _BLOCK), values.dtype)
    for start in range(0, values.size, _BLOCK):
        part, seen = values[start : start + _BLOCK], rounded[start : start + _BLOCK]
        round_to(dtype, part, scratch[: part.size])
        if not np.array_equal(scratch[: part.size].view(bits), seen.view(bits)):
            return False
    return True


def _compiled_for(dtype: np.dtype, values: np.ndarray) -> Rounding | None:
    return compiled_rounding() if (dtype, values.dtype) == (BFLOAT16, np.float32) else None
