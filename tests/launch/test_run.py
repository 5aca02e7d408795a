"""smorms3-dist run with a real mpirun: what users see when all goes well, and when it does not."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path

from smorms3_dist.launch import run_module

import fastjsonschema
import mpirun
import pytest
from running import Running, processes_with, run

check_event = fastjsonschema.compile(
    json.loads((Path(__file__).parents[1] / "schemas" / "events.json").read_text())
)

RANKS = mpirun.PROGRAMS / "ranks.py"
TRAINING = mpirun.PROGRAMS / "training.py"


def none_left(mark: str) -> bool:
    """Whether all processes with a text in their environment end soon."""
    deadline = time.monotonic() + 30
    while (left := list(processes_with(mark))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


def hanging(*arguments: str) -> Running:
    """A job of two ranks that have begun to hang."""
    running = Running("-n", "2", *arguments, RANKS, "hang")
    running.wait_for("about to hang")
    return running


def test_lines_come_whole_with_their_rank(tmp_path: Path) -> None:
    status, output = run("-n", "3", "--log-dir", tmp_path, "--tee", "0,2", RANKS, "lines")
    assert status == 0, output
    lines = [line for line in output.splitlines() if re.match(r"\[\d\] (out|err)", line)]
    expected = {
        f"[{rank}] {stream} {rank} {number} {letter * 200}"
        for rank in (0, 2)
        for stream, letter in (("out", "x"), ("err", "y"))
        for number in range(200)
    }
    assert len(lines) == 800
    assert set(lines) == expected
    (directory,) = tmp_path.iterdir()
    for rank in range(3):
        text = (directory / "attempt-0" / f"rank-0{rank}.log").read_text()
        assert text.count("\n") == 401, "each line, and that of the end"
        out = re.findall(rf"^out {rank} (\d+) x{{200}}$", text, re.MULTILINE)
        assert out == [str(number) for number in range(200)]


def test_huge_and_binary_lines_pass() -> None:
    # One rank alone has nothing before its lines.
    running = Running("-n", "1", RANKS, "huge and binary", "0")
    assert running.end() == 0
    lengths = [len(line) for line in running.raw.splitlines() if line.startswith(b"zzz")]
    assert sum(lengths) == 3 << 20
    assert b"\nafter\n" in running.raw
    assert b"\nno endend of rank 0\n" in running.raw
    # A carriage return ends a line, too.
    head, tail = bytes(range(10)), bytes(range(11, 256))
    assert head + b"\n" + tail + b"\n\xff\xfe\n" in running.raw


def test_a_rank_that_raises_ends_the_job_and_is_shown_last() -> None:
    running = Running("-n", "3", "-x", "MARK=raises", RANKS, "raise", "2")
    running.wait_for("about to raise")
    start = time.monotonic()
    assert running.end() == 1
    assert time.monotonic() - start < 30, "a hang, where 5 s are usual"
    *lines, last = running.output.splitlines()
    # What mpirun says of it may come after it.
    end = max(at for at, line in enumerate(lines) if line == "[2] ValueError: the reason")
    assert 'raise ValueError("the reason")' in lines[end - 1], running.output
    assert len(lines) - end <= 10, running.output
    assert re.fullmatch(r"smorms3-dist run: rank 2 on \S+ failed with exit status 1.*", last)
    assert none_left("MARK=raises")


def test_the_status_is_that_of_the_rank_that_failed_first() -> None:
    expected = {
        "exit": (3, r"rank 1 on \S+ failed with exit status 3"),
        "kill": (137, r"rank 1 on \S+ was killed by SIGKILL"),
        "return 0 at once": (1, "rank 0 ended from outside, when rank 1 had left without"),
        "vanish": (1, "rank 1 vanished"),
    }
    # At once: what they do most is to wait.
    mark = "MARK=each has left a helper behind"
    jobs = {what: Running("-n", "2", "-x", mark, RANKS, what) for what in expected}
    for what, running in jobs.items():
        status, text = expected[what]
        assert running.end() == status, running.output
        assert re.search(text, running.output.splitlines()[-1]), running.output
        if shared := re.search(r" with (/dev/shm/smorms3_dist-\S+)", running.output):
            assert not Path(shared[1]).exists()
        else:
            assert what == "vanish", running.output
    assert none_left(mark)


def test_a_script_may_exit_with_zero_and_leave_children_behind() -> None:
    status, output = run("-n", "2", "-x", "MARK=leaves", RANKS, "leave")
    assert status == 0, output
    assert none_left("MARK=leaves")


def test_variables_and_threads_reach_the_ranks_and_nothing_of_the_current_directory_does(
    tmp_path: Path,
) -> None:
    for name in ("random", "asyncio", "mpi4py", "smorms3_dist"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('of the current directory')\n")
    names = ["A", "SMORMS3_RESTART_COUNT", "SMORMS3_CHECKPOINT_DIR", "TMPDIR", "MKL_NUM_THREADS"]
    temporary = tmp_path / "t"
    temporary.mkdir()
    status, output = run(
        *("-n", "2", "-x", "A=b c", "--checkpoint-dir", tmp_path / "ck"),
        *(RANKS, "environment", "0", *names),
        cwd=tmp_path,
        TMPDIR=str(temporary),
    )
    assert status == 0, output
    expected = (
        f"A=b c SMORMS3_RESTART_COUNT=0 SMORMS3_CHECKPOINT_DIR={tmp_path}/ck TMPDIR={temporary}"
    )
    # As many threads as the environment of the tests says for the others.
    assert f"[0] {expected} MKL_NUM_THREADS=1" in output
    assert f"[1] {expected}" in output
    assert not list(temporary.iterdir()), "left behind"


def test_a_dry_run_prints_a_command_for_a_shell() -> None:
    status, output = run("-n", "2", "--dry-run", "-x", "A=b c", RANKS, "a b")
    assert status == 0
    assert "A='b c'" in output and "SECRET=" not in output
    assert output.strip().endswith(
        f"{sys.executable} {run_module.__file__} smorms3_dist {RANKS} 'a b'"
    )
    assert " -n 2 " in output


def test_what_cannot_be_started_is_said_before_anything_is() -> None:
    for arguments, text in (
        (["-n", "2", "nothing.py"], "there is no script 'nothing.py'"),
        (["--backend", "slurm", "-n", "2", RANKS], "Slurm|allocation"),
        ([RANKS], "say how many ranks there are to be"),
        (["--", "sh", "-c", "exit 5"], "say how many ranks there are to be"),
    ):
        status, output = run(*arguments)
        assert status == 2
        assert re.search(text, output.splitlines()[0]), output


def test_a_wait_is_told_of_with_the_stacks_of_who_has_not_come_and_ends_nothing(
    tmp_path: Path,
) -> None:
    end = tmp_path / "end"
    running = Running(
        *("-n", "2", mpirun.PROGRAMS / "ending.py", "waits", end), SMORMS3_STALL_WARNING="1"
    )
    running.wait_for(r"rank 1 has waited for \S+ s in update 3, in the exchange of all ranks")
    last = "run: rank 1 waits in step 3; rank 0 has not come. The stacks of rank 0:"
    running.wait_for(last)
    running.wait_for(r"^\[0\]   File .*ending\.py., line \d+ in <module>")
    end.touch()
    assert running.end() == 0, running.output
    assert running.output.count(last) == 1


def test_a_rank_whose_script_has_ended_is_missed() -> None:
    status, output = run("-n", "2", mpirun.PROGRAMS / "ending.py", "steps", "nothing")
    assert status == 1
    assert "[0] RuntimeError: rank 1 has ended its script after 2 updates, while rank 0" in output


def test_bad_seconds_of_the_voice_are_refused() -> None:
    status, output = run("-n", "2", RANKS, "lines", SMORMS3_STALL_WARNING="soon")
    assert status == 2
    assert "SMORMS3_STALL_WARNING=soon is not a number of seconds" in output


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_launcher_that_is_ended_leaves_no_process(number: signal.Signals, status: int) -> None:
    mark = f"MARK=ended by {number.name}"
    running = hanging("-x", mark)
    assert list(processes_with(mark))
    running.signal(number)
    assert running.process.wait(30) == status
    assert none_left(mark)


def test_stacks_are_printed_on_request_and_the_job_goes_on() -> None:
    running = hanging("--timeout", "60")
    running.signal(signal.SIGQUIT)
    running.wait_for(r'\[1\] .*File ".*ranks.py", line \d+ in <module>')
    running.signal(signal.SIGTERM)
    assert running.end() == 143
    assert "and saved no checkpoint" in running.output.splitlines()[-1]


def digest(output: str) -> str:
    (found,) = re.findall("digest (\\w+)", output)
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the parameters are at the end of a training of 20 steps on 2 ranks."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    status, output = run("-n", "2", "--checkpoint-dir", directory / "ck", TRAINING, "20")
    assert status == 0, output
    return digest(output)


def test_a_preempted_training_saves_and_goes_on_later(tmp_path: Path, uninterrupted: str) -> None:
    running = Running("-n", "2", "--checkpoint-dir", tmp_path, TRAINING, "20", "wait")
    running.wait_for("step 5")
    running.signal(signal.SIGUSR1)
    assert running.end() == 75, running.output
    assert re.fullmatch(
        r"smorms3-dist run: a checkpoint is saved, and the ranks have ended as asked "
        r"[(]\d+ steps, [\d.]+ s, status 75[)]",
        running.output.splitlines()[-1],
    )
    last = re.findall(r"\] step (\d+)", running.output)[-1]
    status, output = run("-n", "2", "--checkpoint-dir", tmp_path, TRAINING, "20")
    assert status == 0, output
    assert f"from {last} on 2" in output
    assert digest(output) == uninterrupted


def test_a_second_signal_ends_the_job_at_once() -> None:
    running = hanging()
    # Stopped, the ranks cannot end as asked.
    running.signal(signal.SIGTERM)
    running.signal(signal.SIGTERM)
    assert running.end() == 143


def test_a_training_starts_again_from_its_checkpoint_after_a_kill_and_a_stall(
    tmp_path: Path, uninterrupted: str
) -> None:
    status, output = run(
        *("-n", "2", "--max-restarts", "2", "--stall-timeout", "10"),
        *("--checkpoint-dir", tmp_path / "ck", "--log-dir", tmp_path / "logs"),
        *("--events", tmp_path / "events.jsonl"),
        *(TRAINING, "20", "kill", "8", "hang", "11"),
    )
    assert status == 0, output
    assert re.search(r"rank 1 on \S+ was killed by SIGKILL", output)
    assert "restart 1 of 2 in 1 s, 2 ranks, from step 6" in output
    assert "no step for 10 s: rank 0 in step 6; rank 1 not come to it" in output
    assert re.search(r"\[1\] .*training.py.* in say", output), "the stacks of rank 1"
    assert "restart 2 of 2 in 2 s, 2 ranks, from step 9" in output
    assert re.findall(r"from (\w+) on 2", output) == ["None", "6", "9"]
    assert digest(output) == uninterrupted
    logs = sorted(path.name for path in (tmp_path / "logs").glob("*/*"))
    assert logs == ["attempt-0", "attempt-1", "attempt-2"]
    assert re.fullmatch(
        r"smorms3-dist run: 2 ranks on this host; what they print is kept in \S+/logs/[\d-]+",
        output.splitlines()[0],
    )
    assert re.fullmatch(
        r"smorms3-dist run: all ranks have ended well [(]\d+ steps, [\d.]+ s, status 0[)]",
        output.splitlines()[-1],
    )
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    for event in events:
        check_event(event)
    kinds = [event["event"] for event in events]
    assert (kinds[:3], kinds[-1]) == (["start", "ranks", "first_step"], "end")
    assert {kind: kinds.count(kind) for kind in ("ranks", "first_step", "failure", "restart")} == {
        **dict.fromkeys(("ranks", "first_step"), 3),
        **dict.fromkeys(("failure", "restart"), 2),
    }
    assert "stall" in kinds
    assert [event["step"] for event in events if event["event"] == "checkpoint"][-1] > 9
    assert next(event["rank"] for event in events if event["event"] == "failure") == 1
    assert (events[-1]["restarts"], events[-1]["attempt"]) == (2, 2)


def test_restarts_come_to_an_end_and_are_not_spent_on_what_fails_alike_before_any_step(
    tmp_path: Path,
) -> None:
    script = tmp_path / "misspelt.py"
    script.write_text("import nunpy\n")
    command = Running("-n", "2", "--max-restarts", "1", "--", "sh", "-c", "exit 5")
    misspelt = Running("-n", "1", "--max-restarts", "5", script)
    assert command.end() == 5
    assert command.output.count("failed with exit status 5") == 2
    assert "restart 1 of 1 in 1 s" in command.output
    assert misspelt.end() == 1
    assert "restart 1 of 5 in 1 s" in misspelt.output
    assert "restart 2" not in misspelt.output, misspelt.output
    assert "has failed like this twice, before any step" in misspelt.output.splitlines()[-1]


def test_a_signal_between_two_attempts_ends_the_job_as_preempted() -> None:
    running = Running("-n", "1", "--max-restarts", "9", "--", "sh", "-c", "exit 5")
    # The pause before a second one is longer.
    running.wait_for("restart 2 of 9 in 2 s")
    running.signal(signal.SIGUSR1)
    assert running.end() == 75
    assert "SIGUSR1: the job is not started again (" in running.output.splitlines()[-1]
