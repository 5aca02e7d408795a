"""Patches come before Chainer; one thread of BLAS a rank; tests that lack a GPU are one line."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

# Read when NumPy is loaded: many small matrices on few cores, in several processes at once.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# Ranks that are threads share what they free: each of up to eight arenas a core would keep it.
_M_ARENA_MAX = -8
if hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    _libc.mallopt(_M_ARENA_MAX, 1)

import smorms3_dist  # noqa: E402, F401

# How long an example takes says nothing on a busy machine.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

WITHOUT_GPU, WITHOUT_CUPY = "without a GPU", "without CuPy"


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """Tells tests apart that are skipped for want of a GPU, or of CuPy."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    # The report of a file that is skipped as a whole has none.
    if "gpu" in getattr(report, "keywords", ()):
        return WITHOUT_GPU, "s", "SKIPPED"
    if "CuPy is not installed" in str(report.longrepr):
        return WITHOUT_CUPY, "s", "SKIPPED"
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Iterator[None]:
    """Says after all else, in one line, what was not run without a GPU, or without CuPy."""
    yield
    said = []
    for key in WITHOUT_GPU, WITHOUT_CUPY:
        reports = terminalreporter.getreports(key)
        files = Counter(report.nodeid.partition("::")[0] for report in reports)
        if files:
            said.append(f"{key}: {', '.join(f'{file} ({files[file]})' for file in files)}")
    if said:
        terminalreporter.write_line(
            f"not run {'; '.join(said)} (see tests/gpu.sh, tests/compat/cupy.sh)"
        )


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for CuPy, in its place."""
    import fake_cupy

    # It would be for the whole process.
    monkeypatch.setattr("smorms3_dist.device.forks._is_watching", True)
    module = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.fixture(scope="session")
def host_launcher() -> Any:
    """The kernels for GPUs, compiled for the host."""
    import cuda_host

    return cuda_host.build()
