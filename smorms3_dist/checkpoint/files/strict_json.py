"""Reads JSON, and refuses what ``json`` would let pass.

Keys that occur twice, numbers that are not finite, text that is not Unicode, and nesting that
exceeds Python's recursion limit: each is a `CheckpointError`.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from smorms3_dist.checkpoint.files.errors import CheckpointError

LARGEST = 2**63 - 1
"""Largest integer that counts and sizes may have: every file system and format holds it."""

# A half of a surrogate pair, which may or may not have its other half.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(data: bytes | bytearray, path: str) -> Any:
    """Parses JSON.

    Raises:
        CheckpointError: If it is not strict JSON.
    """
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_without_duplicates,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise CheckpointError(path, "its JSON is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(path, f"its JSON is not valid: {error}") from None
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(max(names, key=names.count))} occurs twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def shown(value: object) -> str:
    """A value for an error: one line of limited length, whatever it is."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
