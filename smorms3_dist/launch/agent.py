"""``python -m smorms3_dist.launch.agent COMMAND...``: the process beside a rank.

mpirun or srun start it, and it starts the command. It sends what the command prints to the
launcher, tells how far it has come and how it has ended, and ends it when the launcher says so, or
is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smorms3_dist import rank_page
from smorms3_dist.launch import network, wire
from smorms3_dist.launch.child import Child, Keeper, heed
from smorms3_dist.launch.environment import SECRET, SETTINGS, threads
from smorms3_dist.launch.shared_memory import SharedMemory
from smorms3_dist.launch.which_rank import WhichRank, gpus, which_rank
from smorms3_dist.version import __version__

_HEARTBEAT_S = 1.0
_LOOK_S = 0.05
"""How often it looks whether the command is about to fail."""

_SILENCE_S = 60.0
"""How long the launcher may say nothing until that is told of, or its host, until it is lost."""

_PATIENCE_S = 0.7
"""How long the command has from SIGTERM to SIGKILL. Open MPI gives the agent itself a second."""

_LEFT_BEHIND_S = 2.0
"""How long children may go on that a command has left behind, which has ended well."""

_FAILED_S = 0.3
"""How long they may if it has failed."""

_PR_SET_PDEATHSIG = 1

LAUNCHER_GONE = 125
"""The exit status of an agent that has lost its launcher."""


class Agent:
    """One agent, beside a rank, which is the command; settings and secret are the launcher's."""

    def __init__(
        self, which: WhichRank, settings: Mapping[str, Any], secret: bytes, command: list[str]
    ) -> None:
        self._which = which
        self._settings = settings
        self._secret = secret
        self._command = command
        self._child: Child | None = None
        self._page = rank_page.Page()
        self._started = asyncio.Event()
        self._over = asyncio.Event()
        self._ended_by_us = False
        self._told = False
        self._told_of_silence = False
        self._interfaces: list[str] = []
        self._heard = time.monotonic()

    async def run(self) -> int:
        """Does everything; returns the exit status."""
        try:
            self._wire = await self._connect()
        except TimeoutError as error:
            print(f"smorms3_dist: rank {self._which.rank}: {error}", file=sys.stderr)
            return LAUNCHER_GONE
        heed(dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self._end))
        heed({signal.SIGUSR1: lambda: self._wire.tell(asked=True)})
        self._wire.tell(
            hello=self._which._asdict(),
            gpus=gpus(),
            version=__version__,
            **network.greeting(self._wire, self._settings["interfaces"]),
        )
        listening = asyncio.create_task(self._listen())
        beating = asyncio.create_task(self._beat())
        try:
            await self._wait_for_start()
            if self._over.is_set():
                return LAUNCHER_GONE
            with tempfile.TemporaryDirectory(prefix="smorms3_dist-") as directory:
                status = await self._run_command(os.path.join(directory, "page"))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._over.wait(), 5)
            return status
        finally:
            listening.cancel()
            beating.cancel()
            self._wire.close()

    async def _connect(self) -> wire.Wire:
        deadline = time.monotonic() + float(self._settings["start_timeout"])
        port = self._settings["port"]
        problems: dict[str, str] = {}
        while True:
            for address in self._settings["addresses"]:
                try:
                    return await asyncio.wait_for(self._connect_to(address, port), 5)
                except (OSError, wire.WireError, asyncio.TimeoutError) as error:
                    problems[address] = str(error) or "no answer"
            if time.monotonic() > deadline:
                listed = "; ".join(f"{where}: {what}" for where, what in problems.items())
                raise TimeoutError(
                    f"host {self._which.host} cannot reach the launcher at port {port} ({listed}). "
                    "Let a firewall pass connections among the hosts of the job"
                )
            await asyncio.sleep(0.5)

    async def _connect_to(self, address: str, port: int) -> wire.Wire:
        connection = wire.Wire(*await asyncio.open_connection(address, port))
        try:
            await connection.prove(self._secret, listening=False)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _wait_for_start(self) -> None:
        waiting = [asyncio.create_task(e.wait()) for e in (self._started, self._over)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()

    # What the launcher says

    async def _listen(self) -> None:
        try:
            while (frame := await self._wire.receive()) is not None:
                self._heard = time.monotonic()
                message = wire.parse(frame[1])
                if message.get("do") == "start":
                    self._interfaces = list(message["interfaces"])
                self._obey(str(message.get("do")))
        except (OSError, wire.WireError):
            pass  # as good as a closed connection
        self._over.set()
        self._end()

    def _obey(self, order: str) -> None:
        if order == "start":
            self._started.set()
        elif order == "end":
            self._end()
        elif order == "bye":
            self._over.set()
        elif order == "ask":
            if self._page.handles:
                self._page.asked = 1
            else:
                # Nobody looks at the page, so the command gets the signal itself.
                self._end()
        elif order == "stacks" and self._page.attached and self._child is not None:
            self._child.signal(signal.SIGQUIT)

    # The command

    async def _run_command(self, page: str) -> int:
        with open(page, "xb") as file:
            file.write(bytes(rank_page.NBYTES))
        self._page = rank_page.Page(page)
        environment = {**os.environ, rank_page.PAGE: page}
        del environment[SECRET], environment[SETTINGS]
        environment.update(threads(environment, self._which.local_size))
        wanted = bool(self._settings["interfaces"])
        environment.update(network.variables(self._interfaces, environment, wanted))
        shared = SharedMemory(self._secret)
        environment.update(shared.variables(environment))
        keeper = None
        try:
            keeper = Keeper(shared.directory)
            self._child = child = Child(self._command, environment, _die_with_parent())
        except OSError as error:
            if keeper is not None:
                keeper.release()
            shared.release(was_killed=False)
            self._wire.send(wire.STDERR, f"{error.filename}: {error.strerror}\n".encode())
            return self._report(127 if isinstance(error, FileNotFoundError) else 126)
        keeper.watch(child.pid)
        leaving = asyncio.create_task(self._tell_of_failure())
        reading = asyncio.create_task(child.read(self._send, self._drain))
        await child.ended.wait()
        assert child.status is not None
        # What it has left behind ends, too, and holds the pipes no more.
        await asyncio.wait([reading], timeout=_LEFT_BEHIND_S if child.status == 0 else _FAILED_S)
        child.signal(signal.SIGKILL)
        await asyncio.wait([reading], timeout=_LEFT_BEHIND_S)
        for task in (leaving, reading):
            task.cancel()
        await asyncio.gather(leaving, reading, return_exceptions=True)
        shared.release(was_killed=child.status != 0)
        keeper.release()
        return self._report(child.status)

    def _send(self, line: bytes, is_error: bool) -> None:
        self._wire.send(wire.STDERR if is_error else wire.STDOUT, line)

    async def _drain(self) -> None:
        # A launcher that cannot print any faster stops the rank, not this process.
        with contextlib.suppress(OSError):  # it is gone, which `_listen` sees, too
            await self._wire.drain()

    async def _beat(self) -> None:
        while True:
            self._tell()
            self._look_at_silence(time.monotonic() - self._heard, self._wire.unanswered())
            await asyncio.sleep(_HEARTBEAT_S)

    def _tell(self, **more: Any) -> None:
        """Tells how far the rank has come, and more."""
        page = self._page
        waits = [page.waits, page.said, page.ended]
        saved = [page.saves, page.saved]
        self._wire.tell(at=[page.entered, page.finished], waits=waits, saved=saved, **more)

    def _look_at_silence(self, silent: float, unanswered: float) -> None:
        """Ends the command if the launcher, or its host, has said nothing for too many seconds."""
        limit = float(self._settings["launcher_timeout"])
        if silent > limit or unanswered > _SILENCE_S:
            self._over.set()
            self._end()
        elif silent <= _SILENCE_S:
            self._told_of_silence = False
        elif not self._told_of_silence and self._which.local_rank == 0:
            # Read when the launcher goes on.
            self._told_of_silence = True
            self._send(
                f"smorms3_dist: the launcher has said nothing for {silent:.0f} s: it is stopped, "
                f"or its machine was. The ranks of {self._which.host} go on, for {limit:g} s at "
                "most (--launcher-timeout)\n".encode(),
                is_error=True,
            )

    async def _tell_of_failure(self) -> None:
        """Tells that the command fails while it waits for that: srun may kill the agent next."""
        while not self._page.leaving:
            await asyncio.sleep(_LOOK_S)
        assert self._child is not None
        await self._child.catch_up(_LOOK_S)
        self._told = True
        self._tell(end=self._page.failed)
        self._page.told = 1

    def _report(self, status: int) -> int:
        """Tells how the command has ended; returns the exit status of the agent."""
        page, cut = self._page, False
        if page.failed and (status <= 0 or self._ended_by_us):
            status = page.failed
        else:
            cut = self._ended_by_us and bool(status)
        preempted = bool(page.preempted) and not cut
        if cut or not self._told:
            self._tell(end=status, cut=cut, preempted=preempted)
        # Not a failure, for which mpirun would end the other ranks.
        return 0 if preempted else 128 - status if status < 0 else status

    def _end(self) -> None:
        """Ends the command, and what it has started."""
        if self._child is None:
            if self._started.is_set() and not self._over.is_set():
                # The command will not begin, of which it cannot tell itself.
                self._wire.tell(end=-signal.SIGTERM, cut=True)
            self._over.set()
            return
        if self._ended_by_us or self._child.status is not None:
            return
        self._ended_by_us = True
        self._child.signal(signal.SIGTERM)
        asyncio.get_running_loop().call_later(_PATIENCE_S, self._child.signal, signal.SIGKILL)


def _die_with_parent() -> Callable[[], None]:
    """What the command does first: it leads a group, and gets SIGKILL when the agent is killed."""
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def prepare() -> None:
        os.setpgid(0, 0)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(LAUNCHER_GONE)

    return prepare


def restore_temporary(names: Sequence[str | None]) -> None:
    """Sets ``TMPDIR`` to what the user has, where it is that of mpirun for this job."""
    of_job, of_user = names
    if of_job is None or os.environ.get("TMPDIR") != of_job:
        return
    del os.environ["TMPDIR"]
    if of_user is not None:
        os.environ["TMPDIR"] = of_user


def main(command: list[str]) -> int:
    """Runs the agent; see the module."""
    try:
        settings = json.loads(os.environ[SETTINGS])
        secret = bytes.fromhex(os.environ[SECRET])
        which = which_rank()
        restore_temporary(settings["temporary"])
    except LookupError as error:
        missing = f"the launcher's {error} is not in the environment"
        print(f"smorms3_dist: {missing if type(error) is KeyError else error}", file=sys.stderr)
        return LAUNCHER_GONE
    status = asyncio.run(Agent(which, settings, secret, command).run())
    # Python ends sooner if it does not look for garbage in all that it has imported.
    gc.freeze()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
