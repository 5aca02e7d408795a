"""The process beside a rank: its launcher is silent; signals it ignores; what ends with it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from smorms3_dist.launch import agent as agents
from smorms3_dist.launch.agent import Agent, restore_temporary
from smorms3_dist.launch.child import heed
from smorms3_dist.launch.environment import SECRET, SETTINGS
from smorms3_dist.launch.which_rank import WhichRank

import pytest


class Wire:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def send(self, kind: bytes, content: bytes) -> None:
        self.said.append(content.decode())

    def tell(self, **message: Any) -> None:
        self.said.append(f"end {message['end']}")

    async def drain(self) -> None:
        await asyncio.sleep(0)


def agent(local_rank: int = 0) -> tuple[Any, Wire]:
    which = WhichRank(local_rank, 2, local_rank, 2, "h1")
    one: Any = Agent(which, {"launcher_timeout": 600.0}, b"", [])
    one._wire = Wire()
    return one, one._wire


def test_a_launcher_that_is_stopped_is_waited_for_and_that_is_said_once() -> None:
    one, wire = agent()
    for silent in (1.0, 59.0, 61.0, 62.0, 599.0):
        one._look_at_silence(silent, 0.0)
    assert not one._over.is_set()
    assert wire.said == [
        "smorms3_dist: the launcher has said nothing for 61 s: it is stopped, or its machine was. "
        "The ranks of h1 go on, for 600 s at most (--launcher-timeout)\n"
    ]
    # It has gone on, and is stopped again.
    one._look_at_silence(1.0, 0.0)
    one._look_at_silence(61.0, 0.0)
    assert len(wire.said) == 2
    one._look_at_silence(601.0, 0.0)
    assert one._over.is_set()
    other, wire = agent(local_rank=1)
    other._look_at_silence(61.0, 0.0)
    assert not wire.said, "one of each host says it"


def test_a_launcher_whose_host_takes_nothing_is_lost() -> None:
    one, _ = agent()
    one._look_at_silence(50.0, 50.0)
    assert not one._over.is_set()
    one._look_at_silence(61.0, 61.0)
    assert one._over.is_set()


def test_a_failure_is_told_after_the_last_words_however_late_these_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "_LOOK_S", 0)
    for name in SECRET, SETTINGS:
        monkeypatch.setenv(name, "")
    one, wire = agent()
    one._settings["interfaces"] = []
    code = (
        "import sys\n"
        "from smorms3_dist.rank_page import page\n"
        "page.failed = 3\n"
        "for number in range(2000): print(number, file=sys.stderr)\n"
        "sys.exit(3)"
    )
    one._command = [sys.executable, "-c", code]
    assert asyncio.run(asyncio.wait_for(one._run_command(str(tmp_path / "page")), 60)) == 3
    *lines, end = wire.said
    assert "".join(lines) == "".join(f"{number}\n" for number in range(2000))
    assert end == "end 3"


def test_signals_that_are_ignored_stay_so() -> None:
    async def handled(ignored: bool) -> bool:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        came = asyncio.Event()
        heed({signal.SIGHUP: came.set, signal.SIGUSR1: came.set})
        signal.raise_signal(signal.SIGHUP if ignored else signal.SIGUSR1)
        await asyncio.sleep(0)
        if ignored:
            signal.raise_signal(signal.SIGHUP)
            assert not came.is_set()
            signal.raise_signal(signal.SIGUSR1)
        await asyncio.wait_for(came.wait(), 60)
        return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    before = signal.getsignal(signal.SIGHUP)
    try:
        assert asyncio.run(handled(ignored=True))
        assert not asyncio.run(handled(ignored=False))
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("how", ["released", "killed"])
def test_a_keeper_ends_a_group_when_its_process_is_killed(how: str, tmp_path: Path) -> None:
    directory = tmp_path / "a directory"
    directory.mkdir()
    (directory / "file").touch()
    code = (
        "import os, pathlib, subprocess, sys\n"
        "from smorms3_dist.launch.child import Keeper\n"
        "group = subprocess.Popen(['sleep', '3600'], start_new_session=True)\n"
        "keeper = Keeper(pathlib.Path(sys.argv[2]))\n"
        "keeper.watch(group.pid)\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), 9)\n"
        "keeper.release()\n"
        "print(group.poll())\n"
        "group.kill()\n"
    )
    # The pipe ends when the last process of the group does.
    done = subprocess.run(
        [sys.executable, "-c", code, how, directory],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert directory.exists() == (how == "released")
    if how == "released":
        assert (done.returncode, done.stdout) == (0, "None\n")
    else:
        assert (done.returncode, done.stdout) == (-9, "")


def test_ranks_get_the_temporary_directory_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/smorms3-x")
    restore_temporary(["/tmp/smorms3-x", "/scratch"])
    assert os.environ["TMPDIR"] == "/scratch"
    restore_temporary(["/tmp/smorms3-x", "/other"])
    assert os.environ["TMPDIR"] == "/scratch", "that of another host stays"
    restore_temporary([None, None])
    restore_temporary(["/scratch", None])
    assert "TMPDIR" not in os.environ
