"""How many ranks a job has, by what is asked for and what there is; which failures are repeated."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from smorms3_dist.launch import backends, environment
from smorms3_dist.launch.arguments import parse
from smorms3_dist.launch.backends import BackendError, OpenMpi
from smorms3_dist.launch.hosts import Host
from smorms3_dist.launch.output import Output
from smorms3_dist.launch.supervisor import Supervisor
from smorms3_dist.launch.verdict import Outcome

import pytest


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 3 cores and no GPU, within no allocation."""
    monkeypatch.setattr(environment, "cores", lambda: 3)
    monkeypatch.setattr(environment, "gpus", lambda: 0)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)


def ranks(*options: str) -> int:
    words = [*options, "--", "true"]
    text = Supervisor(parse(words, "smorms3-dist run"), OpenMpi("mpirun", 5)).dry_run()
    match = re.search(r"mpirun -n (\d+) ", text)
    assert match is not None, text
    return int(match[1])


def test_a_host_alone() -> None:
    assert ranks("-n", "5") == 5
    assert ranks("-n", "auto") == 3
    assert ranks("--nproc-per-node", "2") == 2
    assert ranks("--gpus-per-node", "4") == ranks("-n", "auto", "--gpus-per-node", "4") == 4
    with pytest.raises(BackendError, match="-n auto"):
        ranks()


def test_a_host_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: 2)
    assert ranks("-n", "auto") == 2


def test_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks("-H", "h1:2,h2:4") == ranks("-n", "auto", "-H", "h1:2,h2:4") == 6
    assert ranks("--nproc-per-node", "2", "-H", "h1:2,h2:4,h3") == 6
    monkeypatch.setattr(backends, "hosts_of_operator", lambda: [Host("p1", 4), Host("p2", 3)])
    assert ranks() == ranks("-n", "auto") == 7
    assert ranks("--nproc-per-node", "3") == 6
    with pytest.raises(ValueError, match="the 3 slots of p2"):
        ranks("--nproc-per-node", "4")


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"SLURM_NTASKS": "7"}, {"": 7, "auto": 7}),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "8"}, {"": 8, "auto": 8}),
        ({"SLURM_GPUS_ON_NODE": "8"}, {"": 2, "auto": 16}),
        ({}, {"": 2, "auto": 2}),
    ],
)
def test_an_allocation(
    variables: dict[str, str], found: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks() == found[""]
    assert ranks("-n", "auto") == found["auto"]
    assert ranks("--nproc-per-node", "5") == 10


MISSPELT = b"ModuleNotFoundError: No module named 'nunpy'"


class Failures:
    """What a supervisor of a script finds repeated of attempts that have ended badly."""

    def __init__(self, script: Path) -> None:
        script.write_text("")
        options = parse(["-n", "1", str(script)], "smorms3-dist run")
        self._supervisor: Any = Supervisor(options, OpenMpi("mpirun", 5))

    def repeats(
        self, *printed: tuple[bytes, bool], status: int = 1, steps: int = 0, failed: bool = True
    ) -> bool:
        """Whether a failure is one that has been there before, given what went to which stream."""
        output = Output(1, (), None)
        for piece, is_error in printed:
            output.piece(0, piece, is_error)
        self._supervisor._last_attempt = SimpleNamespace(
            steps=steps,
            has_failed=lambda rank: failed,
            job=SimpleNamespace(began=time.monotonic()),
        )
        return self._supervisor._is_the_same_again(Outcome(status, "", 0, True), output)


def test_a_failure_is_known_again_whatever_went_to_stdout_and_when(tmp_path: Path) -> None:
    failures = Failures(tmp_path / "script.py")
    traceback = (b"Traceback ...\n", True), (MISSPELT + b"\n", True)
    # As it comes if the script loads for more than a second, and if not.
    assert not failures.repeats((b"loading", False), *traceback, (b"\n", False))
    assert failures.repeats(*traceback, (b"loading\n", False))
    # Without a word to stderr, what went to stdout is all there is.
    assert not failures.repeats((b"bad option -x\n", False), status=2)
    assert not failures.repeats((b"bad option -y\n", False), status=2)
    assert failures.repeats((b"bad option -x\n", False), status=2)


def test_a_failure_is_known_again_after_one_of_another_kind_but_not_after_a_step(
    tmp_path: Path,
) -> None:
    failures = Failures(tmp_path / "script.py")
    misspelt = MISSPELT + b"\n", True
    assert not failures.repeats(misspelt)
    assert not failures.repeats(failed=False), "a host is lost"
    assert not failures.repeats((b"OSError: no file\n", True))
    assert not failures.repeats(status=137)
    assert failures.repeats(misspelt)
    assert not failures.repeats(misspelt, steps=1)
    assert not failures.repeats(misspelt)
