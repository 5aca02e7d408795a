"""``smorms3-dist install-chainer``: builds and installs Chainer, by the pip or uv that is there.

Chainer 7.8.1 is to be had as its source only, and its setup.py imports pkg_resources, which
setuptools 82 no longer has. Neither pip nor uv can be told by a package that depends on Chainer to
build it with an older setuptools: their user has to. So this package does not depend on Chainer,
which would make its own installation fail, but has this command.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

VERSION = "7.8.1"
"""The version of Chainer that the patches are for."""

_REQUIREMENT = f"chainer=={VERSION}"
_BUILD_CONSTRAINT = "setuptools<82"


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`."""
    options = _parser(program).parse_args(arguments)
    if options.save is None and _installed() == VERSION:
        print(f"Chainer {VERSION} is installed already")
        return 0
    uv = shutil.which("uv")
    with_pip = importlib.util.find_spec("pip") is not None
    if options.save is not None and not with_pip:
        return _refuse(program, f"only pip saves wheels, and {sys.executable} has no pip")
    if not with_pip and uv is None:
        missing = f"{sys.executable} has no pip, and uv is not on the PATH"
        return _refuse(program, f"{missing}: python -m ensurepip installs pip")
    print(f"getting Chainer {VERSION}, built with {_BUILD_CONSTRAINT}", flush=True)
    source = [] if options.wheels is None else ["--no-index", "--find-links", options.wheels]
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder, "build-constraint.txt")
        constraint.write_text(f"{_BUILD_CONSTRAINT}\n")
        if with_pip:
            done = _by_pip(constraint, source, options.save)
        else:
            done = _by_uv(str(uv), constraint, source)
    if not done:
        remedy = "with --wheels FOLDER it needs no package index"
        return _refuse(program, f"Chainer could not be installed, for the reason above; {remedy}")
    print(f"Chainer {VERSION} is {'installed' if options.save is None else 'saved'}")
    return 0


def _refuse(program: str, reason: str) -> int:
    print(f"{program}: error: {reason}", file=sys.stderr)
    return 1


def _by_pip(constraint: Path, source: list[str], save: str | None) -> bool:
    # Before 25.3, pip held what it builds with against the constraints of the environment, too;
    # since then there is a variable for that. As addresses, since spaces divide such lists.
    environment = dict(os.environ)
    environment["PIP_CONSTRAINT"] = environment["PIP_BUILD_CONSTRAINT"] = constraint.as_uri()
    # It would build with what is installed, whatever that is.
    environment.pop("PIP_NO_BUILD_ISOLATION", None)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    folder = constraint.parent if save is None else Path(save)
    # Alone: what Chainer runs with is not constrained.
    build = [*pip, "wheel", "--use-pep517", "--no-deps", "--wheel-dir", str(folder), *source]
    if subprocess.run([*build, _REQUIREMENT], env=environment).returncode:
        return False
    if save is not None:
        return True
    wheels = map(str, folder.glob("*.whl"))
    return subprocess.run([*pip, "install", *source, *wheels]).returncode == 0


def _by_uv(uv: str, constraint: Path, source: list[str]) -> bool:
    install = [uv, "pip", "install", "--quiet", "--python", sys.executable, *source]
    install += ["--build-constraint", str(constraint), _REQUIREMENT]
    return subprocess.run(install).returncode == 0


def _installed() -> str | None:
    try:
        return metadata.version("chainer")
    except metadata.PackageNotFoundError:
        return None


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=f"Build Chainer {VERSION} with a setuptools that can, and install it with what "
        "it needs, beside this package. pip does it, or uv where pip is not installed; both go by "
        "their own settings and environment variables.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--wheels",
        metavar="FOLDER",
        help="take everything from there, and nothing from a package index",
    )
    parser.add_argument(
        "--save",
        metavar="FOLDER",
        help="put the wheel of Chainer there instead of installing it",
    )
    return parser
