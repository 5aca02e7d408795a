"""What the picture shows: each panel has the numbers, and what is missing is said."""

from __future__ import annotations

import itertools
import math
from typing import Any

from smorms3_dist.plot.drawing import Picture, draw
from smorms3_dist.plot.records import Events, Log, Prediction, Records

import numpy as np
import pytest

ITERATIONS = [10, 20, 30]


def rows(ranks: int = 2, by_rank: bool = True, gpu: bool = False) -> list[dict[str, Any]]:
    found = []
    for number, iteration in enumerate(ITERATIONS, 1):
        row: dict[str, Any] = {
            "iteration": iteration,
            "epoch": number,
            "main/loss": 2.0 / number,
            "validation/main/loss": 2.5 / number,
            "main/accuracy": 1 - 0.5 / number,
            "smorms3/compute_s": 0.002 * number,
            "smorms3/reduce_s": 0.001,
            "smorms3/hooks_s": 0.0,
            "smorms3/step_s": 0.002 * number + 0.001,
            "smorms3/imbalance": 1.0 + 0.1 * number,
            "smorms3/slowest_rank": min(number - 1, ranks - 1),
            "smorms3/state_bytes": 3 << 20,
            "smorms3/rss_bytes": 200 << 20,
        }
        if gpu:
            row["smorms3/gpu_bytes"] = 5 << 30
        for rank in range(ranks if by_rank else 0):
            row[f"smorms3/rank{rank}/state_bytes"] = (3 << 20) - (rank << 10)
            row[f"smorms3/rank{rank}/rss_bytes"] = (200 - rank) << 20
        found.append(row)
    return found


PLAN = {"states": 3 << 20, "masters": 1 << 20, "parameters": 1 << 20, "total": 9 << 20}
EVENTS = [
    {"time": 100.0 + after, "event": event}
    for event, after in [
        *(("start", 0), ("first step", 10), ("checkpoint", 60), ("stall", 100), ("failure", 200)),
        *(("restart", 210), ("first step", 220), ("unknown", 230), ("end", 400)),
    ]
]


def axes_of(picture: Picture) -> dict[str, Any]:
    picture.figure.canvas.draw()
    found = {ax.get_title(): ax for ax in picture.figure.axes}
    assert list(found) == picture.panels
    return found


