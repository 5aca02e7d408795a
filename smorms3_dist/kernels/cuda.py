"""The kernels for GPUs: their compilation by NVRTC, and their launches, through CuPy.

NVRTC compiles each kernel of ``smorms3.cu`` when it is first launched. *Exact* launchers contract
nothing into fused multiply-adds: their results are those of `smorms3_dist.kernels.reference` bit
for bit. Others contract: after twenty steps, parameters and states still agree to 32 units in the
last place (of 1, or of the value where that is more). Both keep subnormal numbers, which CuPy's own
compilation would flush to zero; arithmetic in float16 is the same in both.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

SOURCE = pathlib.Path(__file__).with_name("smorms3.cu")
"""The source of all kernels."""

MIN_COMPUTE_CAPABILITY = 70
"""The oldest GPUs that run the kernels (Volta)."""


def compile_kernel(kernel: str, architecture: int, exact: bool) -> tuple[bytes, str]:
    """Compiles one kernel; needs CuPy and NVRTC, but no GPU.

    Args:
        kernel: The kernel as C++ names it.
        architecture: The compute capability times ten, such as 90.
        exact: Whether to contract nothing.

    Returns:
        The machine code (a cubin), and the name of the kernel in it.

    Raises:
        RuntimeError: If there is no CuPy or no NVRTC, or if that cannot compile the kernel.
    """
    _cupy()
    from cupy.cuda import nvrtc

    options = (
        f"--gpu-architecture=sm_{architecture}",
        "--std=c++17",
        f"--fmad={'false' if exact else 'true'}",
        "--ftz=false",
    )
    try:
        program = nvrtc.createProgram(SOURCE.read_text(), SOURCE.name, (), ())
    except Exception as error:
        raise RuntimeError(f"CuPy cannot use NVRTC, CUDA's compiler: {error}") from error
    try:
        nvrtc.addNameExpression(program, kernel)
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program), nvrtc.getLoweredName(program, kernel)
    except nvrtc.NVRTCError as error:
        version = ".".join(map(str, nvrtc.getVersion()))
        raise RuntimeError(
            f"NVRTC {version} cannot compile {kernel} of {SOURCE.name} for sm_{architecture} "
            f"({error}):\n{nvrtc.getProgramLog(program)}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


class CupyLauncher:
    """A `smorms3_dist.kernels.tables.Launcher` for CuPy's current GPU, on CuPy's current streams.

    Args:
        exact: Whether to contract nothing; see the module.

    Raises:
        RuntimeError: If there is no CuPy, no usable GPU, or only one that is too old.
    """

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
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
        self._functions: dict[str, Any] = {}

    def upload(self, host: np.ndarray) -> Any:
        """See `smorms3_dist.kernels.tables.Launcher`."""
        with self._device:
            return self._cupy.array(host)

    def overwrite(self, array: Any, host: np.ndarray) -> None:
        """See `smorms3_dist.kernels.tables.Launcher`."""
        # CUDA has read pageable host memory when this returns, though the device may lag behind.
        with self._device:
            array.set(host, stream=self._cupy.cuda.get_current_stream())

    def pointer(self, array: Any) -> int:
        """See `smorms3_dist.kernels.tables.Launcher`."""
        return array.data.ptr

    def launch(self, kernel: str, blocks: int, threads: int, *arguments: np.generic) -> None:
        """See `smorms3_dist.kernels.tables.Launcher`. The first launch of a kernel compiles it."""
        with self._device:
            function = self._functions.get(kernel)
            if function is None:
                code, name = compile_kernel(kernel, self._architecture, self._exact)
                module = self._cupy.cuda.Module()
                module.load(code)
                function = self._functions[kernel] = module.get_function(name)
            function((blocks,), (threads,), arguments)


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
