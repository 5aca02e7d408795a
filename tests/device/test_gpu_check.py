"""What is said where something is missing for training on a GPU."""

from __future__ import annotations

import sys
import types
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

from smorms3_dist.device import gpu_check
from smorms3_dist.device.gpu_check import missing_for_gpu

import pytest
from fresh import NULL_DEVICE, run_code


class CUDARuntimeError(RuntimeError):
    pass


def fail(error: Exception) -> Any:
    def call(*_: Any) -> Any:
        raise error

    return call


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A CuPy with which nothing is missing; a test takes away what is its own."""
    scipy = ["cupyx", "cupyx.scipy", "cupyx.scipy.linalg", "cupyx.scipy.special"]
    modules: dict[str, Any] = {n: types.ModuleType(n) for n in ["cupy", "cupy.cuda", *scipy]}
    for name, module in modules.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
        monkeypatch.setitem(sys.modules, name, module)
    cuda = modules["cupy.cuda"]
    cuda.cublas = object()
    cuda.nccl = Namespace(get_version=lambda: 22000)
    cuda.nvrtc = Namespace(getVersion=lambda: (13, 0), getSupportedArchs=lambda: (75, 90))
    cuda.driver = Namespace(get_build_version=lambda: 13000)
    cuda.runtime = Namespace(getDeviceCount=lambda: 2, CUDARuntimeError=CUDARuntimeError)
    cuda.Device = lambda: Namespace(id=1, compute_capability="90")
    modules["cupy"].RawKernel = lambda code, name: Namespace(compile=lambda: None)
    monkeypatch.setattr(gpu_check, "_wheel", lambda: "cupy-cuda13x")
    monkeypatch.setattr(gpu_check, "_driver_version", lambda: 13000)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return modules["cupy"]


@pytest.mark.parametrize(
    ("driver", "remedy"),
    [
        (None, "pip install 'smorms3-dist[cuda12]' or pip install 'smorms3-dist[cuda13]'"),
        (12040, "pip install 'smorms3-dist[cuda12]'"),
        (13010, "pip install 'smorms3-dist[cuda13]'"),
        (11080, "update the NVIDIA driver, then pip install 'smorms3-dist[cuda12]'"),
    ],
)
def test_without_cupy_the_extra_for_the_driver_is_named(
    driver: int | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(gpu_check, "_wheel", lambda: "CuPy")
    monkeypatch.setattr(gpu_check, "_driver_version", lambda: driver)
    assert str(missing_for_gpu()) == f"CuPy is not installed: {remedy}."


def test_a_module_that_cupy_does_not_find_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text("import a_module_that_is_not_there")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gpu_check, "_wheel", lambda: "cupy-cuda12x")
    monkeypatch.setattr(gpu_check, "_driver_version", lambda: None)
    assert str(missing_for_gpu()) == (
        "cupy-cuda12x cannot load what it needs (No module named 'a_module_that_is_not_there'): "
        "pip install 'smorms3-dist[cuda12]'."
    )


def test_a_cuda_library_that_does_not_load_is_named(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = "cupy-cuda13x cannot load what it needs (no libnvrtc.so.13): "
    cupy.cuda.nvrtc.getVersion = fail(RuntimeError("no libnvrtc.so.13\nand more"))
    assert str(missing_for_gpu()) == f"{found}pip install 'smorms3-dist[cuda13]'."
    monkeypatch.setattr(gpu_check, "_driver_version", lambda: 12080)
    assert str(missing_for_gpu()) == f"{found}{OTHER_WHEEL}"
    monkeypatch.setitem(sys.modules, "cupyx.scipy.linalg", None)
    assert "cupyx.scipy.linalg" in str(missing_for_gpu())


INSUFFICIENT = CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
OTHER_WHEEL = "pip uninstall cupy-cuda13x, then pip install 'smorms3-dist[cuda12]'."
NO_GPU = "The NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES is ''): see what nvidia-smi -L"
NO_START = "CUDA does not start (cudaErrorUnknown: unknown): see what nvidia-smi says."
TOO_OLD = "cupy-cuda13x needs CUDA 13, and the NVIDIA driver is for CUDA"


@pytest.mark.parametrize(
    ("error", "driver", "message"),
    [
        (INSUFFICIENT, None, "There is no NVIDIA driver (libcuda.so.1 cannot be loaded): use a"),
        (INSUFFICIENT, 12040, f"{TOO_OLD} 12.4 at most: update the driver, or {OTHER_WHEEL}"),
        (INSUFFICIENT, 11080, f"{TOO_OLD} 11.8 at most: update the driver."),
        (CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device"), 13000, NO_GPU),
        (CUDARuntimeError("cudaErrorUnknown: unknown"), 13000, NO_START),
    ],
)
def test_without_a_driver_or_a_gpu(
    error: Exception, driver: int | None, message: str, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_check, "_driver_version", lambda: driver)
    cupy.cuda.runtime.getDeviceCount = fail(error)
    assert str(missing_for_gpu()).startswith(message)


def test_what_is_missing_first_is_said(cupy: Any) -> None:
    cupy.RawKernel = fail(RuntimeError("cannot open source file cuda_fp16.h"))
    assert str(missing_for_gpu()) == (
        "cupy-cuda13x cannot load what it needs (cannot open source file cuda_fp16.h): "
        "pip install 'smorms3-dist[cuda13]'."
    )
    cupy.cuda.Device = lambda: Namespace(id=1, compute_capability="70")
    assert str(missing_for_gpu()) == (
        "GPU 1 is too old for cupy-cuda13x: its compute capability is 7.0, and 7.5 is the oldest "
        "that it compiles for: use a newer GPU, or CuPy for an older CUDA."
    )
    cupy.cuda.runtime.getDeviceCount = lambda: 0
    assert str(missing_for_gpu()) == "The NVIDIA driver shows no GPU: see what nvidia-smi -L lists."


def test_nccl_is_missing_only_where_it_is_needed(cupy: Any) -> None:
    assert missing_for_gpu(nccl=True) is None
    del cupy.cuda.nccl.get_version
    assert missing_for_gpu() is None
    missing = missing_for_gpu(nccl=True)
    assert missing is not None and missing.found.startswith("NCCL cannot be loaded (")
    assert missing.remedy == "pip install 'smorms3-dist[cuda13]'"


@pytest.mark.skipif(PathFinder.find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_installed_cupy_misses_at_most_a_gpu(tmp_path: Path) -> None:
    code = "from smorms3_dist.device import gpu_check\nprint(gpu_check.missing_for_gpu(nccl=True))"
    status, output = run_code(tmp_path, code)
    assert status == 0
    assert output.startswith(("None", "There is no NVIDIA driver", "The NVIDIA driver shows no"))
    status, output = run_code(tmp_path, f"{NULL_DEVICE}{code}\nnull_device.leave()")
    assert (status, output) == (0, "None\n")
