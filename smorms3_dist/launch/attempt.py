"""One job: mpirun or srun, an agent beside each rank, and what has become of them.

The job is over when every rank has said how it has ended, or when it is clear that one never will.
mpirun's own exit status decides nothing: it is 0 in cases where ranks have vanished.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence

from smorms3_dist.launch import network, wire
from smorms3_dist.launch.child import Child, signal_name
from smorms3_dist.launch.events import EventLog
from smorms3_dist.launch.output import Output
from smorms3_dist.launch.ranks import Rank, named, stall_text, wait_text
from smorms3_dist.launch.which_rank import WhichRank
from smorms3_dist.rank_page import PREEMPTED
from smorms3_dist.version import __version__

_TICK_S = 0.25
_PING_S = 2.0

_SILENCE_S = 15.0
"""How long a host may send nothing before it counts as lost: agents send something each second."""

_QUIET_S = 2.5
"""How long a host may send nothing before it is waited for: until it does, or counts as lost."""

_TOGETHER_S = 0.5
"""How long after a first failure others may come in, so that the right one is reported."""

_GONE_S = 2.0
"""How long after the end of mpirun, or of a connection, there may still be words on their way."""

_LEAVE_S = 5.0
"""How long mpirun has when ranks were told to end, until it is asked to end itself."""

_KILL_S = 3.0
"""How long it has then, until it is killed."""

_STACKS_S = 2.0
"""How long ranks have to print their stacks."""

_SETTLE_S = 2.5
"""How long after a rank has said that it waits it is known of all whether they do."""

_LATE_S = 3.0
"""If this process itself has not run for so long, the silence of others says nothing."""

_STOPPED_S = 15.0
"""If it has not run for so long, somebody has stopped it, or the machine."""

_UNREACHED = re.compile(rb"Remote host:\s+(\S+)")
"""How Open MPI's mpirun names a host on which it could not start anything."""

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


