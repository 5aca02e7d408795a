"""The kernel for CPUs on disk: whatever happens there, it runs, with the same bits."""

from __future__ import annotations

import functools
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist.kernels import cache, reference
from smorms3_dist.kernels.chainer_rules import SMORMS3
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.selection import compiled_update

import fresh
import numpy as np
import process
import pytest

numba = pytest.importorskip("numba")

from smorms3_dist.kernels import cpu  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "made" / "when needed"))
    return tmp_path / "made" / "when needed"


def new_process() -> dict[str, Any]:
    """The module as another process has it, with nothing compiled."""
    module = runpy.run_path(cpu.__file__, run_name=cpu.__name__)
    module["CACHE"].warns = True
    return module


def updated(update: Callable[..., None]) -> bytes:
    arrays = [np.linspace(1, 2, 5, dtype="f") for _ in range(5)]
    update(arrays[0], Mean(arrays[1]), arrays[2:])
    return b"".join(array.tobytes() for array in (arrays[0], *arrays[2:]))


EXPECTED = updated(functools.partial(reference.smorms3, lr=1e-3, eps=1e-16))


def compiled(module: dict[str, Any]) -> bool:
    """Runs the kernel; tells whether it was compiled, rather than found."""
    loop = module["_loop_of"](SMORMS3, in_blocks=False)
    numbers = 1, 1e-3, 1e-16

    def update(*arrays: Any) -> None:
        module["update"](SMORMS3, *arrays, numbers)

    assert updated(update) == EXPECTED
    return not loop.stats.cache_hits


def test_one_process_compiles_for_all(folder: Path) -> None:
    assert compiled(new_process())
    assert not compiled(new_process())
    assert len(list(folder.iterdir())) == 1


def test_a_damaged_file_is_replaced_and_rank_0_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert compiled(new_process())
    good = {path: path.read_bytes() for path in folder.iterdir()}
    middle = len(next(iter(good.values()))) // 2
    damages = [
        lambda content: b"",
        lambda content: content[:middle],
        # What is left after a crash: the right size, but the disk has not got the end.
        lambda content: content[:middle].ljust(len(content), b"\0"),
        lambda content: content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    ]
    for damage in damages:
        for path, content in good.items():
            path.write_bytes(damage(content))
        assert compiled(new_process())
        assert sorted(caplog.messages) == sorted(
            f"{path} is damaged: the kernel in it is compiled again" for path in good
        )
        caplog.clear()
        assert not compiled(new_process())
    for path in good:
        path.write_bytes(b"")
    module = new_process()
    module["CACHE"].warns = False
    assert compiled(module)
    assert caplog.messages == []


def test_nothing_is_loaded_for_a_kernel_that_is_found_but_what_runs_it(folder: Path) -> None:
    assert compiled(new_process())
    code = """
import sys
import numpy as np
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.chainer_rules import SMORMS3, SGD
from smorms3_dist.kernels.selection import compiled_update
arrays = [np.ones(3, "f") for _ in range(5)]
update = compiled_update(np.dtype("f"))
update(SMORMS3, arrays[0], Mean(arrays[1]), arrays[2:], (1, 1e-3, 1e-16))
# What a compilation begins with, and what takes longest of it.
assert "numba.np.arraymath" not in sys.modules
update(SGD, arrays[0], Mean(arrays[1]), (), (0.1,))
assert "numba.np.arraymath" in sys.modules and "scipy.linalg" not in sys.modules
"""
    status, output = process.run(sys.executable, "-c", code, env=fresh.environment())
    assert (status, output) == (0, "")
    assert len(list(folder.iterdir())) == 2


def test_a_full_disk_costs_the_compilation_and_one_warning(folder: Path) -> None:
    pytest.importorskip("resource")
    code = """
import logging, resource
logging.basicConfig(format="%(message)s")
import numpy as np
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.chainer_rules import SMORMS3
from smorms3_dist.kernels.selection import compiled_update
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # files end there
arrays = [np.ones(3, "f") for _ in range(5)]
update = compiled_update(np.dtype("f"))
update(SMORMS3, arrays[0], Mean(arrays[1]), arrays[2:], (1, 1e-3, 1e-16))
# What takes as long as all the rest, and is needed by functions of others alone.
import importlib.util, sys, numba.np.arraymath
assert "scipy.linalg" not in sys.modules
blas = importlib.util.find_spec("scipy") is not None
assert numba.np.arraymath._HAVE_BLAS == blas
"""
    status, output = process.run(sys.executable, "-c", code, env=fresh.environment())
    assert status == 0, output
    assert output == (
        f"every process compiles its kernels, which cannot be kept in {folder} (File too large): "
        "name another folder with NUMBA_CACHE_DIR\n"
    )
    assert not list(folder.iterdir())


def test_the_next_folder_is_taken_where_the_first_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The folder of an installation that may not be written, and a user with a home.
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(cache, "__file__", f"{os.devnull}/cache.py")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiled(new_process())
    assert not compiled(new_process())
    assert len(list((tmp_path / ".cache" / "numba").iterdir())) == 1
    assert caplog.messages == []


def test_another_numba_may_have_changed_inside(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    form = numba.core.caching.CompileResultCacheImpl
    with monkeypatch.context() as patch:
        patch.setattr(form, "reduce", None)
        assert compiled(new_process())
    (message,) = caplog.messages
    assert f"cannot be kept with Numba {numba.__version__} (TypeError: " in message
    assert compiled(new_process())
    with monkeypatch.context() as patch:
        patch.setattr(form, "rebuild", None)
        assert compiled(new_process())
    assert not compiled(new_process())


def test_rank_0_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.CACHE, "warns", False)
    for rank, warns in (1, False), (0, True), (1, True):
        compiled_update(np.dtype(np.float32), rank)
        assert cpu.CACHE.warns == warns
