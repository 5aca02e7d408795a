"""Ranks and lists in the words of messages, alike wherever they are said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_RANGES = 8
_SHOWN = 3


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Ranks as ``rank 3``, ``ranks 0 and 2`` or ``ranks 0-3, 5 and 7``; of many, the first."""
    numbers = sorted(ranks)
    ranges: list[list[int]] = []
    for rank in numbers:
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    shown = ranges[:_RANGES]
    parts: list[str] = []
    for first, last in shown:
        parts += [f"{first}-{last}"] if last > first + 1 else map(str, range(first, last + 1))
    if len(shown) < len(ranges):
        parts.append(f"{len(numbers) - sum(last - first + 1 for first, last in shown)} more")
    noun = "rank" if len(numbers) == 1 else "ranks"
    return f"{noun} {' and '.join(filter(None, [', '.join(parts[:-1]), parts[-1]]))}"


def listed(parts: Sequence[str]) -> str:
    """The first few of a list."""
    return ", ".join(parts[:_SHOWN]) + (", ..." if len(parts) > _SHOWN else "")
