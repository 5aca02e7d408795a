"""Reads JSON that may be damaged or hostile: every surprise is a `CheckpointError`.

Beyond what ``json`` refuses by itself: keys that occur twice, numbers that are not finite or of
absurd length, text that is not Unicode, nesting that exceeds Python's recursion limit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from typing import Any, NoReturn

from smorms3_dist.checkpoint.files.errors import CheckpointError

LARGEST = 2**63 - 1
"""Largest integer that counts and sizes may have: every file system and format holds it."""

_DIGITS = 20
# A half of a surrogate pair, which may or may not have its other half.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(data: bytes | bytearray, path: str) -> Any:
    """Parses JSON.

    Args:
        data: The text, in UTF-8.
        path: The file it is from, for errors.

    Raises:
        CheckpointError: If it is not strict JSON.
    """
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_without_duplicates,
            parse_int=_integer,
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
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{shown(name)} occurs twice")
            seen.add(name)
    return found


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def shown(value: object) -> str:
    """A value as errors show it: of bounded length."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


class Fields:
    """A JSON object whose fields are taken out one by one, each checked.

    Args:
        value: What should be an object.
        path: The file it is from, for errors.
        where: Its place in the file, for errors.
        names: The fields that it must have; no others.

    Raises:
        CheckpointError: If it is not an object with these fields. All methods raise it, too.
    """

    def __init__(self, value: Any, path: str, where: str, names: Collection[str]) -> None:
        self._path = path
        self._where = where
        if not isinstance(value, dict):
            raise self.error("", f"is {shown(value)} and not an object")
        for name in names:
            if name not in value:
                raise self.error(name, "is missing")
        if len(value) != len(names):
            unknown = next(name for name in value if name not in names)
            raise self.error("", f"has an unknown field {shown(unknown)}")
        self._value = value

    def error(self, name: str, reason: str) -> CheckpointError:
        """An error about one field, or with an empty name about the object."""
        where = f"{self._where}.{name}" if self._where and name else self._where or name
        return CheckpointError(self._path, f"{where or 'it'} {reason}")

    def integer(self, name: str, low: int = 0, high: int = LARGEST) -> int:
        """An integer from ``low`` to ``high``."""
        value = self._value[name]
        if type(value) is not int or not low <= value <= high:
            raise self.error(name, f"is {shown(value)} and not an integer from {low} to {high}")
        return value

    def boolean(self, name: str) -> bool:
        """True or false."""
        value = self._value[name]
        if type(value) is not bool:
            raise self.error(name, f"is {shown(value)} and neither true nor false")
        return value

    def text(self, name: str, pattern: re.Pattern[str] | None = None) -> str:
        """A string; all of it matches the pattern."""
        value = self._value[name]
        if not isinstance(value, str):
            raise self.error(name, f"is {shown(value)} and not a string")
        if pattern is not None and pattern.fullmatch(value) is None:
            raise self.error(name, f"is {shown(value)}, which does not match {pattern.pattern}")
        return value

    def choice(self, name: str, choices: Collection[str]) -> str:
        """One of some strings."""
        value = self.text(name)
        if value not in choices:
            raise self.error(name, f"is {shown(value)} and none of {', '.join(sorted(choices))}")
        return value

    def list(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self._value[name]
        if not isinstance(value, list):
            raise self.error(name, f"is {shown(value)} and not a list")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object with any fields."""
        value = self._value[name]
        if not isinstance(value, dict):
            raise self.error(name, f"is {shown(value)} and not an object")
        return value

    def texts(self, name: str) -> dict[str, str]:
        """An object with any fields, all of them strings."""
        value = self.mapping(name)
        for key, text in value.items():
            if not isinstance(text, str):
                raise self.error(name, f"has {shown(text)} for {shown(key)}, which is not a string")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array that can exist."""
        value = self.list(name)
        if len(value) > MAX_DIMENSIONS:
            raise self.error(name, f"has {len(value)} dimensions; {MAX_DIMENSIONS} are possible")
        if any(type(length) is not int or length < 0 for length in value):
            raise self.error(name, f"is {shown(value)}, which is not a shape")
        if math.prod(length for length in value if length) * MAX_ITEMSIZE > LARGEST:
            raise self.error(name, f"is {shown(value)}, which is too large for an array")
        return tuple(value)

    def is_null(self, name: str) -> bool:
        """Whether a field is null."""
        return self._value[name] is None


MAX_DIMENSIONS = 32
"""NumPy 1's limit."""

MAX_ITEMSIZE = 8
"""Bytes of the largest element that is stored."""
