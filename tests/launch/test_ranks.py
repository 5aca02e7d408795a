"""What is said of ranks when nobody comes further."""

from __future__ import annotations

from typing import Any, cast

from smorms3_dist.launch.ranks import Rank, listed, stall_text

import pytest


def rank(number: int, entered: int = 0, finished: int = 0, end: int | None = None) -> Rank:
    return Rank(number, "host", cast("Any", None), entered, finished, end=end)


@pytest.mark.parametrize(
    ("ranks", "text", "culprit"),
    [
        (((7, 6), (7, 6), (6, 6)), "ranks 0 and 1 in step 7; rank 2 not come to it", 2),
        (((7, 6), (7, 6)), "ranks 0 and 1 in step 7", 0),
        (((7, 7), (7, 7)), "ranks 0 and 1 after step 7, not in the next", 0),
        (((0, 0), (0, 0)), "ranks 0 and 1 before the first step", 0),
        (((1, 0), (0, 0)), "rank 0 in step 1; rank 1 not come to it", 1),
        (((5, 4), (4, 4, 0)), "rank 0 in step 5; rank 1 ended already", 0),
    ],
)
def test_a_stall_names_who_waits_and_who_is_missing(ranks: Any, text: str, culprit: int) -> None:
    said, found = stall_text([rank(number, *steps) for number, steps in enumerate(ranks)])
    assert (said, found.number) == (text, culprit)


def test_ranks_are_listed_in_words() -> None:
    assert listed([rank(3)]) == "rank 3"
    assert listed([rank(5), rank(0), rank(1)]) == "ranks 0, 1 and 5"
    assert listed([rank(i) for i in range(20)]) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


def test_a_step_counts_more_than_a_line() -> None:
    one = rank(0)
    one.stepped_at, one.printed_at = 1.0, 5.0
    assert one.last_sign == 5.0
    one.hear({"at": [1, 0]})
    assert one.stepped_at > 5.0
    one.printed_at = one.stepped_at + 100
    assert one.last_sign == one.stepped_at
    before = one.stepped_at
    one.hear({"at": [1, 0]})
    assert one.stepped_at == before


def test_who_ends_badly_has_failed_unless_it_was_ended() -> None:
    for message, failed in (
        ({"end": 0}, False),
        ({"end": 3}, True),
        ({"end": -9}, True),
        ({"end": -15, "cut": True}, False),
        ({"end": 75, "preempted": True}, False),
    ):
        one = rank(0)
        one.hear(message)
        assert one.has_failed is failed, message
