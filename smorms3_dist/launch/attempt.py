"""One job, run: mpirun or srun, an agent beside each rank, and what they are told and say.

When the job is over, and how it has ended, is the verdict's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence

from smorms3_dist.launch import network, verdict, wire
from smorms3_dist.launch.child import Child, signal_name
from smorms3_dist.launch.events import EventLog
from smorms3_dist.launch.output import Output
from smorms3_dist.launch.ranks import Rank, named, wait_text
from smorms3_dist.launch.verdict import JobFacts, Limits, Outcome
from smorms3_dist.launch.which_rank import WhichRank
from smorms3_dist.rank_page import PREEMPTED
from smorms3_dist.version import __version__

_TICK_S = 0.25
_PING_S = 2.0

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
        self.job = JobFacts(ranks, hosts, limits)
        self._gpus = gpus
        self._output = output
        self._events = EventLog() if events is None else events
        self._interfaces = interfaces
        self._connected: dict[int, network.Connected] = {}
        self._signalled = False
        self._decided: Outcome | None = None
        self._looked = self.job.began
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
        self.job.program = os.path.basename(words[0])
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
                patience = _LEAVE_S if self.job.ranks else 0.0
            if not await launcher.wait(patience):
                launcher.signal(signal.SIGTERM)
                await launcher.wait(_KILL_S)
        finally:
            # Whatever happens, nothing stays behind: agents end when their connection does.
            launcher.signal(signal.SIGKILL)
            if self.job.started_at is None:
                # mpirun leaves an ssh behind that still tries to reach a host.
                launcher.kill_session()
            for rank in self.job.ranks.values():
                rank.wire.close()
            server.close()
            for task in (reading, pinging, *self._tasks):
                task.cancel()
            await asyncio.gather(reading, pinging, *self._tasks, return_exceptions=True)
            await launcher.ended.wait()
        return outcome

    @property
    def steps(self) -> int:
        """How many steps the rank has made that has made most."""
        return max((rank.finished for rank in self.job.ranks.values()), default=0)

    def has_failed(self, number: int) -> bool:
        """Whether a rank has ended by itself, and not well."""
        return number in self.job.ranks and self.job.ranks[number].has_failed

    def note_failure(self, outcome: Outcome) -> None:
        """Notes among the events that the attempt has ended badly."""
        rank = self.job.ranks.get(-1 if outcome.rank is None else outcome.rank)
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
        if self.job.started_at is None:
            self.stop(PREEMPTED, f"{signal_name(number)}: the job ends before it has started")
        elif self._signalled:
            self.stop(128 + number, f"{signal_name(number)}: the job ends")
        else:
            self._signalled = True
            self._ask_ranks(number)

    def _ask_ranks(self, number: int) -> None:
        if self.job.asked is not None:
            return
        self.job.asked = number
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
        if which.size != self.job.size or which.rank in self.job.ranks:
            self.stop(
                2,
                f"every rank is a job of its own: {which.host} has a rank {which.rank} of "
                f"{which.size}, where {self.job.size} ranks were started. The launcher does not "
                "fit the MPI library, or Slurm's --mpi is wrong; smorms3-dist doctor says more",
            )
            raise wire.WireError("not a rank of this job")
        host = self.job.hosts[which.rank] if self.job.hosts else which.host
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
        self.job.ranks[which.rank] = rank
        if len(self.job.ranks) == self.job.size and self._decided is None:
            self.job.started_at = time.monotonic()
            for each in self.job.ranks.values():
                each.stepped_at = each.printed_at = self.job.started_at
            self._start()
        return rank

    def _start(self) -> None:
        """Lets all ranks begin, with the interfaces by which they are to talk."""
        interfaces = network.interfaces_of(self._connected, bool(self._interfaces))
        listed = []
        for number, rank in sorted(self.job.ranks.items()):
            names = interfaces[number]
            rank.wire.tell(do="start", interfaces=names)
            listed.append({"rank": number, "host": rank.host, "interfaces": names})
        self._note("ranks", ranks=listed)
        by_host = {self.job.ranks[n].host: names for n, names in sorted(interfaces.items())}
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
                if not self.job.failures:
                    self.job.failed_at = time.monotonic()
                self.job.failures.append(rank)
            self._changed.set()

    def _note(self, event: str, **facts: object) -> None:
        self._events.note(event, seconds=round(time.monotonic() - self.job.began, 3), **facts)

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
        for rank in self.job.ranks.values():
            rank.wire.tell(do=order)

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(_PING_S)
            self._tell_all("ping")

    # mpirun

    def _hear_launcher(self, line: bytes, is_error: bool) -> None:
        # What it says of a failure is said better from what the agents know.
        if self.job.failures or self._decided is not None or not line.strip():
            return
        self.job.unreached.update(map(os.fsdecode, _UNREACHED.findall(line)))
        self._output.launcher_line(line.rstrip(b"\r\n"))

    # Judgement

    async def _watch(self, launcher: Child) -> Outcome:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _TICK_S)
            self._changed.clear()
            now = time.monotonic()
            self._allow_for_absence(now)
            self._tell_of_waits(now)
            outcome = self._decided or verdict.judge(self.job, launcher, now)
            if outcome is None and (stalled := verdict.stalled(self.job, now)):
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
        self.job.start_began += absent
        for rank in self.job.ranks.values():
            # What they have sent in the meantime is still to be read.
            rank.heard_at = rank.stepped_at = now
        if absent > _STOPPED_S:
            self._output.say(f"this process has not run for {absent:.0f} s; the job goes on")

    def _tell_of_waits(self, now: float) -> None:
        """Says which ranks have not come, some time after others have said that they wait."""
        if self._said_at is None or now - self._said_at < _SETTLE_S:
            return
        self._said_at = None
        text, culprits = wait_text(list(self.job.ranks.values()))
        # Others say the same later, of the same wait.
        still = culprits and any(rank.waits for rank in self.job.ranks.values())
        if still and text != self._said_last:
            self._said_last = text
            self._output.say(f"{text}. The stacks of {named(culprits)}:")
            self._note("stall", text=text, ranks=[rank.number for rank in culprits])
            for rank in culprits:
                rank.wire.tell(do="stacks")


def _listening(everywhere: bool) -> socket.socket:
    if everywhere and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    return socket.create_server(("" if everywhere else "127.0.0.1", 0), backlog=1024)
