"""Which GPU a rank uses: by the launcher's number, one a rank, refused where there are too few."""

from __future__ import annotations

import functools
import types
from typing import Any

import smorms3_dist
from smorms3_dist.collectives import gpus
from smorms3_dist.device.gpu_check import Missing

import pytest
from rank_threads import run_ranks


@pytest.mark.parametrize("variable", gpus.LOCAL_RANK_VARIABLES)
def test_the_launcher_says_which_rank_of_its_host_a_process_is(variable: str) -> None:
    assert gpus.local_rank({variable: "3"}) == 3
    assert gpus.local_rank({variable: ""}) is gpus.local_rank({}) is None


@pytest.fixture
def machine(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A host with two GPUs, as far as CuPy tells of it."""
    state = types.SimpleNamespace(used=[], trouble=None)
    cupy.cuda.Device = lambda i: types.SimpleNamespace(use=lambda: state.used.append(i))
    cupy.cuda.runtime.getDeviceCount = lambda: 2
    monkeypatch.setattr(gpus, "missing_for_gpu", lambda: state.trouble)
    for variable in gpus.LOCAL_RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return state


def test_each_rank_of_a_host_has_a_gpu_of_its_own(machine: Any) -> None:
    assert run_ranks(2, smorms3_dist.use_gpu) == [0, 1]
    assert sorted(machine.used) == [0, 1]


def test_more_ranks_than_gpus_are_refused_unless_they_may_share(machine: Any) -> None:
    with pytest.raises(RuntimeError, match=r"ranks 0 and 2 would share GPU 0 of .* allow_sharing"):
        run_ranks(3, smorms3_dist.use_gpu)
    sharing = functools.partial(smorms3_dist.use_gpu, allow_sharing=True)
    assert run_ranks(5, sharing) == [0, 1, 0, 1, 0]


def test_what_is_missing_is_said_with_the_rank(machine: Any) -> None:
    machine.trouble = Missing("CuPy is not installed", "pip install something")
    words = r"rank 0 cannot use a GPU of .*: CuPy is not installed: pip install something\. To"
    with pytest.raises(RuntimeError, match=words):
        run_ranks(2, smorms3_dist.use_gpu)
