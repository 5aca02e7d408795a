"""The model of more ranks: its formulas, and that it stands beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.stored import merged, newest_of_parts, stored
from smorms3_dist import cli
from smorms3_dist.bench import simulation, suite
from smorms3_dist.bench.simulation import Link, NotRecorded, Recording
from smorms3_dist.bench.summary import OVER_LINK
from smorms3_dist.bench.workloads import WORKLOADS

import pytest
import recorded

SIZE = WORKLOADS["19M"].size
LINK = Link(ranks_per_host=2, latency=50e-6, bandwidth=125e6)


def result(cores: int = 2) -> dict[str, Any]:
    return recorded.result([case for case in suite.cases() if case.quick != "alone"], cores)


@pytest.mark.parametrize("cores", [2, 4, 8])
def test_it_agrees_with_a_machine_that_works_as_it_says(cores: int) -> None:
    known = list(Recording(result(cores)).checks())
    assert [ranks for ranks, *_ in known] == list(range(1, 9))
    for _, measured, modelled in known:
        assert modelled == pytest.approx(measured, rel=simulation.ALLOWED)


def test_it_stands_beside_the_steps_of_1_to_8_ranks_that_are_stored() -> None:
    known = list(Recording(merged(newest_of_parts(stored()))).checks())
    assert [ranks for ranks, *_ in known] == list(range(1, 9))
    for _, measured, modelled in known:
        assert modelled == pytest.approx(measured, rel=simulation.ALLOWED)


def test_ranks_that_share_cores_share_their_time() -> None:
    few, many = Recording(result(cores=2)), Recording(result(cores=8))
    assert few.contention(8) == pytest.approx(4 * many.contention(8))
    shared, alone = (recording.foretell(8, SIZE).reduce for recording in (few, many))
    assert shared == pytest.approx(4 * alone)
    # Beyond what was measured, as what was measured last.
    assert many.contention(16) == pytest.approx(2 * many.contention(8))


def test_between_hosts_the_slower_of_wire_and_update_counts() -> None:
    step = Recording(result()).foretell(4, SIZE, 1.0, LINK)
    # Each of the 2 ranks of a host sends half of its gradients to the other host.
    wire = 2 * SIZE * 4 / 2 / LINK.bandwidth / simulation.PAYLOAD
    assert step.reduce == pytest.approx(wire, rel=0.1)
    # The 2 of 4 parts of the other host enter once.
    assert step.gather == pytest.approx(wire / 2, rel=0.01)
    assert step.compute == 1.0 and step.total == pytest.approx(sum(step))
    fast = Recording(result()).foretell(4, SIZE, 1.0, LINK._replace(bandwidth=1e15))
    # All that a rank receives is taken to pass within the host, as long as that is slower.
    local = SIZE / 4 * recorded.UPDATE + 3 / 4 * SIZE * 4 * recorded.SENT
    # Three terms are read, and two sums on the way are written and read.
    local += (3 + 2 * 2) * SIZE / 4 * 4 * recorded.MEMCPY / 2
    assert fast.reduce == pytest.approx(local, rel=0.05)


def test_without_a_limit_of_the_wire_hosts_do_what_tcp_takes_their_processors() -> None:
    fast = LINK._replace(ranks_per_host=1, bandwidth=1e15, latency=0.0)
    step = Recording(result()).foretell(2, SIZE, 0.0, fast)
    sent = SIZE / 2 * 4 * recorded.OVER_TCP
    summed = SIZE / 2 * 4 * recorded.MEMCPY / 2
    assert step.gather == pytest.approx(sent, rel=0.01)
    assert step.reduce == pytest.approx(sent + summed + SIZE / 2 * recorded.UPDATE, rel=0.01)
    # A wire that is slower hides it.
    slow = Recording(result()).foretell(2, SIZE, 0.0, fast._replace(bandwidth=125e6))
    assert slow.gather == pytest.approx(SIZE / 2 * 4 / 125e6 / simulation.PAYLOAD, rel=0.01)
    # A result that does not know what TCP takes has parts pass as within a host.
    older = result()
    older["runs"] = [run for run in older["runs"] if not run["name"].endswith("over TCP")]
    known = Recording(older).foretell(2, SIZE, 0.0, fast)
    assert known.reduce < step.reduce and known.gather < step.gather


def test_it_stands_beside_two_measured_links() -> None:
    whole = result()
    (other,) = (
        r
        for r in whole["runs"]
        if (r["part"], r["name"], r["system"]) == ("step", "19M", "smorms3_dist")
    )
    nbytes = 4 * SIZE
    # Half of the gradients and then half of the parameters, both ways at once, and headers.
    seconds = {"step": [nbytes * 8 / 1e9 * 1.045]}
    whole["runs"].append(other | {"part": "links", "name": "1 Gbit/s", "seconds": seconds})
    narrow = {"part": "links", "name": "1 Gbit/s, all in bfloat16", "seconds": {"step": [0.3]}}
    whole["runs"].append(other | narrow)
    ((rate, measured, modelled),) = Recording(whole).checks_of_links()
    assert rate == 1 and modelled == pytest.approx(measured, rel=0.05)
    # A link that bare bytes take twice as long on has that bandwidth.
    (bare,) = (run for run in whole["runs"] if run["name"] == "64 MiB")
    name, twice = f"64 MiB {OVER_LINK} 1", [2 * bare["bytes"] / 2 * 8 / 1e9]
    seconds = {"exchange": twice, "gather": twice}
    whole["runs"].append(bare | {"name": name, "seconds": bare["seconds"] | seconds})
    ((_, measured, slower),) = Recording(whole).checks_of_links()
    assert slower == pytest.approx(2 * measured, rel=0.1)


def test_one_rank_sends_nothing() -> None:
    step = Recording(result()).foretell(1, SIZE, 0.0, LINK)
    assert step.gather == 0
    assert step.reduce == pytest.approx(SIZE * recorded.UPDATE, rel=0.02)


def test_world_sizes_double() -> None:
    assert simulation.world_sizes(1) == [1]
    assert simulation.world_sizes(12) == [1, 2, 4, 8, 12]
    assert simulation.world_sizes(16) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("part", ["ranks", "exchange", "checks"])
def test_a_missing_part_is_named(part: str) -> None:
    less = result()
    less["runs"] = [run for run in less["runs"] if run["part"] != part]
    with pytest.raises(NotRecorded, match=part):
        Recording(less)


def test_the_command_tells_a_model_from_a_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    whole = result()
    for run in whole["runs"]:
        if run["part"] == "ranks" and run["ranks"] == 3 and run["system"] == "smorms3_dist":
            run["seconds"]["step"] = [1.0]
    path.write_text(json.dumps(whole))
    assert cli.main(["bench", "--simulate", "4096", "--recorded", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("A model, not a measurement: 2 ranks a host, 50 us and 10 Gbit/s")
    assert "ConvNet, 2.0M" in said and "LSTM, 2.0M" in said and "| 4096 " in said
    (off,) = (line for line in said.splitlines() if "more than 15% off" in line)
    assert off.startswith("| 3 ") and "cores shared" in off
    assert cli.main(["bench", "--simulate", "4"]) == 1
    assert "--recorded FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "--simulate", "5000"])
