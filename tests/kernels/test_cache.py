"""Compiled kernels are kept on disk, where CuPy keeps its own: one process compiles for all."""

from __future__ import annotations

import logging
import os
import pathlib
import types
from typing import Any

from smorms3_dist.kernels import cache, cuda

import fake_cupy
import pytest

KERNEL = "pack<float>"


def fake_nvrtc() -> Any:
    """In the place of ``cupy.cuda.nvrtc``: machine code that tells what it was made from."""

    def compile_program(program: list[str], options: tuple[str, ...]) -> None:
        fake.compiled += 1
        program.extend(options)

    def code_of(program: list[str]) -> bytes:
        return b"\0" + "\0".join((*program, *map(str, fake.version))).encode() + b"\0"

    fake = types.SimpleNamespace(
        version=(13, 5),
        compiled=0,
        NVRTCError=RuntimeError,
        getVersion=lambda: fake.version,
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
    monkeypatch.setattr(cache, "_said", set())
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


def test_a_damaged_file_is_replaced(nvrtc: Any) -> None:
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
    assert launch() == launch()
    assert launch("pack<double>")[1] == "lowered pack<double>"
    assert nvrtc.compiled == 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"kernels for GPUs: {folder} cannot" in record.message


def test_what_cannot_be_written_or_read_is_said_and_leaves_nothing_behind(
    nvrtc: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        expected = launch()
    assert not files()
    assert [record.message.endswith("(disk full)") for record in caplog.records] == [True]
    assert launch() == expected
    assert nvrtc.compiled == 2
    (file,) = files()
    file.unlink()
    file.mkdir()
    cache._said.clear()
    assert launch() == expected
    assert nvrtc.compiled == 3
    assert len(caplog.records) == 2
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
    assert str(cache.folder_of_cupy()) == os.environ["CUPY_CACHE_DIR"]
    monkeypatch.delenv("CUPY_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder_of_cupy() == tmp_path / ".cupy" / "kernel_cache"


def test_a_missing_nvrtc_is_named(nvrtc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("libnvrtc.so.12: cannot open shared object file")

    monkeypatch.setattr(nvrtc, "getVersion", fail)
    with pytest.raises(RuntimeError, match=r"cannot use NVRTC, CUDA's compiler: libnvrtc\.so\.12"):
        launch()
