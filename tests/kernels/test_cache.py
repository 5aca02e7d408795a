"""Compiled kernels are kept on disk, where CuPy keeps its own: one process compiles for all."""

from __future__ import annotations

import errno
import logging
import os
import pathlib
import pwd
import struct
import types
from typing import Any

from smorms3_dist.kernels import cuda

import fake_cupy
import pytest

KERNEL = "pack<float>"


def fake_nvrtc() -> Any:
    """In the place of ``cupy.cuda.nvrtc``: machine code that tells what it was made from."""

    def compile_program(program: list[str], options: tuple[str, ...]) -> None:
        fake.compiled += 1
        program.extend(options)

    def code_of(program: list[str]) -> bytes:
        content = b"\0" + "\0".join((*program, *map(str, fake.version))).encode() + b"\0"
        # An ELF file that ends with one program header.
        header = bytearray(64)
        struct.pack_into("<Q", header, 32, len(header))
        struct.pack_into("<HH", header, 54, len(content), 1)
        return bytes(header) + content

    fake = types.SimpleNamespace(
        version=(13, 5),
        compiled=0,
        NVRTCError=RuntimeError,
        getVersion=lambda: fake.version,
        getSupportedArchs=lambda: [75, 90, 100],
        createProgram=lambda source, *_: [source],
        addNameExpression=list.append,
        compileProgram=compile_program,
        getLoweredName=lambda program, name: f"lowered {name}",
        getCUBIN=code_of,
        destroyProgram=list.clear,
    )
    return fake


class Module:
    """In the place of a module that CuPy loads: its functions note what is launched."""

    def load(self, code: bytes) -> None:
        self.code = code

    def get_function(self, name: str) -> Any:
        return lambda *_: launched.append((self.code, name))


launched: list[tuple[bytes, str]] = []


@pytest.fixture
def nvrtc(cupy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    launched.clear()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "made" / "when needed"))
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    cupy.cuda.Module, cupy.cuda.nvrtc = Module, fake_nvrtc()
    return cupy.cuda.nvrtc


def launch(kernel: str = KERNEL, exact: bool = False) -> tuple[bytes, str]:
    """Launches a kernel as a new process does; returns its machine code and its name there."""
    cuda.CupyLauncher(exact).launch(kernel, 1, 256)
    return launched[-1]


def files() -> list[pathlib.Path]:
    return sorted(pathlib.Path(os.environ["CUPY_CACHE_DIR"]).iterdir())


def test_a_kernel_is_compiled_by_one_process_and_loaded_once_by_each(
    nvrtc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = launch()
    assert first[1] == "lowered pack<float>"
    assert launch() == first
    assert nvrtc.compiled == 1
    assert len(files()) == 1
    launcher = cuda.CupyLauncher()
    launcher.launch(KERNEL, 1, 256)
    monkeypatch.setattr(Module, "load", None)
    launcher.launch(KERNEL, 1, 256)
    assert len(launched) == 4


def test_whatever_the_code_depends_on_tells_kernels_apart(
    nvrtc: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    codes = {launch(), launch(exact=True), launch("pack<double>")}
    monkeypatch.setattr(fake_cupy.Device, "compute_capability", "100")
    codes.add(launch())
    nvrtc.version = (13, 6)
    codes.add(launch())
    changed = tmp_path / cuda.SOURCE.name
    changed.write_text(f"{cuda.SOURCE.read_text()}\n")
    monkeypatch.setattr(cuda, "SOURCE", changed)
    codes.add(launch())
    assert nvrtc.compiled == len(codes) == len(files()) == 6


def test_a_damaged_file_is_replaced_and_said(nvrtc: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = launch()
    (file,) = files()
    good = file.read_bytes()
    for damaged in (b"", good[:20], good[:-1], good[:-1] + b"\1", b"\0" + good[1:]):
        nvrtc.compiled = 0
        file.write_bytes(damaged)
        assert launch() == expected
        assert nvrtc.compiled == 1
        assert files() == [file]
        assert file.read_bytes() == good
        assert caplog.messages == [f"{file} is damaged: the kernel in it is compiled again"]
        caplog.clear()


@pytest.mark.usefixtures("nvrtc")
def test_a_file_is_complete_before_it_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = []

    def rename(old: str, new: pathlib.Path) -> None:
        assert not new.exists()
        pathlib.Path(old).rename(new)
        renamed.append(new.read_bytes())

    monkeypatch.setattr(os, "replace", rename)
    launch()
    (file,) = files()
    assert renamed == [file.read_bytes()]


def test_a_folder_that_cannot_be_made_is_said_once_and_no_error(
    nvrtc: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pathlib.Path(__file__) / "folder"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
    launcher = cuda.CupyLauncher()
    launcher.launch(KERNEL, 1, 256)
    launcher.launch("pack<double>", 1, 256)
    assert nvrtc.compiled == len(launched) == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"every process compiles its kernels, which cannot be kept in {folder} (Not a directory): "
        "name another folder with CUPY_CACHE_DIR"
    )


def test_what_cannot_be_written_or_read_is_said_and_leaves_nothing_behind(
    nvrtc: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        expected = launch()
    assert not files()
    assert "(No space left on device)" in caplog.messages[0]
    assert launch() == expected
    assert nvrtc.compiled == 2
    (file,) = files()
    file.unlink()
    file.mkdir()
    assert launch() == expected
    assert nvrtc.compiled == 3
    assert [record.message.count("(Is a directory)") for record in caplog.records] == [0, 1]
    assert files() == [file]


def test_the_folder_is_that_of_cupy_which_can_be_told_to_keep_kernels_in_memory(
    nvrtc: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert launch() == launch()
    assert nvrtc.compiled == 2
    assert not list(tmp_path.iterdir())
    assert not caplog.records
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "0")
    monkeypatch.delenv("CUPY_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    launch()
    assert len(list((tmp_path / ".cupy" / "kernel_cache").iterdir())) == 1


def test_a_user_without_a_home_leaves_no_folder_elsewhere(
    nvrtc: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("CUPY_CACHE_DIR")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.chdir(tmp_path)
    assert launch() == launch()
    assert nvrtc.compiled == 2
    assert not list(tmp_path.iterdir())
    assert "~/.cupy/kernel_cache (Could not determine home directory.)" in caplog.messages[0]


def test_a_missing_nvrtc_is_named(nvrtc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("libnvrtc.so.12: cannot open shared object file")

    monkeypatch.setattr(nvrtc, "getVersion", fail)
    with pytest.raises(RuntimeError, match=r"cannot use NVRTC, CUDA's compiler: libnvrtc\.so\.12"):
        launch()