def lines_of(ax: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of each line that has a label."""
    return {
        line.get_label(): list(zip(*map(np.ravel, line.get_data()), strict=True))
        for line in ax.lines
        if not line.get_label().startswith("_")
    }


def test_every_panel_has_the_numbers() -> None:
    records = Records(
        [Log("run", rows())], [Events("run", EVENTS)], [Prediction("run", PLAN, True)]
    )
    picture = draw(records)
    assert picture.missing == []
    axes = axes_of(picture)
    loss = lines_of(axes["loss"])
    assert loss["main/loss"] == [(10, 2.0), (20, 1.0), (30, 2 / 3)]
    assert loss.keys() == {"main/loss", "validation/main/loss"}
    assert lines_of(axes["accuracy"])["main/accuracy"][1] == (20, 0.75)

    stacked = axes["time of a step, by phase"]
    assert stacked.get_ylabel() == "ms"
    compute, reduce = (patch.get_data() for patch in stacked.patches)
    np.testing.assert_allclose(compute.values, [2, 4, 6])
    np.testing.assert_allclose(reduce.values, [3, 5, 7])
    np.testing.assert_allclose(reduce.baseline, [2, 4, 6])
    assert list(reduce.edges) == [0, 10, 20, 30]
    assert [text.get_text() for text in stacked.get_legend().get_texts()] == ["reduce", "compute"]

    imbalance = axes["imbalance of the ranks"]
    (points,) = lines_of(imbalance).values()
    np.testing.assert_allclose(points, [(10, 1.1), (20, 1.2), (30, 1.3)])
    assert "slowest: rank 1 in 2 of 3" in lines_of(imbalance)

    states = axes["optimizer states of a rank"]
    assert states.get_ylabel() == "MiB"
    np.testing.assert_allclose([bar.get_height() for bar in states.patches], [3, 3 - 2**-10])
    assert lines_of(states)["plan"][0][1] == 4
    process = axes["process memory of a rank, with Python"]
    np.testing.assert_allclose([bar.get_height() for bar in process.patches], [200, 199])
    assert lines_of(process)["plan"][0][1] == 9

    life = axes["life of the job"]
    assert life.get_xlabel() == "minutes since the start"
    spans = [(bar.get_x(), bar.get_width()) for bar in life.patches]
    np.testing.assert_allclose(spans, [(0, 200 / 60), (3.5, 190 / 60)])
    marks = lines_of(life)
    assert marks.keys() == {"first step", "checkpoint", "stall", "failure", "restart", "end"}
    np.testing.assert_allclose(marks["failure"], [(200 / 60, 0)])
    np.testing.assert_allclose(marks["end"], [(400 / 60, 1)])
    # A failure that ends the job is one mark.
    ended = [*EVENTS[:5], {"time": 300.1, "event": "end", "status": 1}]
    axes = axes_of(draw(Records(events=[Events("run", ended)])))
    assert "failure" in lines_of(axes["life of the job"])
    assert "end" not in lines_of(axes["life of the job"])


def test_what_is_missing_is_said_with_what_it_takes() -> None:
    picture = draw(Records())
    assert picture.panels == []
    assert [words.partition(":")[0] for words in picture.missing] == [
        *("loss", "accuracy", "imbalance", "memory", "the life of the job")
    ]
    plain = [{"iteration": 1, "main/loss": 2.0}, {"iteration": 2, "main/loss": math.nan}]
    picture = draw(Records([Log("run", plain)]))
    assert picture.panels == ["loss"]
    missing = dict(words.partition(": ")[::2] for words in picture.missing)
    assert missing["accuracy"].startswith("no log has a key that ends in accuracy")
    assert "main/loss is not finite in 1 of the reports of run" in missing
    assert missing["time of a step"].endswith("with smorms3_dist.extensions.StepReport")
    assert "smorms3-dist run --events" in missing["the life of the job"]
    picture = draw(Records([Log("run", rows())]))
    assert any("there is no plan" in words for words in picture.missing)


def test_several_runs_are_told_apart() -> None:
    logs = [Log("a", rows(2)), Log("b", rows(4))]
    records = Records(logs, [Events("a", EVENTS), Events("b", EVENTS[:2])])
    axes = axes_of(draw(records))
    assert list(axes) == [
        *("loss", "accuracy", "time of a step, by phase: a", "time of a step, by phase: b"),
        *("imbalance of the ranks", "optimizer states of a rank"),
        *("process memory of a rank, with Python", "life of the job: a", "life of the job: b"),
    ]
    names = {f"{log}: {key}" for log in "ab" for key in ("main/loss", "validation/main/loss")}
    assert lines_of(axes["loss"]).keys() == names
    bars = axes["optimizer states of a rank"].patches
    assert len(bars) == 2 + 4
    # They do not lie on each other.
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(edges))


def test_memory_of_gpus_is_beside_the_plan_of_gpus() -> None:
    plans = [
        Prediction("gpu", {"states": 1, "total": 4 << 30}, False),
        Prediction("cpu", PLAN, True),
    ]
    axes = axes_of(draw(Records([Log("run", rows(2, by_rank=False, gpu=True))], plans=plans)))
    gpu = axes["GPU memory of a rank"]
    assert gpu.get_ylabel() == "GiB" and gpu.get_xlabel() == "largest of all ranks"
    assert [bar.get_height() for bar in gpu.patches] == [5]
    assert lines_of(gpu)["plan"][0][1] == 4
    assert "plan" not in lines_of(axes["process memory of a rank, with Python"])
    states = lines_of(axes["optimizer states of a rank"])
    assert states["plan: cpu"][0][1] == 4 and states["plan: gpu"][0][1] == pytest.approx(2**-20)


def test_steps_that_take_much_longer_are_cut_off_and_written() -> None:
    slow = {**rows()[0], "smorms3/compute_s": 0.5, "smorms3/step_s": 0.501}
    axes = axes_of(draw(Records([Log("run", [slow, *rows()[1:], {**rows()[2], "iteration": 40}])])))
    stacked = axes["time of a step, by phase"]
    assert stacked.get_ylim()[1] == pytest.approx(1.15 * 7)
    assert [(text.get_text().strip(), text.get_position()[0]) for text in stacked.texts] == [
        ("501", 5)
    ]


@pytest.mark.parametrize("count", [1, 2, 300])
def test_few_reports_and_many_are_drawn(count: int) -> None:
    many = [{**rows()[0], "iteration": 7 * n, "main/loss": 10.0**-n} for n in range(1, count + 1)]
    axes = axes_of(draw(Records([Log("run", many)], [Events("run", EVENTS[:1])])))
    data = axes["time of a step, by phase"].patches[0].get_data()
    assert len(data.values) == count and list(data.edges[:2]) == [0, 7]
    assert axes["loss"].get_yscale() == ("log" if count > 1 else "linear")
