"""Chainer is not installed: what says so, and the command that installs it.

tests/system/install.sh installs the real one, by old and new versions of pip, and by uv.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import mpirun
import process
import pytest

COMMAND = "python -m smorms3_dist install-chainer"

# In the place of pip or uv: writes down how it was called, and makes the wheel that is asked for.
STAND_IN = """\
#!{python}
import json, os, pathlib, sys
from urllib.parse import unquote
names = "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "PIP_NO_BUILD_ISOLATION", "PIP_INDEX_URL"
constraints = [word for word in sys.argv if word.endswith("constraint.txt")]
constraints += [unquote(os.environ.get(name, "")).removeprefix("file://") for name in names[:2]]
call = {{
    "arguments": sys.argv[1:],
    "environment": {{name: os.environ[name] for name in names if name in os.environ}},
    "constraints": [open(path).read() for path in constraints if os.path.exists(path)],
}}
with open({log!r}, "a") as file:
    print(json.dumps(call), file=file)
if "wheel" in sys.argv:
    folder = pathlib.Path(sys.argv[sys.argv.index("--wheel-dir") + 1])
    (folder / "chainer-7.8.1-py3-none-any.whl").touch()
print("a long story", file=sys.stderr)
sys.exit({status})
"""


class Place:
    """An environment without Chainer, and stand-ins for what may install it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.env = {
            "PATH": str(folder / "bin"),
            "PYTHONPATH": f"{mpirun.ROOT}{os.pathsep}{folder / 'modules'}",
            "TMPDIR": str(folder),
        }

    def add(self, program: str, status: int = 0) -> None:
        path = {"pip": "modules/pip/__main__.py", "uv": "bin/uv"}[program]
        file = self.folder / path
        file.parent.mkdir(parents=True)
        text = STAND_IN.format(python=sys.executable, log=str(self.log), status=status)
        file.write_text(text)
        file.chmod(0o755)
        if program == "pip":
            file.with_name("__init__.py").touch()

    def python(self, *arguments: str | Path) -> tuple[int, str, str]:
        # -S: without the packages that are installed.
        command = [sys.executable, "-S", *map(str, arguments)]
        done = subprocess.run(
            command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    def install(self, *arguments: str | Path) -> tuple[int, str, str]:
        return self.python("-m", "smorms3_dist", "install-chainer", *arguments)

    def calls(self) -> list[dict]:
        return list(map(json.loads, self.log.read_text().splitlines()))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    folder = tmp_path / "with a space"
    folder.mkdir()
    return Place(folder)


def test_an_import_of_chainer_says_what_installs_it(place: Place) -> None:
    script = place.folder / "train.py"
    for name in "chainer", "chainermn", "chainer.links":
        script.write_text(f"import {name}")
        for arguments in (["-c", f"import smorms3_dist, {name}"], ["-m", "smorms3_dist", script]):
            status, _, error = place.python(*arguments)
            assert status == 1
            # From 3.15 on, Python adds that it runs without site, as it does here.
            assert error.splitlines()[-1].startswith(
                "ModuleNotFoundError: Chainer is not installed. This builds and installs it: "
                + COMMAND
            )
    status, _, error = place.python("-c", "import smorms3_dist, chainer_of_mine")
    message = "ModuleNotFoundError: No module named 'chainer_of_mine'"
    assert error.splitlines()[-1].startswith(message)


def test_pip_builds_with_an_older_setuptools_and_installs_without_that(place: Place) -> None:
    place.add("pip")
    place.env |= {"PIP_NO_BUILD_ISOLATION": "0", "PIP_CONSTRAINT": "mine.txt"}
    place.env |= {"PIP_INDEX_URL": "file:///index"}
    status, output, _ = place.install()
    assert (status, output.splitlines()[-1]) == (0, "Chainer 7.8.1 is installed")
    build, install = place.calls()
    assert {"wheel", "--use-pep517", "--no-deps", "chainer==7.8.1"} <= set(build["arguments"])
    # For each version of pip the variable that it knows; spaces would divide what they hold.
    assert build["constraints"] == ["setuptools<82\n"] * 2
    assert set(build["environment"]) == {"PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "PIP_INDEX_URL"}
    assert not any(" " in value for value in build["environment"].values())
    assert install["arguments"][-1].endswith("/chainer-7.8.1-py3-none-any.whl")
    assert install["arguments"][-2] == "install"
    assert install["environment"]["PIP_CONSTRAINT"] == "mine.txt"
    assert "PIP_BUILD_CONSTRAINT" not in install["environment"]


def test_a_folder_of_wheels_is_all_that_is_looked_at(place: Place) -> None:
    place.add("pip")
    assert place.install("--wheels", "wheels")[0] == 0
    for call in place.calls():
        words = call["arguments"]
        assert words[words.index("--no-index") :][1:3] == ["--find-links", "wheels"]


def test_the_wheel_may_be_saved_for_elsewhere(place: Place) -> None:
    place.add("pip")
    kept = place.folder / "kept"
    kept.mkdir()
    status, output, _ = place.install("--save", kept)
    assert (status, output.splitlines()[-1]) == (0, "Chainer 7.8.1 is saved")
    assert [path.name for path in kept.iterdir()] == ["chainer-7.8.1-py3-none-any.whl"]
    assert len(place.calls()) == 1


def test_uv_does_it_where_there_is_no_pip(place: Place) -> None:
    place.add("uv")
    assert place.install()[0] == 0
    (call,) = place.calls()
    words = call["arguments"]
    assert words[:2] == ["pip", "install"] and words[-1] == "chainer==7.8.1"
    assert words[words.index("--python") + 1] == sys.executable
    assert call["constraints"] == ["setuptools<82\n"]
    status, _, error = place.install("--save", "kept")
    assert (status, error) == (
        1,
        f"smorms3-dist install-chainer: error: only pip saves wheels, and {sys.executable} has no "
        "pip\n",
    )


def test_what_is_missing_or_fails_is_said_in_one_line_after_what_pip_says(place: Place) -> None:
    status, output, error = place.install()
    assert (status, output) == (1, "")
    assert error == (
        f"smorms3-dist install-chainer: error: {sys.executable} has no pip, and uv is not on the "
        "PATH: python -m ensurepip installs pip\n"
    )
    place.add("pip", status=1)
    status, _, error = place.install()
    assert status == 1
    assert error.splitlines() == [
        "a long story",
        "smorms3-dist install-chainer: error: Chainer could not be installed, for the reason "
        "above; with --wheels FOLDER it needs no package index",
    ]
    assert len(place.calls()) == 1
    # Nothing is left behind.
    assert sorted(path.name for path in place.folder.iterdir()) == ["log", "modules"]


def test_a_wheel_of_a_folder_is_installed_by_pip_itself(tmp_path: Path) -> None:
    # Its metadata is asked: to look for the module itself, setuptools' finder takes back distutils.
    try:
        pip = metadata.distribution("pip").locate_file("pip")
    except metadata.PackageNotFoundError:
        pytest.skip("pip is not installed beside this Python")
    wheel = tmp_path / "wheels" / "chainer-7.8.1-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "chainer-7.8.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("chainer/__init__.py", "__version__ = '7.8.1'")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: chainer\nVersion: 7.8.1\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    venv = tmp_path / "venv"
    assert process.run(sys.executable, "-m", "venv", "--without-pip", venv) == (0, "")
    (site,) = (venv / "lib").glob("python3.*/site-packages")
    (site / "pip").symlink_to(pip)
    env = {"PATH": os.defpath, "PYTHONPATH": str(mpirun.ROOT), "HOME": str(tmp_path)}
    install = [venv / "bin" / "python", "-m", "smorms3_dist", "install-chainer"]
    status, output = process.run(*install, "--wheels", wheel.parent, env=env)
    assert status == 0, output
    probe = [venv / "bin" / "python", "-c", "import smorms3_dist, chainer; print(chainer.__file__)"]
    assert process.run(*probe, env=env) == (0, f"{site}/chainer/__init__.py\n")
    assert process.run(*install, env=env) == (0, "Chainer 7.8.1 is installed already\n")