class Attempt:
    """One attempt to run a job, on a host for each rank, where the launcher decides that.

    Each host must have so many GPUs. The limit for all of it is what is left of that.
    """

    def __init__(
        self,
        ranks: int,
        hosts: Sequence[str],
        gpus: int | None,
        limits: Limits,
        output: Output,
        events: EventLog | None = None,
        interfaces: Sequence[str] = (),
    ) -> None:
        self._size = ranks
        self._hosts = hosts
        self._gpus = gpus
        self._limits = limits
        self._output = output
        self._events = EventLog() if events is None else events
        self._interfaces = interfaces
        self._ranks: dict[int, Rank] = {}
        self._connected: dict[int, network.Connected] = {}
        self._failures: list[Rank] = []
        self._failed_at = 0.0
        self._asked: int | None = None
        self._signalled = False
        self._decided: Outcome | None = None
        self._program = ""
        self._began = self._start_began = self._looked = time.monotonic()
        self._started_at: float | None = None
        self._process_ended_at: float | None = None
        self._unreached: set[str] = set()
        self._said_at: float | None = None
        self._said_last = ""
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(
        self,
        command: Callable[[int], tuple[Sequence[str], Mapping[str, str]]],
        secret: bytes,
        everywhere: bool,
    ) -> Outcome:
        """Runs the command line, with its environment, that there is for the launcher's port.

        Agents prove that they know the secret. They come from other hosts, too, or from this one.
        """
        server = await asyncio.start_server(
            lambda r, w: self._serve(wire.Wire(r, w), secret), sock=_listening(everywhere)
        )
        port = server.sockets[0].getsockname()[1]
        words, environment = command(port)
        self._program = os.path.basename(words[0])
        launcher = Child(words, environment, new_session=True)
        reading = asyncio.create_task(
            launcher.read(self._hear_launcher, drain=lambda: asyncio.sleep(0))
        )
        pinging = asyncio.create_task(self._ping())
        try:
            outcome = await self._watch(launcher)
            patience = 30.0
            if outcome.status != 0:
                self._tell_all("end")
                # If nobody is there to be told, it does not end by itself.
                patience = _LEAVE_S if self._ranks else 0.0
            if not await launcher.wait(patience):
                launcher.signal(signal.SIGTERM)
                await launcher.wait(_KILL_S)
        finally:
            # Whatever happens, nothing stays behind: agents end when their connection does.
            launcher.signal(signal.SIGKILL)
            if self._started_at is None:
                # mpirun leaves an ssh behind that still tries to reach a host.
                launcher.kill_session()
            for rank in self._ranks.values():
                rank.wire.close()
            server.close()
            for task in (reading, pinging, *self._tasks):
                task.cancel()
            await asyncio.gather(reading, pinging, *self._tasks, return_exceptions=True)
            await launcher.ended.wait()
        return outcome

    @property
    def began(self) -> float:
        """When it began, by the monotonic clock."""
        return self._began

    @property
    def steps(self) -> int:
        """How many steps the rank has made that has made most."""
        return max((rank.finished for rank in self._ranks.values()), default=0)

    def has_failed(self, number: int) -> bool:
        """Whether a rank has ended by itself, and not well."""
        return number in self._ranks and self._ranks[number].has_failed

    def note_failure(self, outcome: Outcome) -> None:
        """Notes among the events that the attempt has ended badly."""
        rank = self._ranks.get(-1 if outcome.rank is None else outcome.rank)
        self._note(
            "failure",
            status=outcome.status,
            text=outcome.text,
            rank=outcome.rank,
            host=None if rank is None else rank.host,
            lost_hosts=list(outcome.lost),
            steps=self.steps,
        )

    # From outside

    def ask(self, number: int) -> None:
        """For a signal, asks the ranks to save a checkpoint and to end; ends them for a second."""
        if self._started_at is None:
            self.stop(PREEMPTED, f"{signal_name(number)}: the job ends before it has started")
        elif self._signalled:
            self.stop(128 + number, f"{signal_name(number)}: the job ends")
        else:
            self._signalled = True
            self._ask_ranks(number)

    def _ask_ranks(self, number: int) -> None:
        if self._asked is not None:
            return
        self._asked = number
        self._output.say(
            f"{signal_name(number)}: the ranks are asked to save a checkpoint and to end; a second "
            "signal ends them at once"
        )
        self._tell_all("ask")

    def stop(self, status: int, text: str = "") -> None:
        """Ends the job now, if that is not decided yet."""
        self._decided = self._decided or Outcome(status, text)
        self._changed.set()

    def stacks(self) -> None:
        """Lets every rank print its stacks."""
        self._tell_all("stacks")

    # Agents

    async def _serve(self, connection: wire.Wire, secret: bytes) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        rank = None
        try:
            await asyncio.wait_for(connection.prove(secret, listening=True), 10)
            while (frame := await connection.receive()) is not None:
                kind, content = frame
                if kind == wire.MESSAGE:
                    message = wire.parse(content)
                    if rank is None:
                        rank = self._register(connection, message)
                    else:
                        self._hear(rank, message)
                elif rank is not None:
                    rank.heard_at = rank.printed_at = time.monotonic()
                    self._print(rank, content, kind == wire.STDERR)
        except (OSError, wire.WireError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # a stranger, or an agent that is gone: both are noted below
        finally:
            connection.close()
            self._tasks.discard(task)
            if rank is not None and rank.end is None and rank.gone_at is None:
                rank.gone_at = time.monotonic()
                self._changed.set()

    def _register(self, connection: wire.Wire, message: Mapping[str, object]) -> Rank:
        hello = message.get("hello")
        if not isinstance(hello, dict):
            raise wire.WireError("no greeting")
        which = WhichRank(**hello)
        if which.size != self._size or which.rank in self._ranks:
            self.stop(
                2,
                f"every rank is a job of its own: {which.host} has a rank {which.rank} of "
                f"{which.size}, where {self._size} ranks were started. The launcher does not fit "
                "the MPI library, or Slurm's --mpi is wrong; smorms3-dist doctor says more",
            )
            raise wire.WireError("not a rank of this job")
        host = self._hosts[which.rank] if self._hosts else which.host
        gpus = message.get("gpus")
        if self._gpus is not None and isinstance(gpus, int) and gpus < self._gpus:
            self.stop(2, f"{host} has {gpus} GPUs, where --gpus-per-node asks for {self._gpus}")
        if message.get("version") != __version__:
            self.stop(
                2,
                f"{host} has smorms3_dist {message.get('version')}, where the launcher has "
                f"{__version__}: install the same version on all hosts",
            )
        if not message.get("interfaces") and self._interfaces:
            self.stop(
                2,
                f"{host} has no network interface {' or '.join(self._interfaces)}; it has "
                f"{message.get('there') or 'none but loopback'}",
            )
        self._connected[which.rank] = network.connected(connection, message)
        rank = Rank(which.rank, host, connection)
        self._ranks[which.rank] = rank
        if len(self._ranks) == self._size and self._decided is None:
            self._started_at = time.monotonic()
            for each in self._ranks.values():
                each.stepped_at = each.printed_at = self._started_at
            self._start()
        return rank

    def _start(self) -> None:
        """Lets all ranks begin, with the interfaces by which they are to talk."""
        interfaces = network.interfaces_of(self._connected, bool(self._interfaces))
        listed = []
        for number, rank in sorted(self._ranks.items()):
            names = interfaces[number]
            rank.wire.tell(do="start", interfaces=names)
            listed.append({"rank": number, "host": rank.host, "interfaces": names})
        self._note("ranks", ranks=listed)
        by_host = {rank.host: interfaces[number] for number, rank in sorted(self._ranks.items())}
        if any(by_host.values()):
            words = (f"{','.join(names) or '?'} of {host}" for host, names in by_host.items())
            self._output.say(f"ranks talk by {'; '.join(words)}")

    def _hear(self, rank: Rank, message: Mapping[str, object]) -> None:
        said, saves, steps = rank.said, rank.saves, self.steps
        rank.hear(message)
        if not steps and self.steps:
            self._note("first_step")
        if rank.saves > saves and rank.number == 0:
            self._note("checkpoint", step=rank.saved)
        if rank.said > said:
            self._said_at = time.monotonic()
        if message.get("asked"):
            # It has told an agent. A signal to this process may follow, and is no second one.
            self._ask_ranks(signal.SIGUSR1)
        if "end" in message:
            rank.wire.tell(do="bye")
            if rank.has_failed:
                if not self._failures:
                    self._failed_at = time.monotonic()
                self._failures.append(rank)
            self._changed.set()

    def _note(self, event: str, **facts: object) -> None:
        self._events.note(event, seconds=round(time.monotonic() - self._began, 3), **facts)

    def _print(self, rank: Rank, piece: bytes, is_error: bool) -> None:
        try:
            self._output.piece(rank.number, piece, is_error)
        except OSError as error:
            self.stop(1, f"--log-dir: the file of rank {rank.number}: {error.strerror}")
        if self._output.trouble is not None:
            stream, trouble = self._output.trouble
            if isinstance(trouble, BrokenPipeError):
                self.stop(128 + signal.SIGPIPE)
            self.stop(1, f"{stream} cannot be written: {trouble.strerror}; the job ends")

    def _tell_all(self, order: str) -> None:
        for rank in self._ranks.values():
            rank.wire.tell(do=order)

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(_PING_S)
            self._tell_all("ping")

    # mpirun

    def _hear_launcher(self, line: bytes, is_error: bool) -> None:
        # What it says of a failure is said better from what the agents know.
        if self._failures or self._decided is not None or not line.strip():
            return
        self._unreached.update(map(os.fsdecode, _UNREACHED.findall(line)))
        self._output.launcher_line(line.rstrip(b"\r\n"))

    # Judgement

    async def _watch(self, launcher: Child) -> Outcome:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _TICK_S)
            self._changed.clear()
            now = time.monotonic()
            self._allow_for_absence(now)
            if launcher.status is not None and self._process_ended_at is None:
                self._process_ended_at = launcher.ended_at
            self._tell_of_waits(now)
            outcome = self._decided or self._judge(now, launcher)
            if outcome is None and (stalled := self._stalled(now)):
                outcome = stalled
                self._note("stall", text=stalled.text, ranks=[stalled.rank])
                self.stacks()
                await asyncio.sleep(_STACKS_S)
            if outcome is not None:
                self._decided = outcome
                return outcome

    def _allow_for_absence(self, now: float) -> None:
        """Holds nothing against anybody that has happened while this process did not run."""
        absent = now - self._looked
        self._looked = now
        if absent <= _LATE_S:
            return
        self._start_began += absent
        for rank in self._ranks.values():
            # What they have sent in the meantime is still to be read.
            rank.heard_at = rank.stepped_at = now
        if absent > _STOPPED_S:
            self._output.say(f"this process has not run for {absent:.0f} s; the job goes on")

    def _tell_of_waits(self, now: float) -> None:
        """Says which ranks have not come, some time after others have said that they wait."""
        if self._said_at is None or now - self._said_at < _SETTLE_S:
            return
        self._said_at = None
        text, culprits = wait_text(list(self._ranks.values()))
        # Others say the same later, of the same wait.
        still = culprits and any(rank.waits for rank in self._ranks.values())
        if still and text != self._said_last:
            self._said_last = text
            self._output.say(f"{text}. The stacks of {named(culprits)}:")
            self._note("stall", text=text, ranks=[rank.number for rank in culprits])
            for rank in culprits:
                rank.wire.tell(do="stacks")

    def _judge(self, now: float, launcher: Child) -> Outcome | None:
        ranks = list(self._ranks.values())
        ended = [rank for rank in ranks if rank.end is not None]
        everybody = len(ended) == self._size
        waited = {r: now - r.heard_at for r in ranks if r.end is None and r.gone_at is None}
        quiet = [rank for rank, seconds in waited.items() if seconds > _QUIET_S]
        if hosts := dict.fromkeys(r.host for r in quiet if waited[r] > _SILENCE_S):
            silent = [rank for rank in quiet if rank.host in hosts]
            why = f"not heard of for {_SILENCE_S:g} s, with {named(silent)}"
            return self._lost(f"{', '.join(hosts)}: {why}", silent)
        if quiet:
            # When a host is lost, MPI ends the ranks of the others: what they say is no reason.
            return self._over_time(now, launcher)
        if self._failures and (everybody or now - self._failed_at > _TOGETHER_S):
            return self._killed(launcher) or self._failed(self._failures[0])
        if everybody:
            return self._all_ended(ended)
        gone = [rank for rank in ranks if rank.gone_at is not None]
        if gone and now - min(rank.gone_at or now for rank in gone) > _GONE_S:
            where = ", ".join(dict.fromkeys(rank.host for rank in gone))
            why = f"a process of {where} was killed, or the host is gone"
            return self._lost(f"{named(gone)} vanished: {why}", gone)
        if self._process_ended_at is not None and now - self._process_ended_at > _GONE_S:
            return self._launcher_ended(launcher)
        return self._over_time(now, launcher)

    def _failed(self, rank: Rank) -> Outcome:
        assert rank.end is not None
        status, how = rank.end, f"failed with exit status {rank.end}"
        if rank.end < 0:
            status, how = 128 - rank.end, f"was killed by {signal_name(-rank.end)}"
        if rank.end == -signal.SIGKILL:
            how += " (by somebody, or by the system for want of memory)"
        if len(self._failures) > 1:
            how += f"; after it, {len(self._failures) - 1} more"
        text = f"rank {rank.number} on {rank.host} {how}"
        return Outcome(status, text, rank.number, may_restart=True)

    def _killed(self, launcher: Child) -> Outcome | None:
        """Says that mpirun was killed, where ranks failed for want of it."""
        if launcher.ended_at is None or (launcher.status or 0) >= 0:
            return None
        if launcher.ended_at > self._failed_at + _TOGETHER_S:
            return None
        text = f"{self._how_it_ended(launcher)}; after it, {named(self._failures)} failed"
        return Outcome(1, text, may_restart=True)

    def _how_it_ended(self, launcher: Child) -> str:
        status = launcher.status or 0
        if status < 0:
            return f"{self._program} was killed by {signal_name(-status)}"
        return f"{self._program} ended with status {status}"

    def _all_ended(self, ranks: Sequence[Rank]) -> Outcome:
        cut = [rank for rank in ranks if rank.cut]
        left = [rank for rank in ranks if not rank.cut]
        if cut and self._asked is not None:
            text = (
                f"{named(cut)} ended by {signal_name(self._asked)} and saved no checkpoint: the "
                "script has none to save, or there was no time"
            )
            return Outcome(128 + self._asked, text)
        if cut:
            why = f", when {named(left)} had left without finishing MPI" if left else ""
            return Outcome(1, f"{named(cut)} ended from outside{why}", may_restart=True)
        if all(rank.preempted for rank in ranks):
            return Outcome(PREEMPTED, "a checkpoint is saved, and the ranks have ended as asked")
        return Outcome(0)

    def _lost(self, text: str, lost: Sequence[Rank]) -> Outcome:
        hosts = dict.fromkeys(rank.host for rank in lost)
        there = {rank.host for rank in self._ranks.values() if rank not in lost}
        whole = tuple(host for host in hosts if host not in there)
        return Outcome(1, text, lost[0].number, may_restart=True, lost=whole)

    def _launcher_ended(self, launcher: Child) -> Outcome:
        status, how = launcher.status or 0, self._how_it_ended(launcher)
        missing = self._size - len(self._ranks)
        if self._started_at is None:
            hosts, where = self._never_came()
            text = f"{how} before {missing} of {self._size} ranks had started{where}"
            return Outcome(abs(status) or 1, text, may_restart=True, lost=hosts)
        running = [rank for rank in self._ranks.values() if rank.end is None]
        text = f"{how}, and nothing is known of how {named(running)} ended"
        return Outcome(1, text, running[0].number, may_restart=True)

    def _over_time(self, now: float, launcher: Child) -> Outcome | None:
        total = self._limits.total
        if total is not None and now - self._began > total:
            return Outcome(TIMED_OUT, "--timeout: the job has not ended in time")
        if self._started_at is None and now - self._start_began > self._limits.start:
            self._unreached |= launcher.words()
            missing = [r for r in range(self._size) if r not in self._ranks]
            hosts, where = self._never_came()
            return Outcome(
                TIMED_OUT,
                f"--start-timeout: {len(missing)} of {self._size} ranks have not started within "
                f"{self._limits.start:g} s{where}, rank {missing[0]} among them",
                may_restart=True,
                lost=hosts,
            )
        return None

    def _never_came(self) -> tuple[tuple[str, ...], str]:
        """Hosts that are the reason why not all ranks have started, as far as that is known."""
        there = {rank.host for rank in self._ranks.values()}
        if not there:
            # mpirun starts no rank before it has come to all hosts.
            there = set(self._hosts) - self._unreached
        hosts = tuple(dict.fromkeys(host for host in self._hosts if host not in there))
        return hosts, f" ({', '.join(hosts)})" if hosts else ""

    def _stalled(self, now: float) -> Outcome | None:
        limit = self._limits.stall
        if limit is None or self._started_at is None:
            return None
        running = [rank for rank in self._ranks.values() if rank.end is None]
        if not running or now - min(rank.last_sign for rank in running) <= limit:
            return None
        why, culprit = stall_text(list(self._ranks.values()))
        text = f"--stall-timeout: no step for {limit:g} s: {why}"
        return Outcome(TIMED_OUT, text, culprit.number, may_restart=True)


def _listening(everywhere: bool) -> socket.socket:
    if everywhere and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    return socket.create_server(("" if everywhere else "127.0.0.1", 0), backlog=1024)
