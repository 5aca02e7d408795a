"""launchers/mpirun.sh and mpirun_hosts.sh: their command lines, what they refuse, real runs."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from mpirun import ROOT, command, environment
from process import run

SCRIPT = ROOT / "launchers" / "mpirun_hosts.sh"
ONE_HOST = ROOT / "launchers" / "mpirun.sh"

# Stands for mpirun: prints its arguments, one a line.
MPIRUN = "#!/bin/sh\nprintf '%s\\n' \"$@\"\n"

TRAINING = """\
import mpi4py.MPI, os
comm = mpi4py.MPI.COMM_WORLD
sizes = comm.gather((comm.size, os.environ["SMORMS3_A"], os.environ["MINE"]))
if comm.rank == 0:
    print("gathered", sizes)
"""


class Command:
    """Calls the script in a directory with ``train.py`` and ``hosts``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.programs = directory / "programs"
        self.programs.mkdir()
        (directory / "train.py").write_text(TRAINING)
        (directory / "hosts").write_text("localhost slots=2\n")

    def mock_mpirun(self, more: str = "") -> None:
        (self.programs / "mpirun").write_text(MPIRUN + more)
        (self.programs / "mpirun").chmod(0o755)

    def __call__(self, *arguments: str, script: Path = SCRIPT, **extra: str) -> tuple[int, str]:
        inherited = environment(**extra)
        if not extra.get("OMP_NUM_THREADS"):
            inherited.pop("OMP_NUM_THREADS", None)
        matching = Path(command(1)[0]).parent
        path = f"{self.programs}:{matching}:{inherited['PATH']}"
        settings = {**inherited, "PATH": path, "PYTHON": sys.executable, **extra}
        return run("bash", script, *arguments, env=settings, cwd=self.directory)


@pytest.fixture
def call(tmp_path: Path) -> Command:
    return Command(tmp_path)


def passed_on(words: list[str]) -> list[str]:
    """What follows each ``-x``."""
    return [value for option, value in itertools.pairwise(words) if option == "-x"]


def test_the_command_line_of_mpirun(call):
    call.mock_mpirun()
    status, output = call("-H", "h1:4,h2:4", "train.py", "--epoch", "2 3")
    words = output.splitlines()
    assert status == 0, output
    assert words[:2] == ["--host", "h1:4,h2:4"]
    assert words[-6:] == [sys.executable, "-m", "smorms3_dist", "train.py", "--epoch", "2 3"]
    keepalive = [words[i + 1] for i, word in enumerate(words) if word == "--prtemca"]
    assert [name.rpartition("_")[2] for name in keepalive] == ["time", "intvl", "probes"]


def test_what_is_to_be_sharded_is_told_to_each_rank(call):
    call.mock_mpirun()
    status, output = call("-H", "h1:4", "--shard=gradients=sharded", "train.py", "--shard")
    assert status == 0, output
    told = ["smorms3_dist", "--shard=gradients=sharded", "train.py", "--shard"]
    assert output.splitlines()[-4:] == told


def test_a_host_file_and_the_environment_are_passed_on(call):
    call.mock_mpirun()
    own = {"SMORMS3_A": "1", "NCCL_DEBUG": "INFO", "MINE": "2", "OTHER": "3", "FORWARD": "MINE"}
    status, output = call("--hostfile", "hosts", "train.py", **own)
    words = output.splitlines()
    assert status == 0, output
    assert words[:2] == ["--hostfile", "hosts"]
    names = passed_on(words)
    assert {"PATH", "SMORMS3_A", "NCCL_DEBUG", "MINE", "OMP_NUM_THREADS=1"} <= set(names)
    assert "OTHER" not in names
    _, output = call("-H", "h1", "train.py", OMP_NUM_THREADS="3")
    names = passed_on(output.splitlines())
    assert "OMP_NUM_THREADS" in names and "OMP_NUM_THREADS=1" not in names


def test_what_is_wrong_is_said(call):
    call.mock_mpirun()
    for arguments, message in (
        ([], "usage:"),
        (["train.py"], "usage:"),
        (["-n", "2", "train.py"], "usage:"),
        (["-H", "h1:2", "absent.py"], "there is no script absent.py"),
        (["-H", "h1:2", "--shard"], "there is no script"),
        (["--hostfile", "absent", "train.py"], "there is no host file absent"),
    ):
        status, output = call(*arguments)
        assert status == 2
        assert message in output


def test_one_host_gets_what_mpirun_does_not_do_by_itself(call):
    call.mock_mpirun('echo "$OMP_NUM_THREADS $OMPI_MCA_mpi_yield_when_idle"\n')
    python = call.programs / "python"
    python.symlink_to(sys.executable)
    words = ["-n", "99", "--shard=exact=true", "train.py", "--epoch", "2 3"]
    for threads, used in (("", "1"), ("3", "3")):
        own = {"PYTHON": str(python), "OMP_NUM_THREADS": threads}
        status, output = call(*words, script=ONE_HOST, **own)
        assert status == 0, output
        assert output.splitlines() == [
            *("-n", "99", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", str(python), "-m"),
            *("smorms3_dist", *words[2:], f"{used} 1"),
        ]
    for arguments, message in (
        (["-n", "x", "train.py"], "usage:"),
        (["-H", "h1:2", "train.py"], "usage:"),
        (["-n", "2", "absent.py"], "there is no script absent.py"),
    ):
        status, output = call(*arguments, script=ONE_HOST)
        assert status == 2
        assert message in output


@pytest.mark.mpi
def test_ranks_on_one_host_are_one_job(call):
    variables = {"SMORMS3_A": "1", "MINE": "2"}
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        variables[name] = ""
    status, output = call("-n", "2", "train.py", script=ONE_HOST, **variables)
    assert status == 0, output
    assert f"gathered {[(2, '1', '2')] * 2}" in output


@pytest.mark.mpi
def test_ranks_on_all_slots_are_one_job(call):
    variables = {"SMORMS3_A": "1", "MINE": "2", "FORWARD": "MINE"}
    status, output = call("--hostfile", "hosts", "train.py", **variables)
    assert status == 0, output
    assert f"gathered {[(2, '1', '2')] * 2}" in output
