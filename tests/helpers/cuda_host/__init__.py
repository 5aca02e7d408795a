"""The kernels for GPUs on the CPU: the same source, compiled by g++ behind a header of our own."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import pathlib
import re
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

    Rules but SMORMS3 are compiled one by one, when they are first launched. Skips the test where
    there is no g++.
    """
    return HostLauncher(functools.cache(lambda rule: _library(rule, options)))


def _library(rule: str | None, options: tuple[str, ...]) -> ctypes.CDLL:
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
    main = HERE / ("kernels.cpp" if rule is None else "rule.cpp")
    if rule is not None:
        flags.append(f"-DRULE={rule}")
    key = hashlib.sha256(repr((flags, cuda.source())).encode())
    for source in (main, *sorted(HERE.glob("*.h"))):
        key.update(source.read_bytes())
    library = CACHE / f"{rule or 'kernels'}-{key.hexdigest()[:16]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made, source = pathlib.Path(folder, library.name), pathlib.Path(folder, "source.cu")
            source.write_text(cuda.source())
            command = [compiler, *flags, f'-DSOURCE="{source}"', str(main), "-o", str(made)]
            subprocess.run(command, check=True, timeout=300)
            # Several processes may compile at once; each gets a whole file.
            made.replace(library)
    return ctypes.CDLL(str(library))


class HostLauncher:
    """A `smorms3_dist.kernels.tables.KernelLauncher` whose device memory is NumPy's."""

    def __init__(self, library: Callable[[str | None], ctypes.CDLL]) -> None:
        self._library = library
        self.launches: list[str] = []
        self.loaded: set[str] = set()
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

    def load(self, kernel: str) -> None:
        self.loaded.add(kernel)

    def launch(self, kernel: str, blocks: int, threads: int, *arguments: Any) -> None:
        assert blocks > 0
        assert all(type(a) in (np.float64, np.int64, np.uint64) for a in arguments), arguments
        # Each argument in memory of its own, as the kernel's parameter will be.
        memories = [np.array(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(memories))(*(m.ctypes.data for m in memories))

        matched = re.fullmatch(r"update<(?!Smorms3)(\w+), (.+)>", kernel)
        library = self._library(matched and matched[1])
        name = f"update<RULE, {matched[2]}>" if matched else kernel

        def run() -> None:
            assert memories  # which the pointers point to
            # Compiled for the host, kernels have globals.
            with fake_streams.changed:
                known = library.launch(name.encode(), blocks, threads, pointers)
            assert known, f"there is no {kernel} here"

        self.launches.append(kernel)
        fake_streams.current().do(run)
