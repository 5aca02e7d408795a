"""What ranks find in their environment, and where they find out which rank they are."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

from smorms3_dist.launch import environment
from smorms3_dist.launch.environment import (
    cores,
    forwarded,
    make_help_known,
    make_home_known,
    threads,
)
from smorms3_dist.launch.which_rank import gpus, which_rank

import pytest


def test_the_launcher_and_its_agents_import_no_numpy() -> None:
    code = (
        "import sys, smorms3_dist.launch.commands\n"
        # It is imported while the MPI library is looked at.
        "assert 'asyncio' not in sys.modules\n"
        "import smorms3_dist.launch.supervisor, smorms3_dist.launch.agent\n"
        "assert not {'numpy', 'chainer'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_secrets_go_to_other_hosts() -> None:
    variables = {
        name: "x"
        for name in (
            *("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "NCCL_DEBUG", "CUPY_CACHE_DIR", "LC_ALL"),
            *("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "CHAINER_API_TOKEN", "SMORMS3_PASSWORD"),
            *("HOME", "SSH_AUTH_SOCK", "MY_SETTING", "CUDA_VISIBLE_DEVICES"),
        )
    }
    expected = ["CUPY_CACHE_DIR", "LC_ALL", "NCCL_DEBUG", "OMP_NUM_THREADS", "PATH", "PYTHONPATH"]
    assert forwarded(variables, []) == expected
    named = ["MY_SETTING", "GITHUB_TOKEN", "NOT_THERE"]
    assert forwarded(variables, named) == sorted([*expected, "MY_SETTING", "GITHUB_TOKEN"])
    own = {environment.SETTINGS: "{}", environment.SECRET: "00"}
    assert forwarded(own, []) == sorted(own)


def test_a_user_always_has_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setenv("HOME", "/home/of/mine")
    make_home_known()
    assert os.environ["HOME"] == "/home/of/mine"
    monkeypatch.delenv("HOME")
    make_home_known()
    assert os.environ["HOME"] == pwd.getpwuid(os.getuid()).pw_dir
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    make_home_known()
    assert os.environ["HOME"] == "/"


def test_open_mpi_beside_python_finds_its_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(os, "environ", {})
    make_help_known()
    assert os.environ == {}
    (tmp_path / "share" / "openmpi").mkdir(parents=True)
    (tmp_path / "share" / "openmpi" / "help-mpi-runtime.txt").touch()
    for given in ({"MPI4PY_LIBMPI": "/lib/other.so"}, {"OPAL_PREFIX": "/opt"}):
        monkeypatch.setattr(os, "environ", dict(given))
        make_help_known()
        assert os.environ == given
    monkeypatch.setattr(os, "environ", {})
    make_help_known()
    assert os.environ == {"OPAL_PREFIX": str(tmp_path)}


def test_cores_are_shared_among_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cores", lambda: 8)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    assert threads({}, 3) == {**dict.fromkeys(names, "2"), "PYTHONUNBUFFERED": "1"}
    assert threads({}, 16)["OMP_NUM_THREADS"] == "1"
    assert threads({environment.BOUND: "core"}, 3)["OMP_NUM_THREADS"] == "8"
    found = threads({"OMP_NUM_THREADS": "5", "PYTHONUNBUFFERED": ""}, 2)
    assert found == {"OPENBLAS_NUM_THREADS": "5", "MKL_NUM_THREADS": "5"}


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    there = len(os.sched_getaffinity(0))
    for limit, expected in ((None, there), (1e9, there), (0.5, 1), (1.5, 1)):
        monkeypatch.setattr(environment, "cpu_limit", lambda limit=limit: limit)
        assert cores() == expected


def test_the_rank_is_what_the_launcher_says() -> None:
    values = {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    open_mpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in values.items()}
    assert which_rank(open_mpi)[:4] == (3, 4, 1, 2)
    words = "SLURM_PROCID=4 SLURM_STEP_NUM_TASKS=5 SLURM_LOCALID=0 SLURM_NODEID=2 PMIX_RANK=4"
    more = "SLURM_STEP_TASKS_PER_NODE=2(x2),1 SLURMD_NODENAME=n3"
    slurm = dict(word.split("=") for word in f"{words} {more}".split())
    assert which_rank(slurm) == (4, 5, 0, 1, "n3")
    assert which_rank({**slurm, "SLURM_NODEID": "1"}).local_size == 2
    del slurm["PMIX_RANK"]
    assert which_rank(slurm)[:4] == (0, 1, 0, 1), "srun without PMIx starts jobs of one rank"
    mpich = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
    assert which_rank(mpich)[:4] == (0, 2, 0, 2)
    with pytest.raises(LookupError, match="mpirun or srun"):
        which_rank({"SLURM_PROCID": "0"})


def test_gpus_are_counted(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpus({}, tmp_path) == 2
    assert gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
