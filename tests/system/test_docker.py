"""docker/ and the shell scripts: what linters say, and that the build finds what it copies.

tests/system/image.sh builds the image and runs it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
FOLDERS = (".ci", "docker", "docs", "launchers", "tests")


def lint(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # Beside this Python first, where the extra `test` has put them.
    path = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert path is not None, f"{program} is not installed: pip install .[test]"
    command = [path, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def copied() -> list[str]:
    """What the Dockerfile copies from the checkout."""
    lines = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    return [word for line in lines for word in line.split()[:-1] if not word.startswith("--")]


def test_hadolint_finds_nothing_in_the_dockerfile_and_faults_elsewhere(tmp_path):
    done = lint("hadolint", DOCKERFILE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text() + "USER root\nRUN cd /tmp\n")
    assert "DL3002" in lint("hadolint", tmp_path / "Dockerfile").stdout


def test_shellcheck_finds_nothing_in_any_shell_script_and_faults_elsewhere(tmp_path):
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    scripts = [
        path
        for path in files
        if path.suffix in (".sh", ".sbatch") or path.read_bytes()[:11] == b"#!/bin/bash"
    ]
    assert len(scripts) >= 10
    done = lint("shellcheck", "--external-sources", *scripts)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / "wrong.sh").write_text("#!/bin/bash\nrm -rf $1\n")
    assert "SC2086" in lint("shellcheck", tmp_path / "wrong.sh").stdout


def test_what_the_build_copies_is_there_and_not_ignored():
    ignored, *allowed = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignored == "*"
    kept = {line.removeprefix("!") for line in allowed if line.startswith("!")}
    assert set(copied()) == kept
    for name in kept:
        assert (ROOT / name).exists(), name


def test_devices_of_the_image_are_extras_of_the_package():
    text = DOCKERFILE.read_text()
    assert '".[chainer,mpi,${DEVICE}]"' in text
    said = re.search(r"DEVICE is one of the package's extras: ([^.]*)", text)[1]
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for device in ("cpu", "cuda12", "cuda13"):
        assert device in said and device in extras


def test_the_image_is_built_from_the_pins_and_runs_without_root():
    text = DOCKERFILE.read_text()
    assert {"constraints.txt", "build-constraints.txt"} <= set(copied())
    assert text.count("-c constraints.txt") == len(re.findall(r"pip[^\n]* install", text))
    last = text.split("\nFROM ")[-1]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["1000:1000"]
    assert last.index("USER ") > last.index("RUN ")
    assert "HEALTHCHECK" in last


def test_no_file_names_a_registry():
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    images = re.findall(
        r"image: (\S+)", "".join(p.read_text() for p in (ROOT / "launchers").glob("*.yaml"))
    )
    assert bases and images
    for name in bases + images:
        assert len(PurePosixPath(name).parts) == 1, name
