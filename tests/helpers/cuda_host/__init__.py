"""The kernels for GPUs on the CPU: the same source, compiled by g++ behind a header of our own."""

from __future__ import annotations

import ctypes
import hashlib
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

from smorms3_dist.kernels import cuda

import fake_cupy
import fake_streams
import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
CACHE = HERE.parents[2] / ".cache" / "kernels-on-host"


def build(*options: str) -> HostLauncher:
    """Compiles the source, without contraction unless options ask for it; once, for all tests.

    Skips the test where there is no g++.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    flags = [
        *("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off"),
        # Vectors are read from arrays of numbers.
        "-fno-strict-aliasing",
        # A GPU faults where a vector is not aligned; without this, a CPU need not.
        *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *options),
    ]
    sources = [cuda.SOURCE, *sorted(HERE.glob("*.[ch]*"))]
    key = hashlib.sha256(repr(flags).encode())
    for source in sources:
        key.update(source.read_bytes())
    library = CACHE / f"kernels-{key.hexdigest()[:16]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = pathlib.Path(folder, library.name)
            command = [compiler, *flags, f'-DSOURCE="{cuda.SOURCE}"']
            command += [str(HERE / "kernels.cpp"), "-o", str(made)]
            subprocess.run(command, check=True, timeout=300)
            # Several processes may compile at once; each gets a whole file.
            made.replace(library)
    return HostLauncher(ctypes.CDLL(str(library)))


class HostLauncher:
    """A `smorms3_dist.kernels.tables.KernelLauncher` whose device memory is NumPy's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.launches: list[str] = []
        self.uploads = 0

    def upload(self, host: np.ndarray) -> np.ndarray:
        self.uploads += 1
        return fake_streams.keep_alive(host.copy().view(fake_cupy.DeviceArray))

    def overwrite(self, array: np.ndarray, host: np.ndarray) -> None:
        assert array.shape == host.shape
        assert array.dtype == host.dtype
        self.uploads += 1
        # Pageable memory is read before the call returns.
        array.set(host)

    def fetch(self, array: Any) -> Callable[[], np.ndarray]:
        copy = np.empty(array.shape, array.dtype)
        source, done = array.view(np.ndarray), fake_streams.Event()
        stream = fake_streams.current()
        stream.do(lambda: np.copyto(copy, source))
        done.record(stream)

        def wait() -> np.ndarray:
            done.synchronize()
            return copy

        return wait

    def pointer(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def launch(self, kernel: str, blocks: int, threads: int, *arguments: Any) -> None:
        assert blocks > 0
        assert all(type(a) in (np.float64, np.int64, np.uint64) for a in arguments), arguments
        # Each argument in memory of its own, as the kernel's parameter will be.
        memories = [np.array(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(memories))(*(m.ctypes.data for m in memories))

        def run() -> None:
            assert memories  # which the pointers point to
            # Compiled for the host, kernels have globals.
            with fake_streams.changed:
                known = self._library.launch(kernel.encode(), blocks, threads, pointers)
            assert known, f"kernels.cpp has no {kernel}"

        self.launches.append(kernel)
        fake_streams.current().do(run)
