"""launchers/setup.sh: what it refuses, when it works, and when it does nothing.

Most tests give it an interpreter that makes a mock of a virtual environment, in which pip only
writes down how it was called.
"""

from __future__ import annotations

import os
import select
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from smorms3_dist.version import TESTED_PYTHONS

import pytest
from process import finish, run, start

ROOT = Path(__file__).resolve().parents[2]

# Takes ``-m venv DIRECTORY``; all else goes to the real interpreter.
INTERPRETER = """\
#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    mkdir "$3/bin" && cp "{directory}/pip" "$3/bin/python"
else
    PYTHONPATH="{directory}/site" exec "{real}" "$@"
fi
"""
# Stands for ``.venv/bin/python -m pip ...``.
PIP = """\
#!/bin/sh
printf '%s constraint=%s user=%s\\n' "$*" "$PIP_CONSTRAINT" "$PIP_USER" >>"{log}"
"""


class Checkout:
    """A copy of what the set-up needs, and an interpreter that installs nothing."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "a checkout"
        self.venv = self.root / ".venv"
        self.stamp = self.venv / "set-up.stamp"
        self.root.mkdir()
        for name in ["pyproject.toml", "constraints.txt", "build-constraints.txt"]:
            shutil.copy(ROOT / name, self.root)
        for name in ["launchers/setup.sh", "smorms3_dist/version.py"]:
            (self.root / name).parent.mkdir()
            shutil.copy(ROOT / name, self.root / name)

        self.log = directory / "pip.log"
        self.log.touch()
        self._fake = directory / "fake"
        (self._fake / "site").mkdir(parents=True)
        self.python = self._fake / "python3"
        self._write(self.python, INTERPRETER.format(directory=self._fake, real=sys.executable))
        self.set_pip("")
        self.pretend("")

    def set_pip(self, then: str) -> None:
        """Makes pip run shell code after it has written down how it was called."""
        self._write(self._fake / "pip", PIP.format(log=self.log) + then)

    def pretend(self, code: str) -> None:
        """Makes the interpreter run Python code first."""
        base = f"import sys; sys._base_executable = {str(self.python)!r}\n"
        (self._fake / "site" / "sitecustomize.py").write_text(base + code)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        # What the tests' own environment sets must not reach the script.
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
        env = clean | {"PYTHON": str(self.python)} | environment
        return start("bash", self.root / "launchers/setup.sh", env=env)

    def set_up(self, **environment: str) -> tuple[int, str]:
        return finish(self.start(**environment))

    def pip_calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    @staticmethod
    def _write(path: Path, content: str) -> None:
        path.write_text(content)
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


PYPY = "import platform; platform.python_implementation = lambda: 'PyPy'"
NEEDED = f"{TESTED_PYTHONS} is needed: name one with PYTHON="


@pytest.mark.parametrize(
    ("pretence", "python", "words"),
    [
        ("", "no-such-python", ["'no-such-python' here", "apt-get install python3 python3-venv"]),
        ("sys.version_info = (3, 9, 2, 'final', 0)", None, ["is CPython ", NEEDED]),
        (PYPY, None, ["is PyPy ", NEEDED]),
        ("sys.modules['ensurepip'] = None", None, ["apt-get install python3-venv"]),
    ],
)
def test_a_python_that_cannot_be_used_is_refused_with_the_remedy(
    checkout: Checkout, pretence: str, python: str | None, words: list[str]
) -> None:
    checkout.pretend(pretence)
    code, output = checkout.set_up(**({"PYTHON": python} if python else {}))
    assert code == 1
    assert all(each in output for each in words), output
    assert not checkout.venv.exists()


def test_a_python_newer_than_any_tested_is_used_with_a_warning(checkout: Checkout) -> None:
    checkout.pretend("sys.version_info = (3, 99, 0, 'final', 0)")
    code, output = checkout.set_up()
    assert code == 0, output
    assert f"newer than {TESTED_PYTHONS}" in output
    assert "name an older one with PYTHON=" in output
    assert len(checkout.pip_calls()) == 3


def test_a_venv_that_somebody_else_made_is_left_alone(checkout: Checkout) -> None:
    checkout.venv.mkdir()
    (checkout.venv / "mine").write_text("precious")
    code, output = checkout.set_up()
    assert code == 1
    assert ".venv was not made by this script: move it away or delete it" in output
    assert (checkout.venv / "mine").read_text() == "precious"


def test_pip_gets_the_pins_and_the_build_constraint(checkout: Checkout) -> None:
    code, output = checkout.set_up(PIP_CONSTRAINT="/other/pins.txt", PIP_USER="1")
    assert code == 0, output
    assert "PIP_CONSTRAINT is set in the environment; it is left aside" in output
    root = checkout.root
    common = f"-m pip install --quiet -c {root}/constraints.txt"
    assert checkout.pip_calls() == [
        f"{common} pip constraint= user=0",
        f"{common} --build-constraint {root}/build-constraints.txt "
        f"-e {root}[chainer,mpi,cpu,test,docs] constraint= user=0",
        f"{common} --no-deps mlxtend constraint= user=0",
    ]


def test_a_second_set_up_does_nothing(checkout: Checkout) -> None:
    assert checkout.set_up()[0] == 0
    calls, stamp = checkout.pip_calls(), checkout.stamp.stat().st_mtime_ns
    code, output = checkout.set_up()
    assert code == 0
    assert output.startswith("set-up: .venv is ready, with CPython 3.")
    assert output.count("\n") == 1
    assert checkout.pip_calls() == calls
    assert checkout.stamp.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("end", ["exit 1", "kill -KILL $PPID"])
def test_an_interrupted_set_up_is_repaired_by_the_next(checkout: Checkout, end: str) -> None:
    checkout.set_pip(f'case "$*" in *mlxtend*) {end} ;; esac\n')
    assert checkout.set_up()[0] != 0
    assert len(checkout.pip_calls()) == 3
    (checkout.venv / "half-installed").touch()

    checkout.set_pip("")
    code, output = checkout.set_up()
    assert code == 0, output
    assert "the .venv that is here is incomplete" in output
    assert len(checkout.pip_calls()) == 6
    assert not (checkout.venv / "half-installed").exists()
    assert ".venv is ready" in checkout.set_up()[1]
    assert len(checkout.pip_calls()) == 6


def another_python(checkout: Checkout) -> None:
    checkout.pretend("sys.version = sys.version.replace('(', '(another build ', 1)")


def moved(checkout: Checkout) -> None:
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))


@pytest.mark.parametrize(
    "change",
    [
        *("pyproject.toml", "constraints.txt", "build-constraints.txt", "launchers/setup.sh"),
        *(another_python, moved),
    ],
)
def test_another_python_or_place_or_changed_requirements_remake_the_venv(
    checkout: Checkout, change: Any
) -> None:
    assert checkout.set_up()[0] == 0
    if isinstance(change, str):
        with open(checkout.root / change, "a") as file:
            file.write("\n# changed\n")
    else:
        change(checkout)
    code, output = checkout.set_up()
    assert code == 0
    assert "not for this Python, place or requirements" in output
    assert f"making {checkout.root}/.venv" in output
    assert len(checkout.pip_calls()) == 6


def test_of_two_set_ups_at_once_one_waits_for_the_other(checkout: Checkout, tmp_path: Path) -> None:
    pipes = [tmp_path / name for name in ("started", "gate")]
    for path in pipes:
        os.mkfifo(path)
    # Open at both ends, so that nobody waits for the other side.
    started, gate = (os.open(path, os.O_RDWR) for path in pipes)
    # The first call of pip says that it runs, then waits to be let through.
    checkout.set_pip(
        'case "$*" in\n'
        f'*txt\\ pip) echo >"{tmp_path}/started"; read -r line <"{tmp_path}/gate" ;;\n'
        "esac\n"
    )
    first = checkout.start()
    assert select.select([started], [], [], 60)[0], "the first set-up did not get as far as pip"
    second = checkout.start()
    assert second.stdout is not None
    line = second.stdout.readline()
    os.write(gate, b"go\ngo\n")
    results = [finish(first), finish(second)]
    os.close(started)
    os.close(gate)

    assert "another set-up is at work in this checkout; waiting for it" in line
    assert [code for code, _ in results] == [0, 0], results
    assert results[1][1].startswith("set-up: .venv is ready")
    assert len(checkout.pip_calls()) == 3


def test_a_home_is_not_needed(checkout: Checkout) -> None:
    assert checkout.set_up()[0] == 0
    script = f'unset HOME; . "{checkout.root}/launchers/setup.sh"; echo "$HOME"'
    code, output = run("bash", "-c", script, env=os.environ | {"PYTHON": str(checkout.python)})
    assert code == 0
    assert output.splitlines()[-1] == f"{checkout.root}/.cache/home"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave files to somebody else")
def test_root_leaves_no_files_of_its_own_in_somebody_elses_checkout(checkout: Checkout) -> None:
    assert run("chown", "-R", "12345:12346", checkout.root) == (0, "")
    assert checkout.set_up()[0] == 0
    owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in checkout.root.rglob("*")}
    assert owners == {(12345, 12346)}
    assert checkout.stamp.exists()
