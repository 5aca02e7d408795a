"""What is said of ranks when nobody comes further."""

from __future__ import annotations

from typing import Any, cast

from smorms3_dist.launch.ranks import Rank, named, stall_text, wait_text

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


def test_ranks_are_named_by_their_numbers() -> None:
    assert named([rank(3)]) == "rank 3"
    assert named([rank(5), rank(0), rank(1)]) == "ranks 0, 1 and 5"


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


def test_who_waits_and_who_has_not_come() -> None:
    ranks = [rank(0, 7, 6), rank(1, 7, 6), rank(2, 6, 6), rank(3, 5, 5), rank(4, 6, 6, end=0)]
    for one in ranks[:2]:
        one.hear({"waits": [1, 0, 0]})
    ranks[3].hear({"waits": [0, 0, 1]})
    text, culprits = wait_text(ranks)
    assert text == (
        "ranks 0 and 1 wait in step 7; rank 2 has not come; ranks 3 and 4 have ended the script"
    )
    assert culprits == [ranks[2]]


def test_if_all_wait_the_stacks_of_all_say_why() -> None:
    ranks = [rank(0, 6, 6), rank(1, 7, 6)]
    for one in ranks:
        one.hear({"waits": [1, 1, 0]})
    assert wait_text(ranks) == ("rank 0 waits after step 6; rank 1 waits in step 7", ranks)
    assert ranks[0].said == 1
