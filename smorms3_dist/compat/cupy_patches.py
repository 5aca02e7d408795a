"""The patches with which Chainer 7.8.1 and ChainerMN run on CuPy 14, whose last tested one was 7.

CuPy 13 needs none of them. Whether the installed CuPy needs one is read from its files, because
importing it takes its time and may fail. Where there is no CuPy, no patch is needed.
"""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from smorms3_dist.compat.patch import Patch, with_names


@functools.cache
def _cupy() -> Path | None:
    """The directory of the installed CuPy."""
    spec = PathFinder.find_spec("cupy")
    if spec is None or spec.origin is None:  # without an origin: any directory of that name
        return None
    return Path(spec.origin).parent


def _lacks(text: str, header: str) -> bool:
    """Whether CuPy is installed and a header that its kernels include lacks some text."""
    root = _cupy()
    return root is not None and text not in (root / "_core/include/cupy" / header).read_text()


class _Cuda:
    """``chainer.backends.cuda``, in which elementwise kernels begin with some code."""

    def __init__(self, preamble: str) -> None:
        self._preamble = preamble

    def __getattr__(self, name: str) -> Any:
        from chainer.backends import cuda

        return getattr(cuda, name)

    def elementwise(self, *args: Any, **kwargs: Any) -> Any:
        """As Chainer's, for kernels that have no preamble of their own."""
        from chainer.backends import cuda

        return cuda.elementwise(*args, preamble=self._preamble, **kwargs)


# --- half precision in kernels ----------------------------------------------------------------

# CuPy 14 includes the types for half precision only in kernels that take such an array.
_FLOAT16 = "#include <cupy/float16.cuh>\n"

# The product of two float16 is a float, which CuPy 13 rounded where CuPy 14 finds no overload.
_ATOMIC_ADD = (
    _FLOAT16
    + """
__device__ inline float16 atomicAdd(float16* address, float value) {
    return atomicAdd(address, float16(value));
}
"""
)


def _lacks_half() -> bool:
    return _lacks("cuda_fp16.h", "carray.cuh")


def _lacks_atomic_add_of_float() -> bool:
    return _lacks("float16 atomicAdd(", "atomics.cuh")


def _mend_batched_copy(module: ModuleType) -> None:
    def with_half(make_kernel: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(make_kernel)
        def make() -> Any:
            from chainer.backends import cuda

            kernel = make_kernel()
            return cuda.raw(f"#include <cuda_fp16.h>\n{kernel.code}", kernel.name)

        return make

    for name in ("_cupy_batched_pack_params", "_cupy_batched_unpack_params"):
        setattr(module, name, with_half(getattr(module, name)))


# --- copies -----------------------------------------------------------------------------------


def _copies_on_request_only() -> bool:
    # To see it rather than the version would need a GPU.
    root = _cupy()
    if root is None:
        return False
    version: str = runpy.run_path(str(root / "_version.py"))["__version__"]
    return int(version.partition(".")[0]) >= 14


def unpack_params(
    params: Any,
    attr_name: str,
    buffer: Any,
    transfer_dtype: Any,
    zero_fill: bool,
    stream: Any = None,
) -> None:
    """Stands in for ChainerMN's function of that name."""
    offset = 0
    for param in params:
        target = getattr(param, attr_name)
        if target is None and attr_name == "grad" and zero_fill:
            target = param.xp.empty_like(param.data)
            param.grad = target
        received = target
        if target.dtype != transfer_dtype:
            # In the target's layout, because the elements were packed as they lie there.
            received = param.xp.empty_like(target, dtype=transfer_dtype)
        buffer.to_device(received, received.nbytes, offset, stream)
        if received is not target:
            target[...] = received
        offset += received.nbytes


# --- cuDNN ------------------------------------------------------------------------------------


def _is_without_cudnn() -> bool:
    root = _cupy()
    return root is not None and not (root / "cudnn.py").exists()


# --- the registry -----------------------------------------------------------------------------

CUPY_PATCHES = (
    Patch(
        name="cudnn-warning",
        module="chainer.backends.cuda",
        reason="It advises to reinstall CuPy with cuDNN, which CuPy >= 14 does not support.",
        needed=_is_without_cudnn,
        mend=with_names(_cudnn_disabled_by_user=True),
    ),
    Patch(
        name="batched-copy-half",
        module="chainermn.communicators._memory_utility",
        reason="Its kernels name the type half, which CuPy >= 14 does not define for them.",
        needed=_lacks_half,
        mend=_mend_batched_copy,
    ),
    Patch(
        name="unpack-params-copy",
        module="chainermn.communicators._memory_utility",
        reason="It asks for an array of another dtype without a copy, which CuPy >= 14 refuses.",
        needed=_copies_on_request_only,
        mend=with_names(unpack_params=unpack_params),
    ),
    Patch(
        name="parallel-updater-half",
        module="chainer.training.updaters.multiprocess_parallel_updater",
        reason="Its kernels name the type float16, which CuPy >= 14 does not define for them.",
        needed=_lacks_half,
        mend=with_names(cuda=_Cuda(_FLOAT16)),
    ),
    Patch(
        name="negative-sampling-half",
        module="chainer.functions.loss.negative_sampling",
        reason="In CuPy >= 14 kernels cannot atomically add a float to a float16.",
        needed=_lacks_atomic_add_of_float,
        mend=with_names(cuda=_Cuda(_ATOMIC_ADD)),
    ),
    Patch(
        name="hierarchical-softmax-half",
        module="chainer.links.loss.hierarchical_softmax",
        reason="In CuPy >= 14 kernels cannot atomically add a float to a float16.",
        needed=_lacks_atomic_add_of_float,
        mend=with_names(cuda=_Cuda(_ATOMIC_ADD)),
    ),
)
