"""``smorms3-dist install-chainer``: builds and installs Chainer, by the pip or uv that is there.

Chainer 7.8.1 is to be had as its source only, and its setup.py imports pkg_resources, which
setuptools 82 no longer has. Neither pip nor uv can be told by a package that depends on Chainer to
build it with an older setuptools: their user has to. So this package does not depend on Chainer,
which would make its own installation fail, but has this command.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from smorms3_dist.command_line import Parser

VERSION = "7.8.1"
"""The version of Chainer that the patches are for."""

_REQUIREMENT = f"chainer=={VERSION}"
BUILD_CONSTRAINT = "setuptools<82"
"""What Chainer is built with; so say build-constraints.txt, for pip, and pyproject.toml, for uv."""

_PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`."""
    options = make_parser(program).parse_args(arguments)
    if options.save is None and _installed() == VERSION:
        print(f"Chainer {VERSION} is installed already")
        return 0
    if options.save is not None and not _has_pip():
        return refuse(program, f"only pip saves wheels, and {sys.executable} has no pip")
    try:
        install = [*installer(), *from_folder(options.wheels)]
    except LookupError as error:
        return refuse(program, str(error))
    print(f"getting Chainer {VERSION}, built with {BUILD_CONSTRAINT}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder, "build-constraint.txt")
        constraint.write_text(f"{BUILD_CONSTRAINT}\n")
        if _has_pip():
            # Alone, since what Chainer runs with is not constrained.
            kept = Path(folder if options.save is None else options.save)
            done = _build(constraint, kept, from_folder(options.wheels))
            if options.save is None:
                done = done and _runs([*install, *map(str, kept.glob("*.whl"))])
        else:
            done = _runs([*install, "--build-constraint", str(constraint), _REQUIREMENT])
    if not done:
        remedy = "with --wheels FOLDER it needs no package index"
        return refuse(program, f"Chainer could not be installed, for the reason above; {remedy}")
    print(f"Chainer {VERSION} is {'installed' if options.save is None else 'saved'}")
    return 0


def installer() -> list[str]:
    """The command that installs what follows into this environment: that of pip, or else of uv.

    Raises:
        LookupError: If there is neither; it says what to do.
    """
    if _has_pip():
        return [*_PIP, "install"]
    uv = shutil.which("uv")
    if uv is None:
        missing = f"{sys.executable} has no pip, and uv is not on the PATH"
        raise LookupError(f"{missing}: python -m ensurepip installs pip")
    return [uv, "pip", "install", "--quiet", "--python", sys.executable]


def from_folder(wheels: str | None) -> list[str]:
    """The options of pip and uv to take everything from a folder, if there is one."""
    return [] if wheels is None else ["--no-index", "--find-links", wheels]


def refuse(program: str, reason: str) -> int:
    """Says why a command does not do what it was asked for, and returns its exit status."""
    print(f"{program}: error: {reason}", file=sys.stderr)
    return 1


def _has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def _build(constraint: Path, folder: Path, source: list[str]) -> bool:
    """Lets pip build the wheel of Chainer, and of nothing else."""
    # Before 25.3, pip held what it builds with against the constraints of the environment, too;
    # since then there is a variable for that. As addresses, since spaces divide such lists.
    environment = dict(os.environ)
    environment["PIP_CONSTRAINT"] = environment["PIP_BUILD_CONSTRAINT"] = constraint.as_uri()
    # It would build with what is installed, whatever that is.
    environment.pop("PIP_NO_BUILD_ISOLATION", None)
    build = [*_PIP, "wheel", "--use-pep517", "--no-deps", "--wheel-dir", str(folder), *source]
    return _runs([*build, _REQUIREMENT], environment)


def _runs(command: list[str], environment: dict[str, str] | None = None) -> bool:
    return subprocess.run(command, env=environment).returncode == 0


def _installed() -> str | None:
    try:
        return metadata.version("chainer")
    except metadata.PackageNotFoundError:
        return None


def make_parser(program: str) -> Parser:
    """The parser of its command lines."""
    parser = Parser(
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
