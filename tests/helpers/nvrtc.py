"""NVRTC and CUDA's disassembler from their wheels, with neither CuPy nor a driver.

`Nvrtc` has the functions of ``cupy.cuda.nvrtc`` that the package calls, so that its own code does
the compiling. Both wheels are in the extra ``test``. Where one is missing, tests that need it are
skipped; where one is installed, whatever does not work is a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import pathlib
import re
import subprocess

import pytest


def _tried_in(name: str) -> list[str]:
    text = pathlib.Path(__file__).with_name("cuda_host").joinpath(name).read_text()
    kernels: list[str] = re.findall(r"^ +TRY\((.+)\)$", text, flags=re.MULTILINE)
    assert len(kernels) == text.count("TRY("), f"a line of {name} is not understood"
    return kernels


KERNELS = _tried_in("kernels.cpp")
"""Every kernel that is launched, but for the updates of other rules than SMORMS3: those that the
tests on the host know. There is no other list."""

KERNELS_OF_A_RULE = _tried_in("rule.cpp")
"""The updates of each other rule, whose name is to be put in the place of RULE."""

LIBRARIES = {"nvidia-cuda-nvrtc": "libnvrtc.so.13", "nvidia-cuda-nvrtc-cu12": "libnvrtc.so.12"}
DISASSEMBLERS = {"nvidia-cuda-nvdisasm": "nvdisasm"}


def installed(files: dict[str, str]) -> pathlib.Path:
    """The file of the first wheel that is installed; skips the test if none is."""
    for wheel, name in files.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            distribution = importlib.metadata.distribution(wheel)
            (path,) = (path for path in distribution.files or () if path.name == name)
            return pathlib.Path(str(distribution.locate_file(path)))
    pytest.skip(f"none of these wheels is installed: {', '.join(files)}")


class Nvrtc:
    """Stands for the module ``cupy.cuda.nvrtc``."""

    class NVRTCError(RuntimeError):
        """As CuPy's."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(installed(LIBRARIES)))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.compiled: dict[bytes, tuple[str, str]] = {}
        """The assembly (PTX) and the warnings of each machine code."""

    def getVersion(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def createProgram(
        self, source: str, name: str, headers: tuple[str, ...], include_names: tuple[str, ...]
    ) -> ctypes.c_void_p:
        assert not headers and not include_names
        program = ctypes.c_void_p()
        texts = source.encode(), name.encode()
        self._call("nvrtcCreateProgram", ctypes.byref(program), *texts, 0, None, None)
        return program

    def addNameExpression(self, program: ctypes.c_void_p, name: str) -> None:
        self._call("nvrtcAddNameExpression", program, name.encode())

    def compileProgram(self, program: ctypes.c_void_p, options: tuple[str, ...]) -> None:
        texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        self._call("nvrtcCompileProgram", program, len(options), texts)

    def getLoweredName(self, program: ctypes.c_void_p, name: str) -> str:
        lowered = ctypes.c_char_p()
        self._call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(lowered))
        assert lowered.value is not None
        return lowered.value.decode()

    def getSupportedArchs(self) -> list[int]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def getCUBIN(self, program: ctypes.c_void_p) -> bytes:
        code = self._get(program, "CUBIN")
        self.compiled[code] = self.getPTX(program).decode(), self.getProgramLog(program)
        # As CuPy, which takes the last byte for the end of a text.
        return code[:-1]

    def getPTX(self, program: ctypes.c_void_p) -> bytes:
        return self._get(program, "PTX")[:-1]

    def getProgramLog(self, program: ctypes.c_void_p) -> str:
        return self._get(program, "ProgramLog").rstrip(b"\0").decode()

    def destroyProgram(self, program: ctypes.c_void_p) -> None:
        self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, content)
        return content.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise self.NVRTCError(self._library.nvrtcGetErrorString(status).decode())


def disassemble(code: bytes, file: pathlib.Path) -> dict[str, list[str]]:
    """The instructions of each kernel in machine code, by the kernels' names in it."""
    file.write_bytes(code)
    # Following the flow of data, which nobody asks for here, takes as long again.
    command = [installed(DISASSEMBLERS), "--no-dataflow", file]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    _, *parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
    instruction = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return dict(zip(parts[::2], map(instruction.findall, parts[1::2]), strict=True))
