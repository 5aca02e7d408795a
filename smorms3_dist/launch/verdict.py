"""What has become of a job: the outcome that follows from what is known of its ranks.

A job is over when every rank has said how it has ended, or when it is clear that one never will.
The exit status of mpirun decides nothing: it is 0 in cases where ranks have vanished.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Sequence

from smorms3_dist.launch.child import Child, signal_name
from smorms3_dist.launch.ranks import Rank, named, stall_text
from smorms3_dist.rank_page import PREEMPTED

_SILENCE_S = 15.0
"""How long a host may send nothing before it counts as lost: agents send something each second."""

_QUIET_S = 2.5
"""How long a host may send nothing before it is waited for: until it does, or counts as lost."""

_TOGETHER_S = 0.5
"""How long after a first failure others may come in, so that the right one is reported."""

_GONE_S = 2.0
"""How long after the end of mpirun, or of a connection, there may still be words on their way."""

TIMED_OUT = 124
"""The exit status when a limit is over, as timeout(1) has it."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job has ended: with the launcher's exit status, if there is no other attempt.

    The last lines of `rank` explain it. Hosts that are `lost` do not answer any more.
    """

    status: int
    text: str = ""
    rank: int | None = None
    may_restart: bool = False
    lost: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds: until all ranks have started, without a step, and for all of it."""

    start: float
    stall: float | None
    total: float | None


@dataclasses.dataclass
class JobFacts:
    """What is known of a job. Times are those of a monotonic clock, in seconds.

    Attributes:
        size: How many ranks it has.
        hosts: The host of each rank, where the launcher decides that.
        limits: Its limits.
        ranks: The ranks that have come, by their numbers.
        failures: Those that have ended by themselves, and not well, in the order in which they did.
        failed_at: When the first of them did.
        asked: The signal for which the ranks were asked to end, or ``None``.
        program: The name of mpirun, or of what stands for it.
        began: When it began.
        start_began: From when on the limit for the start counts.
        started_at: When all ranks had come, or ``None``.
        unreached: Hosts of which mpirun has said that it could not come to them.
    """

    size: int
    hosts: Sequence[str]
    limits: Limits
    ranks: dict[int, Rank] = dataclasses.field(default_factory=dict)
    failures: list[Rank] = dataclasses.field(default_factory=list)
    failed_at: float = 0.0
    asked: int | None = None
    program: str = ""
    began: float = dataclasses.field(default_factory=time.monotonic)
    start_began: float = dataclasses.field(default_factory=time.monotonic)
    started_at: float | None = None
    unreached: set[str] = dataclasses.field(default_factory=set)

    @property
    def running(self) -> list[Rank]:
        """The ranks that have come and not said how they have ended."""
        return [rank for rank in self.ranks.values() if rank.end is None]


def judge(job: JobFacts, launcher: Child, now: float) -> Outcome | None:
    """The outcome of a job at a time of the monotonic clock; ``None`` as long as it goes on."""
    ranks = list(job.ranks.values())
    ended = [rank for rank in ranks if rank.end is not None]
    everybody = len(ended) == job.size
    waited = {r: now - r.heard_at for r in ranks if r.end is None and r.gone_at is None}
    quiet = [rank for rank, seconds in waited.items() if seconds > _QUIET_S]
    if hosts := dict.fromkeys(r.host for r in quiet if waited[r] > _SILENCE_S):
        silent = [rank for rank in quiet if rank.host in hosts]
        why = f"not heard of for {_SILENCE_S:g} s, with {named(silent)}"
        return _lost(job, f"{', '.join(hosts)}: {why}", silent)
    if quiet:
        # When a host is lost, MPI ends the ranks of the others: what they say is no reason.
        return _over_time(job, launcher, now)
    if job.failures and (everybody or now - job.failed_at > _TOGETHER_S):
        return _killed(job, launcher) or _failed(job, job.failures[0])
    if everybody:
        return _all_ended(job, ended)
    gone = [rank for rank in ranks if rank.gone_at is not None]
    if gone and now - min(rank.gone_at or now for rank in gone) > _GONE_S:
        where = ", ".join(dict.fromkeys(rank.host for rank in gone))
        why = f"a process of {where} was killed, or the host is gone"
        return _lost(job, f"{named(gone)} vanished: {why}", gone)
    if launcher.ended_at is not None and now - launcher.ended_at > _GONE_S:
        return _launcher_ended(job, launcher)
    return _over_time(job, launcher, now)


