"""Installation with plain pip into a user's own environment, and the script of CI."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from smorms3_dist.compat.chainer_install import BUILD_CONSTRAINT

import pytest
from process import run

ROOT = Path(__file__).resolve().parents[2]


def test_the_script_of_ci_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def documented_commands() -> str:
    """The block of docs/install.md that installs and trains."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/install.md").read_text(), re.DOTALL)
    (commands,) = (block for block in blocks if '".[mpi,cpu]"' in block)
    return commands


@pytest.mark.slow
@pytest.mark.mpi
def test_the_documented_commands_install_into_a_users_own_environment(tmp_path: Path) -> None:
    """By the pip that is new today; tests/system/install.sh tries others, and other ways."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # A wheel of Chainer in pip's cache would hide that it cannot be built.
    env["PIP_NO_CACHE_DIR"] = "1"
    probe = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path]
    code, output = run(*probe, "six", env=env)
    if code != 0:
        pytest.skip(f"no package index can be reached: {output}")
    before = set(ROOT.iterdir())

    bin_dir = tmp_path / "env" / "bin"
    venv = [sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"]
    assert run(*venv, env=env) == (0, "")
    # Faster than ensurepip, which is Python's own affair.
    pip = [sys.executable, "-m", "pip", "--python", bin_dir / "python", "install", "-q", "pip"]
    code, output = run(*pip, env=env)
    assert code == 0, output
    env["PATH"] = f"{bin_dir}:{env['PATH']}"
    code, output = run("bash", "-euc", documented_commands(), limit=300, env=env, cwd=ROOT)
    assert code == 0, output
    assert "Chainer 7.8.1 is installed\n" in output
    assert re.search(r"^\[0\] +10 +0\.\d+ +9\d\.\d+% ", output, re.M), output
    assert set(ROOT.iterdir()) == before


def test_what_builds_chainer_is_constrained_alike_everywhere() -> None:
    (for_pip,) = re.findall(r"^[^#\n].*", (ROOT / "build-constraints.txt").read_text(), re.M)
    assert f'build-constraint-dependencies = ["{for_pip}"]' in (ROOT / "pyproject.toml").read_text()
    assert for_pip == BUILD_CONSTRAINT
