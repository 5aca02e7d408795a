"""The programs of the benchmark: what each of them writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from smorms3_dist.bench import rule_kernels, suite
from smorms3_dist.bench.workloads import WORKLOADS

import mpirun
import pytest


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("written")
    mpirun.run_program(2, "benchmarks.py", str(folder), limit=600)
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


@pytest.mark.mpi
def test_a_step_is_told_with_memory_and_a_memcpy_beside_it(
    written: dict[str, dict[str, Any]],
) -> None:
    for name, states in (("hooked", 2 / 2), ("hooked, chainermn", 2)):
        result = written[name]
        size = result["parameters"]
        assert size == WORKLOADS["200 small"].size
        more = {"as one"} if name == "hooked" else set()
        assert set(result["seconds"]) == {"step", "memcpy"} | more
        # No budget: the fewest steps that there are.
        assert all(len(times) == 3 and min(times) > 0 for times in result["seconds"].values())
        assert max(result["state_bytes"]) == pytest.approx(states * 4 * size, rel=0.01)
        assert len(result.get("peak_over_base_bytes", [0, 0])) == 2
        assert {"Python", "NumPy", "Chainer", "MPI"} <= result["versions"].keys()
    assert set(written["checked"]["seconds"]) == {"step", "memcpy", "check_sync"}
    assert set(written["shared"]["seconds"]) == {"step", "memcpy", "shared"}
    assert set(written["recorded"]["seconds"]) == {"step", "memcpy", "recorded", "report"}


@pytest.mark.mpi
def test_a_whole_step_is_the_sum_of_its_phases(written: dict[str, dict[str, Any]]) -> None:
    for name in ("whole", "whole, chainermn"):
        seconds = written[name]["seconds"]
        parts = zip(seconds["forward"], seconds["backward"], seconds["update"], strict=True)
        assert seconds["step"] == pytest.approx([sum(each) for each in parts])
    inside = written["whole"]["seconds"]
    for reduced, gathered, step in zip(
        inside["reduce and update"], inside["gather"], inside["step"], strict=True
    ):
        assert reduced > 0 and gathered > 0 and max(reduced, gathered) < step
    assert "gather" not in written["whole, chainermn"]["seconds"]


@pytest.mark.mpi
def test_bare_exchanges_are_told_with_their_bytes(written: dict[str, dict[str, Any]]) -> None:
    result = written["exchange"]
    assert result["bytes"] == 1 << 20
    assert set(result["seconds"]) == {"word", "exchange", "gather", "memcpy"}


@pytest.mark.mpi
def test_hosts_are_told_what_tcp_takes_by_bytes_that_go_over_it() -> None:
    (case,) = (case for case in suite.cases() if case.name.endswith("over TCP"))
    before = _bytes_of_loopback()
    result = suite.run([case], suite.Settings(quick=True, rounds=1), lambda _: None)
    assert result["failed"] == []
    (run,) = result["runs"]
    # Of each exchange half of the array, both ways.
    times = len(run["seconds"]["exchange"])
    assert _bytes_of_loopback() - before > 2 * times * run["bytes"] > 0


def _bytes_of_loopback() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    (numbers,) = (line.split(":")[1] for line in lines if line.strip().startswith("lo:"))
    return int(numbers.split()[0])


def test_the_kernel_of_each_rule_is_timed_at_each_placement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    path = tmp_path / "kernels.json"
    words = ["--ranks", "1", "--steps", "2", "--budget", "0", "--limit", "0", "--elements", "999"]
    monkeypatch.setattr(sys, "argv", ["rule_kernels", *words, "--result", str(path)])
    rule_kernels.main()
    result = json.loads(path.read_text())
    names = {f"{rule}, {place}" for rule in rule_kernels.RULES for place in rule_kernels.PLACES}
    assert set(result["seconds"]) == names
    assert all(len(times) == 2 for times in result["seconds"].values())
    assert result["bytes_an_element"]["SMORMS3"] == 36
    assert result["bytes_an_element"]["SGD"] == 12


def test_placements_are_what_they_are_called() -> None:
    starts = {
        placement: [array.ctypes.data % 4096 for array in rule_kernels.arrays(1 << 18, places)]
        for placement, places in rule_kernels.PLACES.items()
    }
    assert len(set(starts["equal"])) == 1
    assert len(set(starts["staggered"])) == 5
    assert len(set(starts["meeting"])) == 3 and len(set(starts["meeting"][2:])) == 3
