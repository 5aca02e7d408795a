"""The kernels for GPUs: their compilation by NVRTC, and their launches, through CuPy.

NVRTC compiles each kernel of ``smorms3.cu`` when it is loaded, or first launched; later processes
find it on disk. *Exact* launchers contract nothing into fused multiply-adds: their results are
those of the kernels for CPUs bit for bit. Others contract: after twenty steps, parameters and
states of SMORMS3, MomentumSGD and Adam still agree to 32 units in the last place (of 1, or of the
value where that is more). Both keep subnormal numbers, which CuPy's own compilation would flush to
zero; arithmetic in float16 is the same in both.

Launchers can be told to *approximate* besides: divisions and roots in float32 are then not the
nearest numbers, but within 2 units in the last place of them (CUDA's guarantee), and cost less.
With numbers that are off by that at random, the same twenty steps agree to 64 units. So far the
benchmark alone does: what that is worth on a GPU is not known yet.
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

from smorms3_dist.kernels import cuda_rules
from smorms3_dist.kernels.cache import KernelCache, cache_of_cupy

import numpy as np

SOURCE = pathlib.Path(__file__).with_name("smorms3.cu")
"""The source of all kernels, but for what update rules do to an element: see `source`."""

MIN_COMPUTE_CAPABILITY = 70
"""The oldest GPUs that run the kernels (Volta)."""


class KernelError(RuntimeError):
    """The kernels for GPUs cannot be compiled."""


def source() -> str:
    """All that is compiled."""
    return f"{SOURCE.read_text()}\n{cuda_rules.source()}"


_AT_ONCE_BYTES = 1 << 16
"""Of more pageable memory, CUDA may wait for the stream before it copies it."""

APPROXIMATE = ("--prec-div=false", "--prec-sqrt=false")
"""Lets divisions and roots of float32 be off by 2 units in the last place."""


def compile_options(
    nvrtc: Any, architecture: int, exact: bool, more: Sequence[str] = ()
) -> tuple[str, ...]:
    """What NVRTC is told besides the source; see `compile_kernels`."""
    newest = max(nvrtc.getSupportedArchs())
    # The driver compiles the rest of the way for GPUs that are newer than NVRTC.
    target = f"sm_{architecture}" if architecture <= newest else f"compute_{newest}"
    return (
        f"--gpu-architecture={target}",
        "--std=c++17",
        f"--fmad={'false' if exact else 'true'}",
        "--ftz=false",
        *more,
    )


def compile_kernels(
    nvrtc: Any,
    kernels: Sequence[str],
    architecture: int,
    exact: bool,
    more: Sequence[str] = (),
) -> tuple[bytes, list[str]]:
    """Compiles kernels, named as C++ does, to code in which they have new names.

    That is machine code (a cubin), or assembly (PTX) where NVRTC does not know the GPU yet.

    ``nvrtc`` is the module ``cupy.cuda.nvrtc``, or something with its functions; the architecture
    is the compute capability times ten, such as 90. Needs no GPU.

    Raises:
        KernelError: If there is no NVRTC, or if it cannot compile the kernels.
    """
    version = _version(nvrtc)
    program = nvrtc.createProgram(source(), SOURCE.name, (), ())
    try:
        for kernel in kernels:
            nvrtc.addNameExpression(program, kernel)
        options = compile_options(nvrtc, architecture, exact, more)
        nvrtc.compileProgram(program, options)
        names = [nvrtc.getLoweredName(program, kernel) for kernel in kernels]
        if f"sm_{architecture}" in options[0]:
            return _whole(nvrtc.getCUBIN(program)), names
        return nvrtc.getPTX(program).rstrip(b"\0") + b"\0", names
    except nvrtc.NVRTCError as error:
        raise KernelError(
            f"NVRTC {version} cannot compile {', '.join(kernels)} of {SOURCE.name} for "
            f"sm_{architecture} ({error}):\n{nvrtc.getProgramLog(program)}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def _whole(cubin: bytes) -> bytes:
    """Machine code with its last byte, which CuPy takes for the end of a text.

    A cubin ends with its program headers, of which an ELF file (System V ABI, chapter 4) says where
    they start, how large one is, and how many there are.
    """
    (start,) = struct.unpack_from("<Q", cubin, 32)
    size, count = struct.unpack_from("<HH", cubin, 54)
    return cubin.ljust(start + size * count, b"\0")


def find_kernel(
    nvrtc: Any,
    cache: KernelCache,
    kernel: str,
    architecture: int,
    exact: bool,
    more: Sequence[str] = (),
) -> tuple[bytes, str]:
    """As `compile_kernels` for one kernel, which is taken out of a cache, or put there."""
    options = compile_options(nvrtc, architecture, exact, more)
    key = source(), kernel, *options, _version(nvrtc)
    entry = cache.load(*key)
    if entry is None:
        code, (name,) = compile_kernels(nvrtc, [kernel], architecture, exact, more)
        cache.save(name.encode() + b"\0" + code, *key)
        return code, name
    encoded, _, code = entry.partition(b"\0")
    return code, encoded.decode()


class CupyLauncher:
    """A `KernelLauncher` for the current GPU and the current streams of CuPy.

    Args:
        exact: Whether nothing is contracted.
        more: More options of NVRTC's, such as `APPROXIMATE`.

    Raises:
        RuntimeError: If there is no CuPy, no usable GPU, or only one that is too old.
    """

    def __init__(self, exact: bool = False, more: Sequence[str] = ()) -> None:
        self._exact = exact
        self._more = more
        self._cupy = _cupy()
        try:
            self._device = self._cupy.cuda.Device()
            self._architecture = int(self._device.compute_capability)
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            raise RuntimeError(f"there is no usable GPU: {error}") from error
        if self._architecture < MIN_COMPUTE_CAPABILITY:
            raise RuntimeError(
                f"GPU {self._device.id} has compute capability {_dotted(self._architecture)}; "
                f"the kernels need {_dotted(MIN_COMPUTE_CAPABILITY)} or newer"
            )
        self._cache = cache_of_cupy()
        self._cache.warns = True
        self._functions: dict[str, Any] = {}

    def upload(self, host: np.ndarray) -> Any:
        """See `KernelLauncher`."""
        with self._device:
            return self._cupy.array(host)

    def overwrite(self, array: Any, host: np.ndarray) -> None:
        """See `KernelLauncher`."""
        flat, there = host.reshape(-1), array.reshape(-1)
        step = _AT_ONCE_BYTES // host.itemsize
        with self._device:
            stream = self._cupy.cuda.get_current_stream()
            # CUDA has read pageable memory when it returns, though the device may lag behind.
            for start in range(0, flat.size, step):
                there[start : start + step].set(flat[start : start + step], stream=stream)

    def fetch(self, array: Any) -> Callable[[], np.ndarray]:
        """See `KernelLauncher`."""
        import cupyx

        with self._device:
            host = cupyx.empty_pinned(array.shape, array.dtype)
            stream = self._cupy.cuda.get_current_stream()
            array.get(stream=stream, out=host, blocking=False)
            done = self._cupy.cuda.Event(disable_timing=True)
            done.record(stream)

        def wait() -> np.ndarray:
            done.synchronize()
            return host

        return wait

    def pointer(self, array: Any) -> int:
        """See `KernelLauncher`."""
        return array.data.ptr

    def launch(self, kernel: str, blocks: int, threads: int, *arguments: np.generic) -> None:
        """See `KernelLauncher`."""
        with self._device:
            self._function(kernel)((blocks,), (threads,), arguments)

    def load(self, kernel: str) -> None:
        """See `KernelLauncher`: takes it out of CuPy's folder of kernels, or compiles it."""
        with self._device:
            self._function(kernel)

    def _function(self, kernel: str) -> Any:
        function = self._functions.get(kernel)
        if function is None:
            code, name = find_kernel(
                self._cupy.cuda.nvrtc,
                self._cache,
                kernel,
                self._architecture,
                self._exact,
                self._more,
            )
            module = self._cupy.cuda.Module()
            module.load(code)
            function = self._functions[kernel] = module.get_function(name)
        return function


def _version(nvrtc: Any) -> str:
    try:
        return ".".join(map(str, nvrtc.getVersion()))
    except RuntimeError as error:
        raise KernelError(f"CuPy cannot use NVRTC, CUDA's compiler: {error}") from error


def _dotted(architecture: int) -> str:
    return f"{architecture // 10}.{architecture % 10}"


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            "the kernels for GPUs need CuPy: pip install 'smorms3-dist[cuda12]' or "
            f"'smorms3-dist[cuda13]', after the GPU's driver ({error})"
        ) from error
    return cupy
