"""What has become of a job, from what is known of its ranks at a time."""

from __future__ import annotations

import signal
from typing import Any, cast

from smorms3_dist.launch.ranks import Rank
from smorms3_dist.launch.verdict import TIMED_OUT, JobFacts, Limits, Outcome, judge, stalled
from smorms3_dist.rank_page import PREEMPTED

import pytest

NOW = 1000.0
HOSTS = ("h1", "h2", "h1")


class Mpirun:
    """mpirun that runs on, unless it has ended with a status, so many seconds ago."""

    def __init__(self, status: int | None = None, ago: float = 0.0) -> None:
        self.status = status
        self.ended_at = None if status is None else NOW - ago

    def words(self) -> set[str]:
        return {"ssh", "h2"}


def job(*ranks: dict[str, Any], started: bool = True, limits: Limits | None = None) -> JobFacts:
    """A job of three ranks on two hosts that has begun long ago, of which some are known."""
    facts = JobFacts(3, HOSTS, limits or Limits(2000, None, None), program="mpirun")
    facts.began = facts.start_began = 0.0
    facts.started_at = 1.0 if started else None
    for number, of_rank in enumerate(ranks):
        times = {"heard_at": NOW, "stepped_at": NOW, "printed_at": NOW}
        fields = {**times, **of_rank}
        facts.ranks[number] = Rank(number, HOSTS[number], cast("Any", None), **fields)
    failed = [rank for rank in facts.ranks.values() if rank.has_failed]
    facts.failures, facts.failed_at = failed, NOW - 0.1
    return facts


def judged(facts: JobFacts, mpirun: Mpirun | None = None, now: float = NOW) -> Outcome | None:
    return judge(facts, cast("Any", mpirun or Mpirun()), now)


def test_a_job_whose_ranks_are_heard_of_goes_on() -> None:
    assert judged(job({}, {}, {})) is None


@pytest.mark.parametrize("failed", [195, -9])
def test_a_silent_host_is_waited_for_and_then_lost_whatever_it_does_to_other_ranks(
    failed: int,
) -> None:
    """As MPI does it: it ends the ranks of the other hosts before this one is silent enough."""
    facts = job({"end": failed}, {"heard_at": NOW - 3}, {"end": failed})
    assert judged(facts) is None
    outcome = judged(facts, now=NOW + 13)
    text = "h2: not heard of for 15 s, with rank 1"
    assert outcome == Outcome(1, text, rank=1, may_restart=True, lost=("h2",))


@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        (7, 7, "rank 1 on h2 failed with exit status 7"),
        (-signal.SIGSEGV, 139, "rank 1 on h2 was killed by SIGSEGV"),
        (
            -signal.SIGKILL,
            137,
            "rank 1 on h2 was killed by SIGKILL (by somebody, or by the system for want of memory)",
        ),
    ],
)
def test_the_first_rank_that_failed_is_named_a_moment_later(
    end: int, status: int, text: str
) -> None:
    facts = job({}, {"end": end}, {})
    assert judged(facts) is None
    assert judged(facts, now=NOW + 1) == Outcome(status, text, 1, may_restart=True)
    facts.failures.append(facts.ranks[2])
    outcome = judged(facts, now=NOW + 1)
    assert outcome is not None and outcome.text == f"{text}; after it, 1 more"


def test_ranks_that_failed_with_mpirun_are_not_named_as_the_reason() -> None:
    facts = job({"end": 195}, {"end": 195}, {"end": 195})
    outcome = judged(facts, Mpirun(-signal.SIGKILL))
    assert outcome is not None
    assert outcome.text == "mpirun was killed by SIGKILL; after it, ranks 0-2 failed"
    # Where mpirun was killed long after it, that is no reason.
    outcome = judged(facts, Mpirun(-signal.SIGKILL, ago=-5))
    assert outcome is not None and outcome.text.startswith("rank 0 on h1 failed")


def test_ranks_that_ended_from_outside_are_no_success() -> None:
    outcome = judged(job({"end": 0}, {"end": 1, "cut": True}, {"end": 0}))
    text = "rank 1 ended from outside, when ranks 0 and 2 had left without finishing MPI"
    assert outcome == Outcome(1, text, may_restart=True)


def test_ranks_that_were_asked_to_end_have_saved_a_checkpoint_or_not() -> None:
    saved = {"end": PREEMPTED, "preempted": True}
    outcome = judged(job(saved, saved, saved))
    assert outcome is not None and outcome.status == PREEMPTED and not outcome.may_restart
    facts = job({"end": 1, "cut": True}, saved, saved)
    facts.asked = signal.SIGUSR1
    outcome = judged(facts)
    assert outcome is not None and outcome.status == 128 + signal.SIGUSR1
    assert outcome.text.startswith("rank 0 ended by SIGUSR1 and saved no checkpoint")


def test_a_rank_whose_connection_is_gone_has_vanished_after_a_while() -> None:
    facts = job({}, {"gone_at": NOW}, {})
    assert judged(facts) is None
    outcome = judged(facts, now=NOW + 2.4)
    text = "rank 1 vanished: a process of h2 was killed, or the host is gone"
    assert outcome == Outcome(1, text, 1, may_restart=True, lost=("h2",))


def test_mpirun_that_ended_before_or_after_the_start_is_no_success_with_status_0() -> None:
    assert judged(job({}, started=False), Mpirun(0, ago=1)) is None
    outcome = judged(job({}, started=False), Mpirun(0, ago=3))
    text = "mpirun ended with status 0 before 2 of 3 ranks had started (h2)"
    assert outcome == Outcome(1, text, may_restart=True, lost=("h2",))
    outcome = judged(job({"end": 0}, {}, {}), Mpirun(0, ago=3))
    text = "mpirun ended with status 0, and nothing is known of how ranks 1 and 2 ended"
    assert outcome == Outcome(1, text, 1, may_restart=True)


@pytest.mark.parametrize("come", [(), ({},)])
def test_ranks_that_do_not_start_are_waited_for_so_long(come: tuple[dict[str, Any], ...]) -> None:
    facts = job(*come, started=False, limits=Limits(1030, None, None))
    assert judged(facts) is None
    for rank in facts.ranks.values():
        rank.heard_at = NOW + 31
    outcome = judged(facts, now=NOW + 31)
    first = len(come)
    text = (
        f"--start-timeout: {3 - first} of 3 ranks have not started within 1030 s (h2), "
        f"rank {first} among them"
    )
    assert outcome == Outcome(TIMED_OUT, text, may_restart=True, lost=("h2",))


def test_a_job_ends_when_its_time_is_over() -> None:
    assert judged(job({}, {}, {}, limits=Limits(600, None, 1000.5))) is None
    outcome = judged(job({}, {}, {}, limits=Limits(600, None, 999.5)))
    assert outcome == Outcome(TIMED_OUT, "--timeout: the job has not ended in time")


def test_a_job_without_a_step_for_longer_than_its_limit_is_stalled() -> None:
    late = {"entered": 3, "finished": 2, "stepped_at": NOW - 61}
    on = {"entered": 4, "finished": 3}
    assert stalled(job(late, on, on), NOW) is None
    assert stalled(job(on, on, on, limits=Limits(600, 60, None)), NOW) is None
    assert stalled(job(late, on, on, started=False, limits=Limits(600, 60, None)), NOW) is None
    outcome = stalled(job(late, on, on, limits=Limits(600, 60, None)), NOW)
    assert outcome is not None
    assert (outcome.status, outcome.rank, outcome.may_restart) == (TIMED_OUT, 0, True)
    assert outcome.text.startswith("--stall-timeout: no step for 60 s: ")
