"""Ranks and lists in words."""

from __future__ import annotations

from collections.abc import Iterable

from smorms3_dist.wording import listed, ranks_in_words

import pytest


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([2], "rank 2"),
        ([0, 1], "ranks 0 and 1"),
        ([2, 0], "ranks 0 and 2"),
        ([0, 1, 2], "ranks 0-2"),
        ([0, 1, 2, 5], "ranks 0-2 and 5"),
        ([0, 1, 2, 5, 7, 8], "ranks 0-2, 5, 7 and 8"),
        (range(1000), "ranks 0-999"),
        (range(0, 20, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 2 more"),
        ([0, 2, 4, 6, 8, 10, 12, 14, *range(16, 20)], "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 4 more"),
    ],
)
def test_ranks_are_said_in_few_words(ranks: Iterable[int], words: str) -> None:
    assert ranks_in_words(ranks) == words


def test_the_first_of_a_list_are_shown() -> None:
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d"]) == "a, b, c, ..."
