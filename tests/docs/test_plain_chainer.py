"""docs/plain-chainer.md: its script runs without MPI; its settings keep the first line first."""

from __future__ import annotations

import sys
from pathlib import Path

import fresh
import pages
import process
import pytest

PAGE = pages.read("plain-chainer.md")
SCRIPT, SPLIT = pages.blocks(PAGE, "python")
FIRST = "import smorms3_dist  # first: Chainer is mended when it is imported\n"

NO_MPI4PY = "import sys; sys.modules['mpi4py'] = None\n"


def without(missing: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has no mpi4py, or none that finds an MPI."""
    if missing == "libmpi":
        return {"MPI4PY_LIBMPI": str(tmp_path / "libmpi.so")}
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_MPI4PY)
    return {"PYTHONPATH": str(site)}


@pytest.mark.parametrize("missing", ["mpi4py", "libmpi"])
def test_a_plain_script_runs_with_the_line_and_by_the_command(missing: str, tmp_path: Path) -> None:
    assert SCRIPT.startswith(FIRST)
    env = fresh.environment()
    for name, value in without(missing, tmp_path).items():
        env[name] = f"{value}:{env[name]}" if name == "PYTHONPATH" else value
    probe = process.run(sys.executable, "-c", "from mpi4py import MPI", env=env)
    assert probe[0] == 1 and ("mpi4py" in probe[1] or "libmpi" in probe[1]), probe

    for way, text in ([], SCRIPT), (["-m", "smorms3_dist"], SCRIPT.removeprefix(FIRST)):
        script = tmp_path / "train.py"
        script.write_text(text)
        status, output = process.run(
            sys.executable, "-W", "error", *way, script, env=env, cwd=tmp_path
        )
        assert (status, output) == (0, "y = 3.00 x + 1.00\n")
        assert (tmp_path / "result" / "model").is_file()


def sorted_by_ruff(folder: Path, settings: str, script: str) -> str:
    """A script after ruff has sorted its imports, with settings that stand beside it."""
    (folder / "pyproject.toml").write_text(settings)
    (folder / "train.py").write_text(script)
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--select", "I", "--fix"]
    assert process.run(*command, "train.py", cwd=folder) == (0, "")
    return (folder / "train.py").read_text()


def test_the_comment_and_the_settings_keep_the_line_first(tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    settings = pages.blocks(PAGE, "toml")[0]
    plain = "[tool.ruff]\n"
    together = SPLIT.replace("\n# isort: split\n", "")
    assert together == "import smorms3_dist\nimport chainer\n"
    assert sorted_by_ruff(tmp_path, plain, together) == "import chainer\nimport smorms3_dist\n"
    assert sorted_by_ruff(tmp_path, plain, SPLIT) == SPLIT
    right = together.replace("dist\n", "dist\n\n")
    for script in together, "import chainer\nimport smorms3_dist\n":
        assert sorted_by_ruff(tmp_path, settings, script) == right
