"""Two GPUs that do nothing, for CuPy on a machine without one.

Memory is host memory and copies are copies, but kernels and libraries' functions return at once
without a result: arrays that they should fill hold zeros. Everything else is CuPy's own: which
kernel it launches for which dtypes, its code, and the compilation of this code by NVRTC, for a GPU
of compute capability 9.0. So what Chainer does on a GPU can be run for the dtypes that come out
and the kernels that compile, not for values. Every thread has a current GPU; neither reaches the
memory of the other, so that CuPy refuses what is computed on the wrong one.

CuPy's modules call each other through tables of C functions, made when they are imported. Import
this before CuPy: it puts other functions there. End the process with `leave`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from smorms3_dist.compat.importer import Importer
from smorms3_dist.compat.patch import Patch

launched: list[str] = []
"""The names of the kernels that were launched."""

_libc = ctypes.CDLL(None)
_libc.calloc.restype = ctypes.c_void_p
_libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]

_capsule_new = ctypes.pythonapi.PyCapsule_New
_capsule_new.restype = ctypes.py_object
_capsule_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype = ctypes.c_char_p
_capsule_name.argtypes = [ctypes.py_object]

_kept: list[object] = []  # what C code has pointers to
_own = threading.local()


def current() -> int:
    """The current GPU of this thread."""
    return getattr(_own, "device", 0)


def _set_current(device: int) -> int:
    assert device in (0, 1)
    _own.device = device
    return 0


def _malloc(size: int, *_: int) -> int:
    address: int = _libc.calloc(max(size, 1), 1)
    return address


def _copy(target: int, source: int, size: int, *_: int) -> None:
    ctypes.memmove(target, source, size)


def _set(target: int, value: int, size: int, *_: int) -> None:
    ctypes.memset(target, value, size)


def _attribute(attribute: int, device: int) -> int:
    return {1: 1024, 10: 32, 16: 132, 75: 9, 76: 0}.get(attribute, 65535)


def _get_function(module: int, name: str) -> int:
    _kept.append(name)
    return len(_kept) - 1


def _pointer_attributes(address: int) -> Any:
    from cupy_backends.cuda.api import runtime

    return runtime.PointerAttributes(current(), address, address, runtime.memoryTypeUnregistered)


def _launch(function: int, *_: int) -> None:
    launched.append(str(_kept[function]))


_FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "cupy_backends.cuda.api.runtime": {
        "getDevice": current,
        "setDevice": _set_current,
        "getDeviceCount": lambda: 2,
        "deviceGetAttribute": _attribute,
        "deviceGetPCIBusId": lambda device: "0000:00:00.0",
        "eventQuery": lambda event: 0,
        "getDeviceProperties": lambda device: {"name": b"null", "major": 9, "minor": 0},
        "malloc": _malloc,
        "mallocAsync": _malloc,
        "hostAlloc": _malloc,
        "free": _libc.free,
        "freeAsync": lambda address, stream: _libc.free(address),
        "freeHost": _libc.free,
        "memcpy": _copy,
        "memcpyAsync": _copy,
        "memset": _set,
        "memsetAsync": _set,
        "memGetInfo": lambda: (1 << 30, 1 << 30),
        "pointerGetAttributes": _pointer_attributes,
    },
    "cupy_backends.cuda.api.driver": {
        "ctxGetDevice": current,
        "moduleGetFunction": _get_function,
        "launchKernel": _launch,
        "funcGetAttribute": lambda attribute, function: 256,
        "occupancyMaxPotentialBlockSize": lambda *_: (132, 256),
    },
    "cupy_backends.cuda.libs.cublas": {},
    "cupy_backends.cuda.libs.curand": {},
}

# They tell about the library, not about a device.
_GENUINE = {
    *("_getCUDAMajorVersion", "_is_hip_environment", "check_status", "driverGetVersion"),
    *("get_build_version", "getVersion", "runtimeGetVersion"),
}

_C_TYPES: dict[str, Any] = {
    "PyObject *": ctypes.py_object,
    "double": ctypes.c_double,
    "float": ctypes.c_float,
    "int": ctypes.c_int,
    "intptr_t": ctypes.c_ssize_t,
    "size_t": ctypes.c_size_t,
    "uintmax_t": ctypes.c_uint64,
    "unsigned PY_LONG_LONG": ctypes.c_uint64,
    "unsigned int": ctypes.c_uint,
}


def _c_type(text: str) -> Any:
    text = text.removesuffix("__pyx_skip_dispatch").strip()
    if text in _C_TYPES:
        return _C_TYPES[text]
    if text.endswith("__pyx_optional_args"):
        return ctypes.c_void_p
    if text.endswith("*"):  # an object of a class of CuPy
        return ctypes.py_object
    return ctypes.c_int  # enumerations


def _nothing(result_type: Any) -> Callable[..., Any]:
    """A function without effect; what returns a pointer must not return the null pointer."""
    result = {ctypes.py_object: None, ctypes.c_ssize_t: 1}.get(result_type, 0)
    return lambda *_: result


def _replace_in_table(module: Any, functions: dict[str, Callable[..., Any]]) -> None:
    for name, capsule in list(module.__pyx_capi__.items()):
        signature = _capsule_name(capsule)
        result, bracket, rest = signature.decode().partition("(")
        if not bracket or name in _GENUINE or result.startswith("cuda"):
            continue  # data, or a function that returns a struct, which ctypes cannot
        arguments = [] if rest == "void)" else rest.removesuffix(")").split(",")
        given = sum("__pyx_" not in argument for argument in arguments)
        result_type = _c_type(result)
        function = functions.get(name, _nothing(result_type))

        def call(*values: Any, _function: Any = function, _given: int = given) -> Any:
            try:
                return _function(*values[:_given])
            except BaseException:  # C code cannot take it
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(70)

        callback = ctypes.PYFUNCTYPE(result_type, *map(_c_type, arguments))(call)
        address = ctypes.cast(callback, ctypes.c_void_p).value
        kept_signature = ctypes.create_string_buffer(signature)
        _kept.extend((callback, kept_signature))
        module.__pyx_capi__[name] = _capsule_new(
            address, ctypes.cast(kept_signature, ctypes.c_char_p), None
        )
        if hasattr(module, name):
            setattr(module, name, function)


def _replace(module: Any) -> None:
    functions = _FUNCTIONS[module.__name__]
    if hasattr(module, "__pyx_capi__"):
        _replace_in_table(module, functions)
        return
    for name, value in list(vars(module).items()):
        if "function" in type(value).__name__ and name not in _GENUINE:
            setattr(module, name, functions.get(name, _nothing(ctypes.c_ssize_t)))


def leave(status: int = 0) -> NoReturn:
    """Ends the process at once: CuPy frees memory later than Python can run what is here."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


assert "cupy" not in sys.modules, "import null_device before CuPy"
Importer.of(
    [Patch(name, name, "", needed=lambda: True, mend=_replace) for name in _FUNCTIONS]
).install()
