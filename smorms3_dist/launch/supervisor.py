"""Attempts to run a job, one after the other, until one ends well or another has no point.

What is the same for all of them is found out before the first: what starts ranks, how many there
are, on which hosts, and what is in their environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import secrets
import shlex
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from smorms3_dist.launch import backends
from smorms3_dist.launch import environment as variables
from smorms3_dist.launch.addresses import own_addresses
from smorms3_dist.launch.arguments import Options, check_ranks, ranks_of
from smorms3_dist.launch.attempt import Attempt
from smorms3_dist.launch.backends import Backend, BackendError, LibraryCheck, OpenMpi, Srun, Start
from smorms3_dist.launch.child import heed, signal_name
from smorms3_dist.launch.environment import local_ranks
from smorms3_dist.launch.events import EventLog, versions
from smorms3_dist.launch.hosts import rank_hosts, with_ranks
from smorms3_dist.launch.output import Output, new_directory
from smorms3_dist.launch.restarts import Failure, early_failure
from smorms3_dist.launch.run_module import python_command
from smorms3_dist.launch.verdict import Limits, Outcome
from smorms3_dist.rank_page import PREEMPTED
from smorms3_dist.timeline.rank_timeline import TIMELINE

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


class Supervisor:
    """Runs what a command line asks for; a `BackendError` says why it cannot.

    Args:
        options: The command line.
        backend: What starts the ranks.
        check: That of the MPI library, which has begun, if Python is what the ranks run.
    """

    def __init__(
        self, options: Options, backend: Backend, check: LibraryCheck | None = None
    ) -> None:
        self._options = options
        self._backend = backend
        self._check = check
        self._hosts = None if options.hosts is None else list(options.hosts)
        if self._hosts is None and not isinstance(self._backend, Srun):
            self._hosts = backends.hosts_of_operator()
        self._ranks = self._find_ranks()
        check_ranks(options.tee, self._ranks)
        self._attempt: Attempt | None = None
        self._last_attempt: Attempt | None = None
        self._early_failures: set[Failure] = set()
        self._logs: Path | None = None
        self._output: Output | None = None
        self._events = EventLog()
        self._stopped: Outcome | None = None
        self._pause = asyncio.Event()

    def _find_ranks(self) -> int:
        options = self._options
        if options.ranks_per_host is not None and self._hosts is not None:
            self._hosts = with_ranks(self._hosts, options.ranks_per_host)
        slots = None if self._hosts is None else sum(host.slots for host in self._hosts)
        if isinstance(options.ranks, int):
            if slots is not None and options.ranks > slots:
                raise BackendError(f"{options.ranks} ranks are more than the {slots} slots there")
            return options.ranks
        if slots is not None:
            return slots
        nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
        if self._without_slurm and nodes != "1":
            raise BackendError(
                f"this allocation of Slurm's has {nodes} hosts, but there is no srun here that "
                "works, as in a container: give -n N for this host alone, or -H HOST:SLOTS,... for "
                "hosts that ssh reaches; or call it from outside of the container"
            )
        if options.ranks_per_host is not None:
            return (_slurm_nodes(os.environ) or 1) * options.ranks_per_host
        gpus = options.gpus_per_node
        if gpus is None and options.ranks is not None:
            on_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
            gpus = int(on_node) if on_node.isdigit() else None
        if tasks := _slurm_tasks(gpus, os.environ):
            return tasks
        if options.gpus_per_node is not None:
            return options.gpus_per_node
        if options.ranks is not None:
            return local_ranks(options.ranks)
        raise BackendError("say how many ranks there are to be: -n N, or -n auto")

    def dry_run(self) -> str:
        """What would be run, with the environment that is added, for a shell."""
        environment, forwarded = self._environment(0, 0, b"")
        words = [
            f"{name}={shlex.quote(value)}"
            for name, value in sorted(environment.items())
            if os.environ.get(name) != value and name not in (variables.SECRET, variables.SETTINGS)
        ]
        return " ".join([*words, shlex.join(self._backend.command(self._start(forwarded)))])

    async def run(self) -> int:
        """Makes attempts; returns the exit status."""
        if self._check is not None:
            self._check.finish(self._backend)
        if self._options.log_dir is not None:
            self._logs = new_directory(self._options.log_dir)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            heed({number: functools.partial(self._ask, number)})
        for number in (signal.SIGINT, signal.SIGHUP):
            heed({number: functools.partial(self._stop, number)})
        heed({signal.SIGQUIT: self._stacks})
        if self._options.timeline is not None:
            self._options.timeline.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(EventLog(self._options.events, self._say)) as self._events:
            return await self._make_attempts(time.monotonic())

    async def _make_attempts(self, began: float) -> int:
        count = 0
        while True:
            outcome, output = await self._run_once(count, began)
            try:
                again = self._may_go_on(outcome, count)
                if again and self._is_the_same_again(outcome, output):
                    again, why = False, "it has failed like this twice, before any step"
                    outcome = dataclasses.replace(outcome, text=f"{outcome.text}; {why}")
                if outcome.rank is not None:
                    output.show_tail(outcome.rank)
                if not again:
                    return self._end(outcome, output, began, count)
                output.say(outcome.text)
                count += 1
                self._events.attempt = count
                await self._wait_to_restart(output, count)
                if self._stopped is not None:
                    return self._end(self._stopped, output, began, count)
            finally:
                output.close()

    def _begin(self, output: Output) -> None:
        """Says, once, what is started."""
        if self._hosts is not None:
            where = ", ".join(host.name for host in self._hosts)
        elif "SLURM_JOB_ID" in os.environ and not self._without_slurm:
            where = f"the hosts of Slurm's job {os.environ['SLURM_JOB_ID']}"
        else:
            where = "this host"
        ranks = "1 rank" if self._ranks == 1 else f"{self._ranks} ranks"
        logs = "" if self._logs is None else f"; what they print is kept in {self._logs}"
        output.say(f"{ranks} on {where}{logs}")
        options = self._options
        self._events.note(
            "start",
            ranks=self._ranks,
            hosts=None if self._hosts is None else [host._asdict() for host in self._hosts],
            launcher=self._backend.program,
            command=list(options.command),
            versions={} if options.events is None else versions(),
            log_dir=None if self._logs is None else str(self._logs),
            checkpoint_dir=None if options.checkpoint_dir is None else str(options.checkpoint_dir),
            max_restarts=options.max_restarts,
        )

    def _end(self, outcome: Outcome, output: Output, began: float, restarts: int) -> int:
        """Says how it has all ended; returns the exit status."""
        seconds = time.monotonic() - began
        steps = 0 if self._last_attempt is None else self._last_attempt.steps
        made = "" if not steps else "1 step, " if steps == 1 else f"{steps} steps, "
        text = outcome.text or "all ranks have ended well"
        if outcome.status != 128 + signal.SIGPIPE:
            output.say(f"{text} ({made}{seconds:.1f} s, status {outcome.status})")
        self._events.note(
            "end",
            status=outcome.status,
            text=text,
            steps=steps,
            seconds=round(seconds, 3),
            restarts=restarts,
        )
        return outcome.status

    def _say(self, text: str) -> None:
        if self._output is not None:
            self._output.say(text)

    async def _run_once(self, count: int, began: float) -> tuple[Outcome, Output]:
        options = self._options
        directory = None if self._logs is None else self._logs / f"attempt-{count}"
        shown = ranks_of(options.tee, self._ranks)
        output = Output(self._ranks, shown, directory, options.timestamps)
        self._output = output
        if count == 0:
            self._begin(output)
        left = None if options.timeout is None else options.timeout - (time.monotonic() - began)
        hosts = [] if self._hosts is None else rank_hosts(self._hosts, self._ranks)
        limits = Limits(options.start_timeout, options.stall_timeout, left)
        attempt = Attempt(
            self._ranks,
            hosts,
            options.gpus_per_node,
            limits,
            output,
            self._events,
            options.interfaces,
        )
        self._attempt = self._last_attempt = attempt
        secret = secrets.token_bytes(32)

        def command(port: int) -> tuple[Sequence[str], Mapping[str, str]]:
            environment, forwarded = self._environment(count, port, secret, temporary)
            return self._backend.command(self._start(forwarded)), environment

        # What mpirun of another job has left behind, whose process had the same number, is not
        # there.
        with tempfile.TemporaryDirectory(
            prefix="smorms3-", ignore_cleanup_errors=True
        ) as temporary:
            try:
                outcome = await attempt.run(command, secret, self._is_everywhere)
            finally:
                self._attempt = None
        if outcome.status not in (0, PREEMPTED):
            attempt.note_failure(outcome)
        return outcome, output

    @property
    def _without_slurm(self) -> bool:
        return isinstance(self._backend, OpenMpi) and self._backend.without_slurm

    @property
    def _is_everywhere(self) -> bool:
        return self._hosts is not None or "SLURM_JOB_ID" in os.environ

    def _start(self, forwarded: Sequence[str]) -> Start:
        options = self._options
        agent = [*python_command("smorms3_dist.launch.agent"), *options.command]
        more = options.bind_to, options.mpi_args
        return Start(agent, self._ranks, self._hosts, forwarded, *more)

    def _environment(
        self, count: int, port: int, secret: bytes, temporary: str | None = None
    ) -> tuple[dict[str, str], list[str]]:
        """The environment of a job, and the names in it that other hosts get.

        Files of mpirun's own go to a directory of the job. Ranks get the user's.
        """
        options = self._options
        addresses = own_addresses(options.interfaces) if self._is_everywhere else ["127.0.0.1"]
        settings = {
            "addresses": addresses,
            "port": port,
            "start_timeout": options.start_timeout,
            "launcher_timeout": options.launcher_timeout,
            "interfaces": options.interfaces,
            "temporary": [temporary, os.environ.get("TMPDIR")],
        }
        own = {
            variables.SETTINGS: json.dumps(settings),
            variables.SECRET: secret.hex(),
            variables.RESTART_COUNT: str(count),
        }
        if options.checkpoint_dir is not None:
            own[variables.CHECKPOINT_DIRECTORY] = str(options.checkpoint_dir)
        if options.timeline is not None:
            own[TIMELINE] = str(options.timeline)
        if options.bind_to != "none":
            own[variables.BOUND] = options.bind_to
        added = {**self._backend.environment(), **options.environment, **own}
        environment = {**os.environ, **added}
        if temporary is not None and not isinstance(self._backend, Srun):
            environment["TMPDIR"] = temporary
        return environment, variables.forwarded(environment, [*options.named, *added])

    # Restarts

    def _may_go_on(self, outcome: Outcome, count: int) -> bool:
        """Whether another job is to follow; takes lost hosts out then."""
        options = self._options
        if not outcome.may_restart or count >= options.max_restarts:
            return False
        if options.min_ranks is None or not outcome.lost or self._hosts is None:
            return True
        there = [host for host in self._hosts if host.name not in outcome.lost]
        ranks = min(self._ranks, sum(host.slots for host in there))
        if ranks < options.min_ranks:
            return False
        self._hosts, self._ranks = there, ranks
        return True

    def _is_the_same_again(self, outcome: Outcome, output: Output) -> bool:
        """Whether the script has failed before any step, as it had done before."""
        attempt, rank = self._last_attempt, outcome.rank
        if not self._options.is_python or attempt is None:
            return False
        if attempt.steps:
            self._early_failures.clear()
        # A failure of another kind in between, of a host, say, makes it no more likely to succeed.
        if rank is None or not attempt.has_failed(rank):
            return False
        seconds, lines = time.monotonic() - attempt.job.began, output.last_words(rank)
        failure = early_failure(outcome.status, attempt.steps, seconds, lines)
        if failure is None or failure in self._early_failures:
            return failure is not None
        self._early_failures.add(failure)
        return False

    async def _wait_to_restart(self, output: Output, count: int) -> None:
        seconds = min(_FIRST_PAUSE_S * 2 ** (count - 1), _LONGEST_PAUSE_S)
        where = "" if self._hosts is None else f" on {', '.join(h.name for h in self._hosts)}"
        output.say(
            f"restart {count} of {self._options.max_restarts} in {seconds:g} s, {self._ranks} "
            f"ranks{where}{self._newest_step()}"
        )
        self._events.note(
            "restart",
            ranks=self._ranks,
            hosts=None if self._hosts is None else [host._asdict() for host in self._hosts],
            pause=seconds,
        )
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._pause.wait(), seconds)

    def _newest_step(self) -> str:
        directory = self._options.checkpoint_dir
        if directory is None:
            return ""
        # NumPy, which this imports, takes longer than everything else that comes before the ranks.
        from smorms3_dist.checkpoint.files import CheckpointDirectory, CheckpointError

        try:
            step = CheckpointDirectory(directory).latest()
        except CheckpointError as error:
            return f"; {error}"
        return ", from the start: no step is saved yet" if step is None else f", from step {step}"

    # Signals

    def _ask(self, number: int) -> None:
        if self._attempt is not None:
            self._attempt.ask(number)
        else:
            # What there is to be saved is saved.
            text = f"{signal_name(number)}: the job is not started again"
            self._stopped = Outcome(PREEMPTED, text)
            self._pause.set()

    def _stop(self, number: int) -> None:
        text = f"{signal_name(number)}: the job ends"
        self._stopped = Outcome(128 + number, text)
        self._pause.set()
        if self._attempt is not None:
            self._attempt.stop(128 + number, text)

    def _stacks(self) -> None:
        if self._attempt is not None:
            self._attempt.stacks()


def _slurm_nodes(environment: Mapping[str, str]) -> int | None:
    """The number of hosts of an allocation of Slurm's."""
    nodes = environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES", ""))
    return int(nodes) if nodes.isdigit() else None


def _slurm_tasks(gpus_per_node: int | None, environment: Mapping[str, str]) -> int | None:
    """The number of ranks that an allocation of Slurm's is for."""
    for name in ("SLURM_NTASKS", "SLURM_NPROCS"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    nodes = _slurm_nodes(environment)
    if nodes is None:
        return None
    each = environment.get("SLURM_NTASKS_PER_NODE", "")
    return nodes * (int(each) if each.isdigit() else gpus_per_node or 1)
