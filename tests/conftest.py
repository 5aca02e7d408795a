"""Chainer's patches come before Chainer; threads of BLAS come one a rank."""

from __future__ import annotations

import os
import shutil
import threading
from typing import Any

import pytest

# Read when NumPy is loaded: many small matrices on few cores, in several processes at once.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import smorms3_dist  # noqa: E402, F401


class OneAtATime:
    """A launcher for ranks that are threads; compiled for the host, kernels have globals."""

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher
        self.lock = threading.Lock()

    def launch(self, *arguments: Any) -> None:
        with self.lock:
            self.launcher.launch(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launcher, name)


@pytest.fixture(scope="session")
def host_launcher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels for GPUs, compiled for the host."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    import cuda_host

    return OneAtATime(cuda_host.build(tmp_path_factory.mktemp("kernels")))
