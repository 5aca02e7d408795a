"""Who else has an object: what CPython's counts of references say of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def holders(objects: Sequence[object]) -> list[int]:
    """How many refer to each of some objects, besides the sequence; local names count as well."""
    return [count - _NOBODY for count in _counts(objects)]


def _counts(objects: Sequence[object]) -> list[int]:
    # By `map` it is the same number too many for all of them, in each version of Python another.
    return list(map(sys.getrefcount, objects))


_NOBODY = _counts([object()])[0]
