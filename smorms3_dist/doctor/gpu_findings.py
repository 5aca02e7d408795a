"""Judges GPUs, CuPy and NCCL. All facts are as `probes.look_at_gpus` gives them.

Where there is no GPU, nothing is missing: training runs on CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smorms3_dist.doctor.findings import Finding, green, red, yellow


def gpus(facts: Mapping[str, Any]) -> Finding:
    """Judges the driver and what it shows."""
    if "trouble" in facts:
        return red(
            f"the driver and CuPy cannot be asked: {facts['trouble']}",
            "see what nvidia-smi and python -c 'import cupy' say",
        )
    driver, names = facts["driver"], facts["gpus"]
    if driver is None:
        return green("none: training runs on CPUs")
    cuda = f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
    if not names:
        return yellow(
            f"none, though there is an NVIDIA {cuda}",
            "see what nvidia-smi -L lists, and CUDA_VISIBLE_DEVICES",
        )
    listed = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return green(f"{listed}; {cuda}; up to {len(names)} ranks on this host over NCCL")


def cupy(facts: Mapping[str, Any]) -> Finding:
    """Judges CuPy."""
    if "trouble" in facts:
        return _unknown()
    wheels, missing = facts["wheels"], facts["missing"]
    listed = " and ".join(f"{name} {version}" for name, version in wheels.items())
    if len(wheels) > 1:
        return red(
            f"{listed} are installed, and overwrite each other's files",
            f"pip uninstall {' '.join(wheels)}, then install the one that fits the driver",
        )
    if missing is None:
        return green(f"{listed or 'installed'}; a kernel has been compiled")
    if not facts["gpus"]:
        return green(f"{listed or 'none'}: there is no GPU to use it on")
    found, remedy = missing
    # Without CuPy, training runs on CPUs; with one that is broken, it fails.
    return red(found, remedy) if wheels else yellow(found, remedy)


def nccl(facts: Mapping[str, Any]) -> Finding:
    """Judges NCCL."""
    if "trouble" in facts:
        return _unknown()
    if not facts["gpus"]:
        return green("none: there is no GPU")
    if facts["missing"] is not None:
        return yellow("not known: CuPy cannot be used", "mend CuPy first")
    if facts["missing_nccl"] is not None:
        found, remedy = facts["missing_nccl"]
        return yellow(f"{found}; ranks on GPUs communicate over MPI", remedy)
    number = facts["nccl"]
    return green(f"{number // 10000}.{number % 10000 // 100}.{number % 100}")


def cuda_aware(aware: bool | None, facts: Mapping[str, Any]) -> Finding:
    """Judges whether the MPI library takes pointers of GPUs; ``None`` if it was not asked."""
    if aware is None:
        return yellow("not known: the 2-rank job has not come to ask", "mend that first")
    if aware:
        return green("yes, the MPI library takes pointers to the memory of GPUs")
    if not facts.get("gpus"):
        return green("no; not needed without a GPU")
    if facts.get("nccl"):
        return green("no; not needed where each rank has a GPU of its own, thanks to NCCL")
    return yellow(
        "no: gradients go through host memory",
        "mend NCCL, or use an MPI that is built with CUDA (Open MPI: ./configure --with-cuda)",
    )


def _unknown() -> Finding:
    return yellow("not known", "see GPUs, above")
