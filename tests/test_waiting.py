"""The voice of waits: what it says, once, and of which waits."""

from __future__ import annotations

import collections
import queue
import re
import threading
import time

from smorms3_dist import rank_page, waiting
from smorms3_dist.waiting import Wait, Watch, stall_warning

import pytest
from rank_threads import ThreadCollectives, run_ranks

LIMIT = 0.05


def begin(wait: Wait, at: str) -> None:
    wait.since = time.monotonic()
    wait.at = at


def test_a_long_wait_is_told_of_once_and_the_next_one_again() -> None:
    wait, said = Wait(3), queue.Queue[str]()
    wait.occasion = "update 15"
    before = rank_page.page.said
    wait.phases.spans = spans = collections.deque()
    watch = Watch([wait], LIMIT, said.put)
    try:
        for at in ("in the reduction of gradients", "in a broadcast"):
            begin(wait, at)
            words = said.get(timeout=30)
            assert words.startswith("smorms3_dist: rank 3 has waited for 0.")
            assert f"s in update 15, {at}. Ranks that do not say so have not come there" in words
            # A timeline has it, too.
            assert [(span.name, span.detail) for span in spans] == [("stall", words)]
            spans.clear()
            # It has looked again when another one is told of.
            other = Wait(4)
            watch._waits = [wait, other]
            begin(other, "elsewhere")
            assert "rank 4" in said.get(timeout=30)
            assert said.empty()
            wait.at = None
        assert rank_page.page.said == before + 4
    finally:
        watch.stop()


def test_the_launcher_sees_who_waits() -> None:
    wait, page = Wait(0), rank_page.page
    watch = Watch([wait], 30 * LIMIT, lambda words: None)
    try:
        begin(wait, "in a broadcast")
        deadline = time.monotonic() + 30
        while not page.waits and time.monotonic() < deadline:
            time.sleep(0.01)
        assert page.waits == 1
        wait.at = None
        while page.waits and time.monotonic() < deadline:
            time.sleep(0.01)
        assert page.waits == 0
    finally:
        watch.stop()


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 60.0), ("5", 5.0), ("0.5", 0.5), ("0", float("inf"))]
)
def test_the_environment_says_when(
    text: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(waiting.STALL_WARNING, text)
    assert stall_warning() == seconds


@pytest.mark.parametrize("text", ["never", "-1", "nan", "inf", "1m"])
def test_bad_seconds_are_refused_at_the_start(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(waiting.STALL_WARNING, text)
    with pytest.raises(ValueError, match=f"SMORMS3_STALL_WARNING={text} is not a number of seco"):
        run_ranks(2, lambda collectives: None)


def test_a_rank_that_waits_for_another_says_in_what(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(waiting.STALL_WARNING, str(LIMIT))
    told = threading.Event()
    words: list[str] = []

    def say(text: str) -> None:
        words.append(text)
        told.set()

    monkeypatch.setattr(waiting, "_print", say)

    def run(collectives: ThreadCollectives) -> None:
        collectives.wait.occasion = "update 7"
        if collectives.rank == 1:
            assert told.wait(30)
        collectives.all_gather_object(0)

    run_ranks(2, run)
    assert re.match(
        r"smorms3_dist: rank 0 has waited for \S+ s in update 7, in an exchange of facts\. ",
        words[0],
    )
