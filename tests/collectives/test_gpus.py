"""Which GPU a rank uses: by its number on its host, one a rank, refused where there are too few."""

from __future__ import annotations

import functools
import threading
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
    state = types.SimpleNamespace(used=[], trouble=None, gpus=2, contexts=[])
    own = threading.local()

    def use(number: int) -> None:
        own.number = number
        state.used.append(number)

    def look() -> Any:
        # What the real one launches makes a context on the current GPU.
        state.contexts.append(getattr(own, "number", 0))
        return state.trouble

    cupy.cuda.Device = lambda i: types.SimpleNamespace(use=lambda: use(i))
    monkeypatch.setattr(gpus, "count_gpus", lambda: state.trouble or state.gpus)
    monkeypatch.setattr(gpus, "missing_for_gpu", look)
    for variable in gpus.LOCAL_RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return state


def test_each_rank_of_a_host_has_a_gpu_of_its_own(machine: Any) -> None:
    assert run_ranks(2, smorms3_dist.use_gpu) == [0, 1]
    assert sorted(machine.used) == [0, 1]
    assert sorted(machine.contexts) == [0, 1]


@pytest.mark.parametrize(
    ("numbers", "chosen"),
    [
        # As Open MPI 5 numbers them where there are more ranks than cores.
        ([0, 2, 1], [0, 1, 2]),
        # Some of a host's ranks, as in a communicator that was split: the others have GPU 0 and 2.
        ([1, 3], [1, 3]),
        ([None, None, None], [0, 1, 2]),
    ],
)
def test_gpus_go_by_chainermns_count_of_a_hosts_ranks(
    numbers: list[int | None], chosen: list[int], machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.gpus = 4
    own = threading.local()
    monkeypatch.setattr(gpus, "local_rank", lambda environment: own.number)

    def choose(collectives: Any) -> int:
        own.number = numbers[collectives.rank]
        return smorms3_dist.use_gpu(collectives)

    assert run_ranks(len(numbers), choose) == chosen


def test_ranks_to_which_slurm_shows_one_gpu_each_are_told_of(
    machine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = threading.local()
    monkeypatch.setattr(gpus, "local_rank", lambda environment: own.rank)
    monkeypatch.setattr(gpus, "location_of_gpu", lambda chosen: own.rank)

    def choose(collectives: Any) -> int:
        own.rank = collectives.rank
        return smorms3_dist.use_gpu(collectives)

    machine.gpus = 1
    run_ranks(2, choose)
    assert caplog.messages == []
    monkeypatch.setenv("SLURM_PROCID", "0")
    run_ranks(1, choose)
    machine.gpus = 2
    run_ranks(2, choose)
    assert caplog.messages == []
    machine.gpus = 1
    run_ranks(2, choose)
    (message,) = caplog.messages
    assert "--gpus-per-node=N with --gpu-bind=none" in message


def test_more_ranks_than_gpus_are_refused_unless_they_may_share(machine: Any) -> None:
    with pytest.raises(RuntimeError, match=r"ranks 0 and 2 would share GPU 0 of .* allow_sharing"):
        run_ranks(3, smorms3_dist.use_gpu)
    sharing = functools.partial(smorms3_dist.use_gpu, allow_sharing=True)
    assert run_ranks(5, sharing) == [0, 1, 0, 1, 0]


def test_hosts_may_have_one_name(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = threading.local()
    monkeypatch.setattr(gpus, "running_host", lambda: f"localhost {own.started}")
    monkeypatch.setattr(gpus, "location_of_gpu", lambda chosen: (own.started, str(chosen)))

    def choose(collectives: Any) -> int:
        own.started = collectives.rank // 2
        return smorms3_dist.use_gpu(collectives)

    assert run_ranks(4, choose) == [0, 1, 0, 1]


def test_what_is_missing_is_said_with_the_rank(machine: Any) -> None:
    machine.trouble = Missing("CuPy is not installed", "pip install something")
    words = r"rank 0 cannot use a GPU of .*: CuPy is not installed: pip install something\. To"
    with pytest.raises(RuntimeError, match=words):
        run_ranks(2, smorms3_dist.use_gpu)
