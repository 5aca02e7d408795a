"""``python -m smorms3_dist``: an unmodified script runs as under ``python``, alone or with MPI."""

from __future__ import annotations

import json
from pathlib import Path

from smorms3_dist.launch import run_module

import pytest
from fresh import run, run_ranks

TELL = """
import json, sys
import chainer
import neighbour
assert vars(sys.modules['__main__']) is globals()
print(json.dumps([__name__, sys.argv, sys.path[0], __file__, neighbour.VALUE]))
"""

FAIL = """
import sys
import chainer, chainermn
from mpi4py import MPI
comm = chainermn.create_communicator('naive')
if comm.rank == 1:
    {failure}
MPI.COMM_WORLD.Barrier()
"""

# With mpi4py its runner runs the script; without it, here hidden, the standard library's does.
WITHOUT_MPI4PY = """
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == 'mpi4py' else find_spec(name)
try:
    runpy.run_module('smorms3_dist', run_name='__main__', alter_sys=True)
finally:
    assert 'mpi4py' not in sys.modules
"""
RUNNERS = pytest.mark.parametrize(
    "runner", [["-m", "smorms3_dist"], ["-c", WITHOUT_MPI4PY]], ids=["mpi4py", "no mpi4py"]
)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    directory = tmp_path / "scripts"
    directory.mkdir()
    (directory / "neighbour.py").write_text("VALUE = 5")
    path = directory / "tell.py"
    path.write_text(TELL)
    return path


@pytest.mark.parametrize(
    "runner",
    [["-m", "smorms3_dist"], ["-c", WITHOUT_MPI4PY], [run_module.__file__, "smorms3_dist"]],
    ids=["mpi4py", "no mpi4py", "the launcher's"],
)
@pytest.mark.parametrize(
    ("command", "is_module"), [(["scripts/tell.py"], False), (["-m", "scripts.tell"], True)]
)
def test_a_script_or_a_module_runs_as_main_with_its_arguments(
    runner: list[str], command: list[str], is_module: bool, script: Path, tmp_path: Path
) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 6")
    arguments = ["a", "-b", "-m", "--help"]
    status, output = run(tmp_path, *runner, *command, *arguments)
    assert status == 0, output
    name, told, path, file, value = json.loads(output.splitlines()[-1])
    assert name == "__main__"
    assert told == [str(script) if is_module else command[0], *arguments]
    assert (tmp_path / path).samefile(tmp_path if is_module else script.parent)
    assert (tmp_path / file).samefile(script)
    assert value == (6 if is_module else 5)


@pytest.mark.parametrize(
    ("failure", "expected", "trace"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('gave up')", 1, "gave up"),
        ("raise ValueError('no good')", 1, "ValueError: no good"),
    ],
)
@RUNNERS
def test_the_status_is_the_scripts(
    runner: list[str], failure: str, expected: int, trace: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(f"import sys\n{failure}\n")
    status, output = run(tmp_path, *runner, "script.py")
    assert status == expected
    assert trace in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py", "a"], "there is no script 'missing.py' in {cwd}"),
        (["--help"], None),
        ([], "no script is given"),
        (["-m"], "-m needs the name of a module"),
        (["--verbose", "script.py"], "'--verbose' is not an option"),
        (["--shard"], "no script is given"),
        (["--shard=gradients=all", "script.py"], "--shard: gradients must be one of auto, "),
    ],
)
def test_a_wrong_command_line_is_an_error_and_help_says_how_to_use_it(
    arguments: list[str], message: str | None, tmp_path: Path
) -> None:
    status, output = run(tmp_path, "-m", "smorms3_dist", *arguments)
    assert status == (0 if message is None else 2)
    if message is None:
        assert output.startswith("usage: python -m smorms3_dist [--shard[=OPTIONS]] SCRIPT")
    else:
        error, _ = output.splitlines()
        assert f"error: {message.format(cwd=tmp_path)}" in error


@pytest.mark.mpi
def test_the_ranks_of_an_unmodified_script_train(tmp_path: Path) -> None:
    script = Path(__file__).parent / "scripts" / "multi_node_iterator.py"
    status, output = run_ranks(tmp_path, "-m", "smorms3_dist", script)
    assert status == 0, output
    assert "all ranks agree" in output


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("failure", "expected", "trace"),
    [("raise ValueError('no good')", 1, "ValueError: no good"), ("sys.exit(3)", 3, "")],
)
def test_a_rank_that_fails_ends_the_job(
    failure: str, expected: int, trace: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(FAIL.format(failure=failure))
    status, output = run_ranks(tmp_path, "-m", "smorms3_dist", "script.py")
    assert status == expected, output
    assert trace in output
