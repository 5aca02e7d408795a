"""Finds out what is missing for training on a GPU, and what to do about it.

Chainer only finds out that CuPy or a CUDA library is missing, and CuPy names the library that it
misses first. Nothing here happens at import: who needs a GPU asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from importlib import import_module, metadata
from typing import Any, NamedTuple

# The wheels of CuPy, by the major version of CUDA that they are built for.
_WHEELS = {12: "cupy-cuda12x", 13: "cupy-cuda13x"}


class Missing(NamedTuple):
    """What is missing for training on a GPU, both without a full stop; as a text, a sentence."""

    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.found}: {self.remedy}."


def missing_for_gpu(*, nccl: bool = False) -> Missing | None:
    """What is missing first for training on the current GPU, from CuPy up to a compiled kernel.

    It imports CuPy, and makes a context on the current GPU if there is one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's warnings on the way: the answer says it better
        return (
            _missing_in_cupy()
            or _missing_device()
            or _missing_for_kernels()
            or (_missing_nccl() if nccl else None)
        )


def count_gpus() -> int | Missing:
    """How many GPUs there are for this process, or what is missing first to count them.

    It imports CuPy, and makes no context.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        missing = _missing_in_cupy()
        return _count() if missing is None else missing


def _missing_in_cupy() -> Missing | None:
    """Imports all of CuPy that Chainer imports, and NVRTC."""
    try:
        import cupy
        from cupy.cuda import cublas  # noqa: F401

        for name in ("cupyx.scipy.linalg", "cupyx.scipy.special"):
            import_module(name)
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # whatever it fails with, it is the answer
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return Missing("CuPy is not installed", _install())
        return _broken(error)
    return None


def _broken(error: Exception, what: str = "") -> Missing:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    what = what or f"{_wheel()} cannot load what it needs"
    return Missing(f"{what} ({reason})", _install())


def _count() -> int | Missing:
    import cupy

    try:
        return int(cupy.cuda.runtime.getDeviceCount()) or _no_device()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return _missing_driver(error)


def _missing_device() -> Missing | None:
    import cupy

    count = _count()
    if isinstance(count, Missing):
        return count
    device = cupy.cuda.Device()
    capability, oldest = int(device.compute_capability), min(cupy.cuda.nvrtc.getSupportedArchs())
    if capability < oldest:
        return Missing(
            f"GPU {device.id} is too old for {_wheel()}: its compute capability is "
            f"{capability / 10}, and {oldest / 10} is the oldest that it compiles for",
            "use a newer GPU, or CuPy for an older CUDA",
        )
    return None


def _missing_driver(error: Any) -> Missing:
    import cupy

    if "cudaErrorNoDevice" in str(error):
        return _no_device()
    driver = _driver_version()
    if driver is None:
        return Missing(
            "There is no NVIDIA driver (libcuda.so.1 cannot be loaded)",
            "use a machine with a GPU and its driver, or start the container with its GPUs (docker "
            "run --gpus all)",
        )
    needed = cupy.cuda.driver.get_build_version() // 1000
    if driver // 1000 < needed:
        alternative = f", or {_install()}" if _suitable() else ""
        return Missing(
            f"{_wheel()} needs CUDA {needed}, and the NVIDIA driver is for CUDA "
            f"{driver // 1000}.{driver % 1000 // 10} at most",
            f"update the driver{alternative}",
        )
    return Missing(f"CUDA does not start ({error})", "see what nvidia-smi says")


def _no_device() -> Missing:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return Missing(f"The NVIDIA driver shows no GPU{why}", "see what nvidia-smi -L lists")


def _missing_for_kernels() -> Missing | None:
    """Compiles a kernel that includes a header of CUDA."""
    import cupy

    code = '#include <cuda_fp16.h>\nextern "C" __global__ void check(half*) {}'
    try:
        cupy.RawKernel(code, "check").compile()
    except Exception as error:  # of the compiler, of the loader, of the driver: all are answers
        return _broken(error)
    return None


def _missing_nccl() -> Missing | None:
    try:
        from cupy.cuda import nccl

        nccl.get_version()
    except Exception as error:  # an attribute that is not there, or NCCL's own error
        return _broken(error, "NCCL cannot be loaded")
    return None


def _driver_version() -> int | None:
    """The newest CUDA that the driver is for, such as 12040 for 12.4; ``None`` without a driver."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return version.value if status == 0 and version.value else None


def _wheel() -> str:
    """The name of the installed distribution of CuPy."""
    for name in _WHEELS.values():
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            return name
    return "CuPy"


def _suitable() -> list[int]:
    """The major versions of CUDA that the driver is for: all of them if there is no driver."""
    driver = _driver_version()
    return [major for major in _WHEELS if driver is None or major <= driver // 1000]


def _install() -> str:
    """The command that installs CuPy, the CUDA libraries and NCCL as they suit the driver."""
    installed, majors = _wheel(), _suitable()
    for major in majors:
        if _WHEELS[major] == installed:
            return _command(major)
    if _driver_version() is None:
        return " or ".join(map(_command, majors))
    if not majors:
        return f"update the NVIDIA driver, then {_command(min(_WHEELS))}"
    removal = f"pip uninstall {installed}, then " if installed in _WHEELS.values() else ""
    return removal + _command(max(majors))


def _command(major: int) -> str:
    return f"pip install 'smorms3-dist[cuda{major}]'"
