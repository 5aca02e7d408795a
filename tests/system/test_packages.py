"""The wheel and the sdist: what is in them, and that the wheel works away from the checkout."""

from __future__ import annotations

import os
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

from smorms3_dist import __version__
from smorms3_dist.compat.chainer_install import VERSION

import numpy as np
import process
import pytest

pytest.importorskip("flit_core")

ROOT = Path(__file__).resolve().parents[2]

INFO = f"smorms3_dist-{__version__}.dist-info"
BUILD = """
import sys
from flit_core import buildapi
buildapi.build_wheel(sys.argv[1])
buildapi.build_sdist(sys.argv[1])
"""


class Packages(NamedTuple):
    wheel: Path
    sdist: Path


def build(checkout: Path, folder: Path) -> Packages:
    folder.mkdir()
    status, output = process.run(sys.executable, "-c", BUILD, folder, cwd=checkout)
    assert (status, output) == (0, "")
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Packages(wheel, sdist)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    return build(ROOT, tmp_path_factory.mktemp("packages") / "made")


def modules() -> dict[str, bytes]:
    """The files of the package in the checkout, by name."""
    files = (path for path in (ROOT / "smorms3_dist").rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in files
        if "__pycache__" not in path.parts
    }


def in_wheel(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(in_wheel(wheel)[f"{INFO}/METADATA"].decode())


def test_the_wheel_is_for_every_python_and_has_the_package_alone(packages: Packages) -> None:
    assert packages.wheel.name == f"smorms3_dist-{__version__}-py3-none-any.whl"
    found = in_wheel(packages.wheel)
    about = {name: content for name, content in found.items() if name.startswith(INFO)}
    assert {name: found[name] for name in found.keys() - about} == modules()
    names = {name.removeprefix(f"{INFO}/") for name in about}
    assert names == {"entry_points.txt", "licenses/LICENSE", "METADATA", "RECORD", "WHEEL"}
    assert about[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    entry = "[console_scripts]\nsmorms3-dist=smorms3_dist.cli:main\n"
    assert about[f"{INFO}/entry_points.txt"].decode().strip() == entry.strip()


def test_it_depends_on_nothing_that_has_to_be_built(packages: Packages) -> None:
    about = metadata(packages.wheel)
    required = about.get_all("Requires-Dist")
    always = {line.split(">")[0] for line in required if "extra ==" not in line}
    assert always == {"mpi4py", "numpy", "packaging", "xxhash"}
    assert [line.replace(" ", "") for line in required if line.startswith("chainer")] == [
        f'chainer=={VERSION};extra=="chainer"'
    ]
    assert about["License-Expression"] == "MIT"
    assert about.get_payload().strip() == (ROOT / "README.md").read_text().strip()


def test_the_sdist_gives_the_same_wheel(packages: Packages, tmp_path: Path) -> None:
    with tarfile.open(packages.sdist) as file:
        names = set(file.getnames())
        # Python 3.10 to 3.12 have it since security fixes of 2023 only.
        file.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    top = f"smorms3_dist-{__version__}"
    beside = ["CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "build-constraints.txt"]
    beside += ["constraints.txt", "pyproject.toml"]
    assert names == {f"{top}/{name}" for name in [*beside, *modules()]}
    again = build(tmp_path / top, tmp_path / "again")
    assert in_wheel(again.wheel) == in_wheel(packages.wheel)


@pytest.mark.mpi
def test_the_demo_runs_in_another_environment_away_from_the_checkout(
    packages: Packages, tmp_path: Path
) -> None:
    """With the dependencies of this one; tests/system/install.sh installs them, too."""
    venv, away = tmp_path / "venv", tmp_path / "away"
    away.mkdir()
    assert process.run(sys.executable, "-m", "venv", "--without-pip", venv) == (0, "")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--quiet"]
    status, output = process.run(*pip, "--no-deps", "--no-index", packages.wheel, env=env)
    assert status == 0, output
    (site,) = (venv / "lib").glob("python3.*/site-packages")
    # A path of a .pth file: this environment's own .pth, which names the checkout, counts for none.
    (site / "dependencies.pth").write_text(str(Path(np.__file__).parents[1]))
    # The MPI of a wheel is found beside the Python that it was installed for.
    env["LD_LIBRARY_PATH"] = f"{sys.prefix}/lib:{env.get('LD_LIBRARY_PATH', '')}"
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    # The kernel is the same one, compiled already.
    env.setdefault("NUMBA_CACHE_DIR", str(ROOT / "smorms3_dist" / "kernels" / "__pycache__"))
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    command = [venv / "bin" / "smorms3-dist", "demo", "-e", "1"]
    status, output = process.run(*command, env=env, cwd=away)
    assert status == 0, output
    assert output.startswith(f"plain Chainer on one process: {site}/smorms3_dist/demo/train.py\n")
    status, output = process.run(*command, "-n", "2", env=env, cwd=away)
    assert status == 0, output
    assert "[0] optimizer state: 1,616,256 bytes on a rank, 3,231,864 unsharded\n" in output
    assert not list(away.iterdir())
