"""``smorms3-dist doctor``: the job that it runs, its processes, and the command itself."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smorms3_dist.doctor import commands, probes, processes, two_ranks
from smorms3_dist.doctor.checks import all_checks
from smorms3_dist.doctor.findings import Check, Finding, examine, green, red, yellow
from smorms3_dist.doctor.two_ranks_program import MARK, STAGES
from smorms3_dist.launch.backends import BackendError, Hydra, OpenMpi
from smorms3_dist.version import __version__

import mpirun
import process
import pytest
from fresh import WITHOUT_SETUPTOOLS
from running import is_gone
from test_checks import says

# The job


def job(
    *stages: str, trouble: str = "", change: Mapping[str, Any] | None = None, **values: Any
) -> two_ranks.JobResult:
    """What became of a job whose two ranks have come through some stages."""
    training = {"steps": 3, "differing": 0, "largest": 0.0, "kernel": "compiled"}
    content: dict[str, Any] = {"elements": 10, "wrong": 0, "cuda_aware": False, **training}
    content |= {"size": 2, "host": "vm", "interface": None, **(change or {})}
    said = [{"stage": stage, "rank": rank, **content} for stage in stages for rank in range(2)]
    found = two_ranks.reports("\n".join(["noise", *(MARK + json.dumps(each) for each in said)]))
    return two_ranks.JobResult(found, trouble, command=("mpirun", "a b"), **values)


def findings(result: two_ranks.JobResult) -> list[str]:
    judges = (two_ranks.two_ranks, two_ranks.all_reduce, two_ranks.training)
    return [judge(result).status for judge in judges]


def test_a_job_that_is_as_it_should_be() -> None:
    result = job(*STAGES)
    says(two_ranks.two_ranks(result), "green", "2 ranks on vm")
    says(two_ranks.all_reduce(result), "green", "10 numbers")
    says(two_ranks.training(result), "green", "3 sharded steps", "compiled", "bit for bit")
    assert two_ranks.is_cuda_aware(result) is False
    assert two_ranks.is_cuda_aware(job(*STAGES, change={"cuda_aware": True})) is True
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    variables = {**dict.fromkeys(names, "1"), "OMPI_MCA_mpi_yield_when_idle": "1"}
    finding = two_ranks.two_ranks(job(*STAGES, variables=variables))
    says(finding, "green", f"as root, with {names[0]}=1 and {names[1]}=1 set for it alone")
    assert "yield" not in finding.found


def test_two_jobs_of_one_rank_each() -> None:
    result = job("world", change={"size": 1})
    says(two_ranks.two_ranks(result), "red", "is 1 rank, but 2 were started", "does not fit")
    assert findings(result) == ["red", "yellow", "yellow"]
    assert two_ranks.is_cuda_aware(result) is None


def test_a_job_that_stops_on_its_way() -> None:
    trouble = "ended with status 3 (ValueError: x)"
    for stages, judge, words, statuses in (
        ((), two_ranks.two_ranks, "mpirun 'a b'", "red yellow yellow"),
        (("world",), two_ranks.all_reduce, "mpirun 'a b'", "green red yellow"),
        (("world", "all-reduce"), two_ranks.training, "", "green green red"),
        (STAGES, two_ranks.two_ranks, "has done all it should", "red green green"),
    ):
        result = job(*stages, trouble=trouble)
        says(judge(result), "red", trouble, words)
        assert findings(result) == statuses.split()


def test_one_rank_that_reports_is_not_enough() -> None:
    line = MARK + json.dumps({"stage": "world", "rank": 0, "size": 2, "host": "vm"})
    found = two_ranks.reports(f"{line}\n[1]{line[:-5]}\n")
    assert found == two_ranks.reports(f"prefix {line}\n")
    result = two_ranks.JobResult(found, "was killed by SIGKILL")
    assert findings(result) == ["red", "yellow", "yellow"]


def test_wrong_sums_and_parameters() -> None:
    says(two_ranks.all_reduce(job(*STAGES, change={"wrong": 2})), "red", "4 of 20 sums are wrong")
    result = job(*STAGES, change={"differing": 1, "largest": 0.25})
    says(two_ranks.training(result), "red", "2 of 20 parameters differ", "0.25", "do not train")
    assert findings(result) == ["green", "green", "red"]


def test_a_job_between_two_hosts() -> None:
    result = job(*STAGES, change={"interface": "eth0"})
    says(two_ranks.between(result), "green", "train as plain Chainer: vm by eth0, vm by eth0")
    result = job("world", trouble="ended with status 124 (no step for 60 s)")
    says(two_ranks.between(result), "red", "ended with status 124 (no step for 60 s)")
    names = [check.name for check in all_checks(60, with_jobs=True, hosts=("h1", "h2", "h3"))]
    assert names[-2:] == ["h1, h2", "h1, h3"]
    assert names[:-2] == [check.name for check in all_checks(60, with_jobs=True)]


@pytest.mark.parametrize("hosts", ["h1", "h1,h1", "h1,"])
def test_hosts_are_two_or_more(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        commands.main(["-H", hosts], "smorms3-dist doctor")
    assert "error: argument -H/--hosts" in capsys.readouterr().err


def test_a_job_that_cannot_be_run() -> None:
    result = two_ranks.run(BackendError("gone"), True, 1)
    assert findings(result) == ["yellow"] * 3
    says(two_ranks.training(result), "yellow", "not run: there is no launcher")
    result = two_ranks.run(OpenMpi("mpirun", 5), False, 1)
    says(two_ranks.two_ranks(result), "yellow", "mpi4py cannot be used")


def test_what_explains_a_failure_is_shown(tmp_path: Path) -> None:
    def fake_mpirun(script: str) -> Hydra:
        file = tmp_path / "fake"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return Hydra(str(file))

    traceback = "Traceback (most recent call last):\n  File x\nmod.SomeError: the reason"
    result = two_ranks.run(fake_mpirun(f"echo '{traceback}' >&2; echo after; exit 3"), True, 60)
    assert result.trouble == "ended with status 3 (mod.SomeError: the reason)"
    script = "for i in 1 2 3 4; do echo line $i; done; echo ------; kill -9 $$"
    result = two_ranks.run(fake_mpirun(script), True, 60)
    assert result.trouble == "was killed by SIGKILL (line 2 / line 3 / line 4)"
    assert findings(result) == ["red", "yellow", "yellow"]
    result = two_ranks.run(fake_mpirun("exec sleep 1000"), True, 0.2)
    assert result.trouble == "has not ended within 0.2 s, and was killed"
    assert findings(result) == ["red", "yellow", "yellow"]


def test_what_a_command_leaves_behind_is_killed() -> None:
    # As ranks are, it is in a process group of its own.
    script = "set -m; (trap '' TERM; exec sleep 1000) & echo $!; exit 5"
    ended = processes.run(["bash", "-c", script], 60, os.environ)
    assert ended.trouble == "ended with status 5"
    assert is_gone(ended.stdout.strip())


def test_a_command_that_ignores_being_asked_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", 0.1)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is started ignores it as well
    try:
        ended = processes.run(["sleep", "1000"], 0.1, os.environ)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.trouble == "has not ended within 0.1 s, and was killed"


# Probes


def test_a_probe_that_crashes_says_so(tmp_path: Path) -> None:
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    (tmp_path / "mpi4py.py").write_text("import os; os.kill(os.getpid(), 11)")
    assert probes.ask("mpi", environment) == {"trouble": "Python was killed by SIGSEGV when asked"}
    (tmp_path / "mpi4py.py").write_text("import os; os.write(2, b'no\\nway'); os._exit(4)")
    trouble = "Python ended with status 4 when asked (way)"
    assert probes.ask("mpi", environment) == {"trouble": trouble}
    (tmp_path / "mpi4py.py").write_text("raise RuntimeError('cannot load it')")
    assert probes.ask("mpi", environment) == {"trouble": "RuntimeError: cannot load it"}


# The command


def test_a_check_that_raises_takes_no_other_with_it() -> None:
    def leave() -> Finding:
        sys.exit("for good")

    says(examine(Check("x", lambda: 1 / 0)), "red", "ZeroDivisionError", "report")  # type: ignore[arg-type,return-value]
    says(examine(Check("x", leave)), "red", "SystemExit: for good")


def run_main(monkeypatch: pytest.MonkeyPatch, checks: list[Check], *arguments: str) -> int:
    monkeypatch.setattr(commands, "all_checks", lambda limit, with_jobs, hosts: checks)
    return commands.main(arguments, "smorms3-dist doctor")


GREEN = Check("one", lambda: green("fine"))
YELLOW = Check("two", lambda: yellow("slow", "make haste"), "looking at two")
RED = Check("three", lambda: red("off\x1b[2J", "mend it"))


def test_a_line_a_check_and_one_a_remedy_and_the_conclusion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "green   one              fine",
        "yellow  two              slow",
        "                         -> make haste",
        "red     three            off [2J",
        "                         -> mend it",
    ]
    for checks, status, shown, conclusion in (
        ([GREEN], 0, lines[:1], "Ready to train."),
        ([GREEN, YELLOW], 0, lines[:3], "Ready to train; 1 of 2 checks are yellow."),
        ([GREEN, YELLOW, RED], 1, lines, "1 of 3 checks are red, 1 yellow."),
    ):
        assert run_main(monkeypatch, checks) == status
        output = capsys.readouterr()
        assert output.out.splitlines() == [*shown, conclusion]
        assert output.err == ""
    assert run_main(monkeypatch, [GREEN, YELLOW], "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "one", "status": "green", "found": "fine", "remedy": ""},
        {"name": "two", "status": "yellow", "found": "slow", "remedy": "make haste"},
    ]


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})
    out, err = terminal(), terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    long = Check("long", lambda: green("word " * 10))
    run_main(monkeypatch, [YELLOW, long])
    lines = out.getvalue().splitlines()
    assert lines[0] == "\033[33myellow\033[0m  two              slow"
    assert lines[2:4] == [
        "\033[32mgreen\033[0m   long             word word word word word word word",
        "                         word word word",
    ]
    # What takes long is said while it does, and wiped out.
    assert err.getvalue() == f"looking at two ...\r{' ' * 18}\r"
    monkeypatch.setenv("NO_COLOR", "")
    run_main(monkeypatch, [YELLOW])
    assert "\nyellow  two" in out.getvalue()


def test_a_timeout_must_be_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit, match="2"):
            commands.main([f"--timeout={value}"], "smorms3-dist doctor")
        assert f"{value!r} is not a number of seconds above 0" in capsys.readouterr().err


def doctor(
    *arguments: str, python: str | Path = sys.executable, **environment: str
) -> tuple[int, dict[str, Finding]]:
    """Runs the command in a process, and returns its exit status and what it has found."""
    words = (python, "-W", "ignore", "-m", "smorms3_dist", "doctor", "--json", *arguments)
    status, output = process.run(*words, limit=240, env=mpirun.environment(**environment))
    assert output.startswith("["), output
    found = {each.pop("name"): Finding(**each) for each in json.loads(output)}
    return status, found


@pytest.mark.mpi
def test_the_whole_command() -> None:
    status, found = doctor()
    assert list(found) == [check.name for check in all_checks(60, with_jobs=True)]
    assert {n: finding for n, finding in found.items() if finding.status == "red"} == {}
    assert status == 0
    says(found["smorms3_dist"], "green", __version__)
    says(found["Chainer"], "green", "7.8.1")
    says(found["patches"], "green", "applied")
    says(found["2-rank job"], "green", "2 ranks")
    says(found["all-reduce"], "green", "131072 numbers")
    says(found["training"], "green", "bit for bit")


@pytest.mark.mpi
def test_a_real_job_that_takes_too_long() -> None:
    status, found = doctor("--timeout", "0.01")
    assert status == 1
    says(found["2-rank job"], "red", "has not ended within 0.01 s")
    assert found["training"].status == "yellow"


@pytest.fixture
def lonely_python(tmp_path: Path) -> Path:
    """This Python with all its packages, but with nothing beside it."""
    python, real = tmp_path / "venv" / "bin" / "python", Path(sys.executable).resolve()
    python.parent.mkdir(parents=True)
    python.symlink_to(real)
    (tmp_path / "venv" / "pyvenv.cfg").write_text(f"home = {real.parent}\n")
    return python


def test_where_everything_is_missing_or_broken(lonely_python: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("chainer", "mpi4py", "numba"):
        (broken / f"{name}.py").write_text(f"raise RuntimeError('{name} is broken')")
    (broken / "xxhash.py").write_text("import sys; sys.exit(3)")
    path = os.pathsep.join([str(broken), *filter(None, sys.path)])
    environment = {"PYTHONPATH": path, "PATH": str(tmp_path), "SLURM_JOB_ID": "7"}
    status, found = doctor(python=lonely_python, **environment)
    assert status == 1
    for name in ("Python", "NumPy", "patches"):
        says(found[name], "green")
    says(found["Chainer"], "red", "chainer is broken")
    says(found["Numba"], "red", "numba is broken")
    says(found["xxhash"], "red", "SystemExit: 3")
    says(found["MPI library"], "red", "mpi4py is broken")
    says(found["launcher"], "red", "mpirun is not installed")
    says(found["Slurm"], "yellow", "srun is not on the PATH")
    says(found["training"], "yellow", "not run")


def test_where_no_package_is_installed(lonely_python: Path, tmp_path: Path) -> None:
    absent = "names = ('chainer', 'mpi4py', 'numpy', 'numba', 'xxhash', 'cupy')"
    (tmp_path / "sitecustomize.py").write_text(re.sub("names = .*", absent, WITHOUT_SETUPTOOLS))
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    status, found = doctor("--no-mpi", PYTHONPATH=path, PATH=str(tmp_path), python=lonely_python)
    assert status == 1
    for name in ("NumPy", "Chainer", "xxhash"):
        says(found[name], "red", "not installed")
    says(found["patches"], "yellow", "No module named 'numpy'")
    says(found["Numba"], "yellow", "not installed")
    says(found["MPI library"], "red", "mpi4py is not installed")
    names = [check.name for check in all_checks(60, with_jobs=True)]
    assert len(set(names)) == len(names)
    assert names == [*found, "2-rank job", "all-reduce", "training", "CUDA-aware MPI"]


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m smorms3_dist doctor --no-mpi | true; exit ${{PIPESTATUS[0]}}"
    assert process.run("bash", "-c", command, env=mpirun.environment(), limit=120) == (141, "")
