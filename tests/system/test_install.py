"""Installation with plain pip into a user's own environment, and the script of CI."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from process import run

ROOT = Path(__file__).resolve().parents[2]


def test_the_script_of_ci_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def documented_commands() -> str:
    """The block of docs/install.md that installs with pip."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/install.md").read_text(), re.DOTALL)
    (commands,) = (block for block in blocks if "--build-constraint" in block)
    return commands


def files_of(folder: Path) -> set[Path]:
    files = (path for path in (folder / "smorms3_dist").rglob("*") if path.is_file())
    return {path.relative_to(folder) for path in files if "__pycache__" not in path.parts}


@pytest.mark.slow
@pytest.mark.mpi
def test_the_documented_commands_install_into_a_users_own_environment(tmp_path: Path) -> None:
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
    assert set(ROOT.iterdir()) == before

    site = next((tmp_path / "env" / "lib").glob("python3.*/site-packages"))
    assert files_of(site) == files_of(ROOT)

    script = tmp_path / "train.py"
    script.write_text(
        "import chainermn\n"
        "comm = chainermn.create_communicator('naive')\n"
        "print('ranks', comm.allreduce_obj(1))\n"
    )
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    launch = ["mpirun", "-n", "2", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "python"]
    code, output = run(*launch, "-m", "smorms3_dist", script, env=env, cwd=tmp_path)
    assert code == 0, output
    assert output.splitlines() == ["ranks 2", "ranks 2"]
