"""One job, with a stand-in for mpirun: what has become of the ranks, whatever mpirun says."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from smorms3_dist.launch import attempt, environment, verdict
from smorms3_dist.launch.attempt import Attempt
from smorms3_dist.launch.output import Output
from smorms3_dist.launch.ranks import Rank
from smorms3_dist.launch.run_module import python_command
from smorms3_dist.launch.verdict import TIMED_OUT, Limits, Outcome
from smorms3_dist.launch.wire import Wire, WireError
from smorms3_dist.rank_page import PREEMPTED

import mpirun
import pytest

FAKE = mpirun.PROGRAMS / "fake_mpirun.py"
SECRET = b"s" * 32
PATIENT = Limits(60, None, None)


def run(
    what: str,
    script: str | Sequence[str],
    size: int = 3,
    hosts: Sequence[str] = (),
    gpus: int | None = None,
    limits: Limits = PATIENT,
    secret: bytes = SECRET,
    interfaces: Sequence[str] = (),
    then: Callable[[Attempt], Any] | None = None,
    **variables: str,
) -> tuple[Outcome, Output]:
    """Runs a job, whose ranks run a command or Python code, for at most a minute."""
    output = Output(size, range(size), None)

    def command(port: int) -> tuple[Sequence[str], Mapping[str, str]]:
        times = {"start_timeout": limits.start, "launcher_timeout": 600}
        settings = {
            "addresses": ["127.0.0.1"],
            "port": port,
            **times,
            "temporary": [None, None],
            "interfaces": interfaces,
        }
        words = [sys.executable, "-c", script] if isinstance(script, str) else script
        agent = [*python_command("smorms3_dist.launch.agent"), *words]
        own = {environment.SETTINGS: json.dumps(settings), environment.SECRET: secret.hex()}
        words = [sys.executable, str(FAKE), what, str(size), *agent]
        return words, mpirun.environment(**own, **variables)

    async def limited() -> Outcome:
        one = Attempt(size, hosts, gpus, limits, output, interfaces=interfaces)
        meanwhile = asyncio.create_task(then(one)) if then is not None else None
        outcome = await asyncio.wait_for(one.run(command, SECRET, everywhere=False), 60)
        if meanwhile is not None:
            await meanwhile
        return outcome

    return asyncio.run(limited()), output


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for when all is decided is not waited for so long."""
    monkeypatch.setattr(verdict, "_GONE_S", 0.5)
    for name in ("_LEAVE_S", "_KILL_S"):
        monkeypatch.setattr(attempt, name, 0.5)


async def until(is_so: Callable[[], Any]) -> None:
    while not is_so():
        await asyncio.sleep(0.02)


RANK = "import os, sys, time; rank = int(os.environ['PMI_RANK']); "


def test_a_job_in_which_all_ranks_end_well_has_succeeded(
    capfd: pytest.CaptureFixture[str],
) -> None:
    # The secret does not reach the command.
    script = RANK + "print(rank, sorted(name for name in os.environ if 'SMORMS3_LAUNCH' in name))"
    outcome, _ = run("is fine", script + "; print('err', file=sys.stderr)")
    assert outcome == Outcome(0)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] 0 []", "[1] 1 []", "[2] 2 []"]
    assert sorted(err.splitlines())[:3] == ["[0] err", "[1] err", "[2] err"]


def test_a_rank_that_vanished_is_no_success_though_mpirun_says_so(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = RANK + f"open({str(ready)!r}, 'w') if rank == 1 else 0; time.sleep(60)"
    outcome, _ = run("kills a rank", script, hosts=["h1", "h2", "h1"], WHEN=str(ready))
    assert outcome.status == 1
    assert outcome.text.startswith("rank 1 vanished: a process of h2 was killed")
    assert outcome.may_restart
    assert outcome.lost == ("h2",)


def test_ranks_of_another_version_of_the_package_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt, "__version__", "0.0.1")
    outcome, output = run("is fine", "print('never')", size=1, hosts=["h1"])
    assert outcome.status == 2
    assert re.fullmatch(
        r"h1 has smorms3_dist \S+, where the launcher has 0.0.1: install the same.*", outcome.text
    )
    assert not output.tail(0)


def test_hosts_without_the_interface_that_is_wanted_are_refused() -> None:
    outcome, output = run("is fine", "print('never')", size=1, hosts=["h1"], interfaces=["ib9"])
    assert outcome.status == 2
    assert re.match("h1 has no network interface ib9; it has ", outcome.text)
    assert not output.tail(0)


NO_GPUS = {"gpus": 3, "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("what", "how", "status", "text", "lost"),
    [
        ("alone", {}, 2, "every rank is a job of its own", None),
        ("fails", {}, 7, "ended with status 7 before 3 of 3 ranks had started", ()),
        ("too few", {"hosts": ["h1", "h1", "h2"]}, 1, "before 1 of 3 ranks had started", ("h2",)),
        ("is fine", NO_GPUS, 2, "has 0 GPUs, where --gpus-per-node asks for 3", None),
    ],
)
def test_a_job_that_cannot_start_runs_no_command(
    what: str, how: Any, status: int, text: str, lost: Any, tmp_path: Path, capfd: Any
) -> None:
    async def let_mpirun_end(one: Attempt) -> None:
        await until(lambda: len(one.job.ranks) == 2 or what != "too few")
        (tmp_path / "ready").touch()

    ready = str(tmp_path / "ready")
    outcome, output = run(what, "print('never')", WHEN=ready, then=let_mpirun_end, **how)
    assert outcome.status == status and text in outcome.text
    assert (outcome.lost if outcome.may_restart else None) == lost
    assert not output.tail(0)
    shown = capfd.readouterr()
    assert f"[launcher] fake mpirun: {what}" in shown.err and "never" not in shown.out


