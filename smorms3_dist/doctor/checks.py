"""All that is looked at, in the order in which it is shown; and where its facts come from."""

from __future__ import annotations

import functools
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist import compat
from smorms3_dist.device.malloc import keep_freed_memory
from smorms3_dist.doctor import (
    gpu_findings,
    machine,
    mpi_findings,
    packages,
    probes,
    processes,
    two_ranks,
)
from smorms3_dist.doctor.findings import Check, Finding, green, summary, yellow
from smorms3_dist.launch import environment
from smorms3_dist.launch.backends import (
    Backend,
    BackendError,
    choose,
    library_of_wheel,
    offers_pmix,
)
from smorms3_dist.version import __version__

_SHARED_MEMORY = Path("/dev/shm")
_VERSION_LIMIT_S = 30.0


class Facts:
    """What several checks need: found out once, when it is needed. The job has so many seconds."""

    def __init__(self, limit: float) -> None:
        self._limit = limit

    @functools.cached_property
    def mpi(self) -> Mapping[str, Any]:
        """See `probes.look_at_mpi`."""
        return probes.ask("mpi")

    @functools.cached_property
    def gpus(self) -> Mapping[str, Any]:
        """See `probes.look_at_gpus`."""
        return probes.ask("gpus")

    @functools.cached_property
    def backend(self) -> Backend | BackendError:
        """What starts ranks by mpirun; or why nothing does."""
        try:
            return choose("mpirun")
        except BackendError as error:
            return error

    @functools.cached_property
    def job(self) -> two_ranks.JobResult:
        """What became of a job of two ranks."""
        return two_ranks.run(self.backend, "trouble" not in self.mpi, self._limit)


def all_checks(limit: float, with_jobs: bool, hosts: Sequence[str] = ()) -> list[Check]:
    """Lists the checks, if wanted with those of jobs that may take so many seconds each.

    They run on this host, and between the first of some hosts and each other one.
    """
    facts = Facts(limit)
    checks = [
        Check("smorms3_dist", lambda: green(f"{__version__} ({Path(__file__).parents[1]})")),
        Check("Python", _python),
        Check("NumPy", lambda: packages.numpy(packages.load("numpy"), sys.version_info[:2])),
        Check("Chainer", lambda: packages.chainer(packages.load("chainer")), "importing Chainer"),
        Check("patches", _patches),
        Check("Numba", lambda: packages.numba(packages.load("numba")), "importing Numba"),
        Check("xxhash", lambda: packages.xxhash(packages.load("xxhash"))),
        Check(
            "MPI library",
            lambda: mpi_findings.library(facts.mpi, library_of_wheel()),
            "loading the MPI library",
        ),
        Check("MPI wheels", lambda: mpi_findings.wheels(probes.installed(probes.MPI_WHEELS))),
        Check("launcher", lambda: _launcher(facts), "asking mpirun for its version"),
        Check("Slurm", _slurm),
        Check("GPUs", lambda: gpu_findings.gpus(facts.gpus), "asking the driver and CuPy for GPUs"),
        Check("CuPy", lambda: gpu_findings.cupy(facts.gpus)),
        Check("NCCL", lambda: gpu_findings.nccl(facts.gpus)),
        Check("cores", _cores),
        Check("ranks", lambda: machine.threads(environment.cores(), os.environ)),
        Check("malloc", lambda: green(keep_freed_memory())),
        Check("shared memory", _shared_memory),
        Check("temporary files", _temporary_space),
        Check(
            "open files", lambda: machine.open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
        ),
        Check("host name", _host_name, "looking for this host's address"),
    ]
    if with_jobs:
        doing = f"running a job of 2 ranks, for at most {limit:g} s"
        checks += [
            Check("2-rank job", lambda: two_ranks.two_ranks(facts.job), doing),
            Check("all-reduce", lambda: two_ranks.all_reduce(facts.job)),
            Check("training", lambda: two_ranks.training(facts.job)),
            Check(
                "CUDA-aware MPI",
                lambda: gpu_findings.cuda_aware(two_ranks.is_cuda_aware(facts.job), facts.gpus),
            ),
        ]
        doing = f"for at most {limit:g} s, running a job of 2 ranks on"
        for other in hosts[1:]:
            pair = (hosts[0], other)
            look = functools.partial(_between, pair, limit)
            checks.append(Check(f"{pair[0]}, {other}", look, f"{doing} {pair[0]} and {other}"))
    return checks


def _between(hosts: Sequence[str], limit: float) -> Finding:
    return two_ranks.between(two_ranks.run_between(hosts, limit))


def _python() -> Finding:
    version = sys.version_info[:3]
    return packages.python(platform.python_implementation(), version, sys.executable)


def _patches() -> Finding:
    try:
        records = compat.report()
    except ImportError as error:
        return yellow(f"not known: {summary(error)}", "mend that first")
    return packages.patches(records, sys.modules)


def _launcher(facts: Facts) -> Finding:
    backend, said = facts.backend, ""
    if not isinstance(backend, BackendError):
        said = processes.run([backend.program, "--version"], _VERSION_LIMIT_S, os.environ).stdout
    return mpi_findings.launcher(backend, said, shutil.which("mpirun"), facts.mpi)


def _slurm() -> Finding:
    job, srun = os.environ.get("SLURM_JOB_ID"), shutil.which("srun")
    has_pmix = job is not None and srun is not None and offers_pmix(srun)
    return mpi_findings.slurm(job, srun, has_pmix, os.environ)


def _cores() -> Finding:
    affinity = len(os.sched_getaffinity(0))
    return machine.cores(os.cpu_count() or affinity, affinity, environment.cores())


def _shared_memory() -> Finding:
    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None
    return machine.shared_memory(_SHARED_MEMORY, free, environment.local_ranks("auto"))


def _temporary_space() -> Finding:
    path = Path(tempfile.gettempdir())
    return machine.temporary_space(path, shutil.disk_usage(path).free)


def _host_name() -> Finding:
    name, trouble = socket.gethostname(), ""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        found, trouble = [], str(error)
    return machine.host_name(
        name, list(dict.fromkeys(str(entry[4][0]) for entry in found)), trouble
    )
