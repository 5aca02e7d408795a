"""Fresh interpreters, for tests in which it matters what is imported already."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import mpirun
import process
import pytest

# Code that makes the modules look as if they were not installed.
WITHOUT_SETUPTOOLS = """
import sys
class Blocker:
    names = ('setuptools', 'pkg_resources', '_distutils_hack', 'numpy.distutils')
    @classmethod
    def blocks(cls, fullname):
        return any((fullname + '.').startswith(name + '.') for name in cls.names)
    @classmethod
    def find_spec(cls, fullname, path, target=None):
        if cls.blocks(fullname):
            raise ModuleNotFoundError('No module named %r' % fullname, name=fullname)
for name in list(sys.modules):
    if Blocker.blocks(name):
        del sys.modules[name]
sys.meta_path.insert(0, Blocker)
"""

# Makes children come from a fork server unless they are told how, as Python does from 3.14 on.
FORK_SERVER_BY_DEFAULT = """
import multiprocessing
default = multiprocessing.context._default_context
default._default_context = multiprocessing.get_context('forkserver')
multiprocessing.get_all_start_methods = lambda: ['forkserver', 'fork', 'spawn']
"""

# For tests of what does and of what does not depend on them.
PRELUDES = pytest.mark.parametrize(
    "prelude", ["", WITHOUT_SETUPTOOLS], ids=["as installed", "no setuptools"]
)

# Libraries without which modules of Chainer do not import, or do only when they are used.
OPTIONAL = ("h5py", "onnx", "scipy")

# How code starts that calls CuPy on a machine without a GPU; see the module.
NULL_DEVICE = "import null_device\n"


def import_patched() -> None:
    """Imports the modules for which there are patches; of those of `OPTIONAL`, what it can."""
    from smorms3_dist.compat import PATCHES

    for patch in PATCHES:
        try:
            importlib.import_module(patch.module)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, in which the checkout is what is imported."""
    found = mpirun.environment(**variables)
    found.pop("PYTHONWARNINGS", None)
    return found


def run(cwd: Path, *arguments: str | Path, limit: float = 120) -> tuple[int, str]:
    """Runs an interpreter; returns its status and all that it printed."""
    # A process alone, which no launcher cleans up after, leaves its part of shared memory behind.
    alone = environment(OMPI_MCA_btl="self")
    return process.run(sys.executable, *arguments, limit=limit, env=alone, cwd=cwd)


def run_code(cwd: Path, code: str, *flags: str) -> tuple[int, str]:
    """Runs code as a script of its own, as `run` does."""
    script = cwd / "script.py"
    script.write_text(code)
    return run(cwd, *flags, script)


def passes(cwd: Path, code: str, *flags: str) -> str:
    """Runs code that must end well; returns what it printed."""
    status, output = run_code(cwd, code, *flags)
    assert status == 0, output
    return output


def succeed(cwd: Path, code: str, *flags: str) -> None:
    """Runs code that must end well and print nothing."""
    output = passes(cwd, code, *flags)
    assert not output, output


def run_ranks(cwd: Path, *arguments: str | Path, limit: float = 120) -> tuple[int, str]:
    """Runs two ranks of an interpreter, as `run` does."""
    return process.run(*mpirun.command(2, *arguments), limit=limit, env=environment(), cwd=cwd)