def stalled(job: JobFacts, now: float) -> Outcome | None:
    """The outcome of a job that makes no step for longer than its limit allows, if it does not."""
    limit = job.limits.stall
    if limit is None or job.started_at is None:
        return None
    running = job.running
    if not running or now - min(rank.last_sign for rank in running) <= limit:
        return None
    why, culprit = stall_text(list(job.ranks.values()))
    text = f"--stall-timeout: no step for {limit:g} s: {why}"
    return Outcome(TIMED_OUT, text, culprit.number, may_restart=True)


def _failed(job: JobFacts, rank: Rank) -> Outcome:
    assert rank.end is not None
    status, how = rank.end, f"failed with exit status {rank.end}"
    if rank.end < 0:
        status, how = 128 - rank.end, f"was killed by {signal_name(-rank.end)}"
    if rank.end == -signal.SIGKILL:
        how += " (by somebody, or by the system for want of memory)"
    if len(job.failures) > 1:
        how += f"; after it, {len(job.failures) - 1} more"
    text = f"rank {rank.number} on {rank.host} {how}"
    return Outcome(status, text, rank.number, may_restart=True)


def _killed(job: JobFacts, launcher: Child) -> Outcome | None:
    """Says that mpirun was killed, where ranks failed for want of it."""
    if launcher.ended_at is None or (launcher.status or 0) >= 0:
        return None
    if launcher.ended_at > job.failed_at + _TOGETHER_S:
        return None
    text = f"{_how_it_ended(job, launcher)}; after it, {named(job.failures)} failed"
    return Outcome(1, text, may_restart=True)


def _how_it_ended(job: JobFacts, launcher: Child) -> str:
    status = launcher.status or 0
    if status < 0:
        return f"{job.program} was killed by {signal_name(-status)}"
    return f"{job.program} ended with status {status}"


def _all_ended(job: JobFacts, ranks: Sequence[Rank]) -> Outcome:
    cut = [rank for rank in ranks if rank.cut]
    left = [rank for rank in ranks if not rank.cut]
    if cut and job.asked is not None:
        text = (
            f"{named(cut)} ended by {signal_name(job.asked)} and saved no checkpoint: the "
            "script has none to save, or there was no time"
        )
        return Outcome(128 + job.asked, text)
    if cut:
        why = f", when {named(left)} had left without finishing MPI" if left else ""
        return Outcome(1, f"{named(cut)} ended from outside{why}", may_restart=True)
    if all(rank.preempted for rank in ranks):
        return Outcome(PREEMPTED, "a checkpoint is saved, and the ranks have ended as asked")
    return Outcome(0)


def _lost(job: JobFacts, text: str, lost: Sequence[Rank]) -> Outcome:
    hosts = dict.fromkeys(rank.host for rank in lost)
    there = {rank.host for rank in job.ranks.values() if rank not in lost}
    whole = tuple(host for host in hosts if host not in there)
    return Outcome(1, text, lost[0].number, may_restart=True, lost=whole)


def _launcher_ended(job: JobFacts, launcher: Child) -> Outcome:
    status, how = launcher.status or 0, _how_it_ended(job, launcher)
    missing = job.size - len(job.ranks)
    if job.started_at is None:
        hosts, where = _never_came(job)
        text = f"{how} before {missing} of {job.size} ranks had started{where}"
        return Outcome(abs(status) or 1, text, may_restart=True, lost=hosts)
    running = job.running
    text = f"{how}, and nothing is known of how {named(running)} ended"
    return Outcome(1, text, running[0].number, may_restart=True)


def _over_time(job: JobFacts, launcher: Child, now: float) -> Outcome | None:
    total = job.limits.total
    if total is not None and now - job.began > total:
        return Outcome(TIMED_OUT, "--timeout: the job has not ended in time")
    if job.started_at is None and now - job.start_began > job.limits.start:
        job.unreached |= launcher.words()
        missing = [r for r in range(job.size) if r not in job.ranks]
        hosts, where = _never_came(job)
        return Outcome(
            TIMED_OUT,
            f"--start-timeout: {len(missing)} of {job.size} ranks have not started within "
            f"{job.limits.start:g} s{where}, rank {missing[0]} among them",
            may_restart=True,
            lost=hosts,
        )
    return None


def _never_came(job: JobFacts) -> tuple[tuple[str, ...], str]:
    """Hosts that are the reason why not all ranks have started, as far as that is known."""
    there = {rank.host for rank in job.ranks.values()}
    if not there:
        # mpirun starts no rank before it has come to all hosts.
        there = set(job.hosts) - job.unreached
    hosts = tuple(dict.fromkeys(host for host in job.hosts if host not in there))
    return hosts, f" ({', '.join(hosts)})" if hosts else ""