def test_mpirun_that_is_killed_is_named_and_not_the_ranks_that_it_takes_with_it(
    tmp_path: Path,
) -> None:
    ready = tmp_path / "ready"
    script = RANK + f"open({str(ready)!r}, 'w')\n"
    # As ranks of MPI end then.
    script += "mpirun = int(os.environ['MPIRUN'])\n"
    script += "while os.path.exists(f'/proc/{mpirun}/exe'): time.sleep(0.02)\nsys.exit(195)"
    outcome, _ = run("is killed", script, size=2, WHEN=str(ready))
    assert outcome.status == 1
    program = re.escape(Path(sys.executable).name)
    assert re.fullmatch(
        rf"{program} was killed by SIGKILL; after it, rank\S? .*[01] failed", outcome.text
    )
    assert outcome.may_restart


def test_a_launcher_that_was_stopped_holds_nothing_against_anybody(
    capfd: pytest.CaptureFixture[str],
) -> None:
    one = Attempt(1, (), None, Limits(60, 60, None), Output(1, {0}, None))
    times = {"stepped_at": 0.0, "heard_at": 0.0, "printed_at": 0.0}
    one.job.ranks[0] = rank = Rank(0, "host", cast("Any", None), **times)
    one._looked, one.job.start_began, one.job.started_at = 1000.0, 990.0, 1000.0
    one._allow_for_absence(1070.0)
    assert one.job.start_began == 1060.0
    assert rank.heard_at == rank.last_sign == 1070.0
    assert verdict.stalled(one.job, 1071.0) is None
    assert capfd.readouterr().err == (
        "smorms3-dist run: this process has not run for 70 s; the job goes on\n"
    )
    one._allow_for_absence(1071.0)
    assert one.job.start_began == 1060.0


def test_nothing_is_said_of_a_wait_that_is_over_when_all_scripts_have_ended(
    capfd: pytest.CaptureFixture[str],
) -> None:
    one = Attempt(1, (), None, PATIENT, Output(1, {0}, None))
    one.job.ranks[0] = Rank(0, "host", cast("Any", None), waits=True, said=1, has_left=True)
    one._said_at = 0.0
    one._tell_of_waits(1000.0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (BrokenPipeError(), 141, ""),
        (OSError(28, "No space left"), 1, "stdout cannot be written: No space left; the job ends"),
    ],
)
def test_a_job_whose_output_nobody_gets_ends(error: OSError, status: int, text: str) -> None:
    output = Output(1, {0}, None)
    output._terminal.trouble = "stdout", error
    one = Attempt(1, (), None, PATIENT, output)
    one._print(Rank(0, "host", cast("Any", None)), b"", is_error=True)
    assert one._decided == Outcome(status, text)


def test_a_command_that_is_not_there_is_said() -> None:
    outcome, output = run("is fine", ["/no/such/program"], size=1)
    assert outcome.status == 127
    assert output.tail(0) == [b"/no/such/program: No such file or directory"]


def test_agents_with_another_secret_are_strangers(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prove, strangers = Wire.prove, []

    async def note(self: Wire, secret: bytes, listening: bool) -> None:
        try:
            await prove(self, secret, listening)
        except WireError as error:
            strangers.append(str(error))
            raise

    monkeypatch.setattr(Wire, "prove", note)

    async def let_time_pass(one: Attempt) -> None:
        await until(lambda: strangers)
        one.job.start_began -= 60

    outcome, _ = run("is fine", "print('never')", secret=b"wrong", then=let_time_pass)
    assert outcome.status == TIMED_OUT
    assert "3 of 3 ranks have not started" in outcome.text
    assert "never" not in capfd.readouterr().out
    assert set(strangers) == {"it does not know the secret of the job"}


@pytest.mark.parametrize("early", [False, True])
def test_ranks_without_checkpoints_get_the_signal_itself_even_while_their_script_begins(
    early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Attempt._start

    def start_and_ask(self: Attempt) -> None:
        start(self)
        if early:
            self.ask(signal.SIGTERM)

    async def ask(one: Attempt) -> None:
        await until(lambda: one.job.started_at is not None)
        if not early:
            one.ask(signal.SIGTERM)

    monkeypatch.setattr(Attempt, "_start", start_and_ask)
    outcome, _ = run("is fine", "import time; time.sleep(60)", then=ask)
    assert outcome.status == 128 + signal.SIGTERM, outcome
    assert "saved no checkpoint" in outcome.text
    assert not outcome.may_restart


def test_a_job_can_be_stopped_before_it_has_started() -> None:
    async def stop(one: Attempt) -> None:
        await until(lambda: one.job.ranks)
        one.ask(signal.SIGUSR1)

    outcome, _ = run("hangs", "", then=stop)
    assert outcome.status == PREEMPTED
    assert outcome.text == "SIGUSR1: the job ends before it has started"
