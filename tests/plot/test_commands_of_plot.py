"""``smorms3-dist plot``: the picture, what it says, and its exit statuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from smorms3_dist import cli

import mpirun
import process
import pytest


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """The directory of a trainer with three reports."""
    path = tmp_path / "result"
    path.mkdir()
    rows = [{"epoch": n, "iteration": 5 * n, "main/loss": 1 / n} for n in range(1, 4)]
    (path / "log").write_text(json.dumps(rows))
    return path


def test_the_picture_is_written_and_what_is_missing_is_said(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, begin in (("plot.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        out = [] if name == "plot.png" else ["--out", name]
        assert cli.main(["plot", str(result), *out]) == 0
        said = capsys.readouterr()
        assert said.out == f"{name}: loss\n"
        assert "not drawn: accuracy: no log has a key" in said.err
        assert (tmp_path / name).read_bytes().startswith(begin)
    assert sorted(os.listdir(tmp_path)) == ["a.svg", "plot.png", "result"]


def test_what_cannot_be_done_is_said_in_one_line(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def fail(*arguments: object) -> str:
        assert cli.main(["plot", *map(str, arguments)]) == 1
        *_, last = capsys.readouterr().err.splitlines()
        return last.removeprefix("smorms3-dist plot: error: ")

    assert fail(tmp_path / "no").startswith(f"{tmp_path / 'no'} cannot be read: No such file")
    nowhere = tmp_path / "no" / "x.png"
    assert (
        fail(result, "--out", nowhere) == f"{nowhere} cannot be written: No such file or directory"
    )
    (tmp_path / "log").write_text('[{"iteration": 3, "lr": 1}]')
    assert fail(tmp_path / "log") == "there is nothing to draw"
    for arguments in ([], [str(result), "--out", "x.txt"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["plot", *arguments])
        assert ended.value.code == 2
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'smorms3-dist[plot]'" in fail(result)
    assert sorted(os.listdir(tmp_path)) == ["log", "result"]


def test_nothing_needs_chainer_or_mpi(result: Path) -> None:
    program = (
        "import sys\n"
        "from smorms3_dist.cli import main\n"
        f"status = main(['plot', {str(result)!r}, '--out', {str(result / 'x.png')!r}])\n"
        "loaded = {'chainer', 'chainermn', 'mpi4py', 'cupy', 'numba'} & sys.modules.keys()\n"
        "sys.exit(str(loaded) if loaded else status)\n"
    )
    status, output = process.run(sys.executable, "-c", program, cwd=mpirun.ROOT)
    assert status == 0, output
