"""Numbers of steps, for all ranks together: by phase, in order, and by rank."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import smorms3_dist
from smorms3_dist.phases import Phase
from smorms3_dist.report.numbers import IMBALANCE, KEYS, PREFIX, SLOWEST, RankNumbers, summary

import models
import numpy as np
import pytest
from chainer.training import extensions
from rank_threads import ThreadCollectives, run_ranks
from reported import PAGE, trainer_of
from ticking import Ticking

PHASES = [f"smorms3/{phase.key}_s" for phase in Phase]


def of(rank: int = 0, **more: Any) -> RankNumbers:
    phases = tuple(float(rank + number) for number in range(len(Phase)))
    return RankNumbers(**{"steps": 2.0, "phases": phases, "sent": 10, "memory": {}, **more})


def test_the_page_has_every_key_and_what_stands_for_all_ranks() -> None:
    rows = re.findall(r"^\| `smorms3/(\w+)` \| `(\w+)[^|]*` \| (\w*) ?\|", PAGE.read_text(), re.M)
    assert {key: kind for key, _, kind in rows} == KEYS | {IMBALANCE: "", SLOWEST: ""}


def test_means_and_maxima_stand_for_all_ranks() -> None:
    first = of(memory={"rss_bytes": 5, "state_bytes": 7})
    second = of(1, sent=30, memory={"rss_bytes": 9, "state_bytes": 3})
    found = summary([first, second], by_rank=True)
    assert found["smorms3/reduce_s"] == (3 + 4) / 2 / 2
    assert found["smorms3/step_s"] == (28 + 36) / 2 / 2
    assert found["smorms3/sent_bytes"] == 10
    assert (found["smorms3/rss_bytes"], found["smorms3/state_bytes"]) == (9, 7)
    assert "smorms3/gpu_bytes" not in found
    # compute, hooks and update: 0 + 4 + 5, and 1 + 5 + 6.
    assert found["smorms3/imbalance"] == 12 / 10.5
    assert found["smorms3/slowest_rank"] == 1
    assert found["smorms3/rank1/reduce_s"] == 2 and found["smorms3/rank0/rss_bytes"] == 5
    assert found["smorms3/sent_gb_per_s"] == pytest.approx((10 / 14 + 30 / 17) / 2 / 1e9)


def test_without_a_step_there_is_memory_alone() -> None:
    assert summary([of(steps=0.0, memory={"rss_bytes": 1})]) == {"smorms3/rss_bytes": 1}


def test_all_ranks_observe_the_same_numbers_and_log_them(tmp_path: Path) -> None:
    sizes = sum(int(np.prod(shape)) for shape in models.SHAPES.values())

    def run(comm: ThreadCollectives) -> Any:
        trainer = trainer_of(comm, tmp_path)
        report = smorms3_dist.extensions.StepReport(every=(2, "iteration"), by_rank=True)
        trainer.extend(extensions.LogReport(trigger=(2, "iteration")))
        trainer.extend(report)
        trainer.run()
        sent = sum(trainer.updater.get_optimizer("main").collectives.bytes_sent.values())
        return json.loads((tmp_path / str(comm.rank) / "log").read_text()), sent

    (first, sent), (second, _) = run_ranks(2, run)
    mine = [{k: v for k, v in entry.items() if k.startswith(PREFIX)} for entry in first]
    assert mine == [{k: v for k, v in entry.items() if k.startswith(PREFIX)} for entry in second]
    assert len(mine) == 3
    for entry in mine:
        assert sum(entry[key] for key in PHASES) == pytest.approx(entry["smorms3/step_s"])
        assert entry["smorms3/imbalance"] >= 1
        assert entry["smorms3/slowest_rank"] in (0, 1)
        assert entry["smorms3/rss_bytes"] > 10_000_000
        assert {f"smorms3/rank{rank}/update_s" for rank in (0, 1)} < entry.keys()
        assert all(entry[f"smorms3/{key}_s"] > 0 for key in ("compute", "agree"))
    # The first update lays out, and makes no step.
    assert mine[0]["smorms3/layout_s"] > 0 and mine[1]["smorms3/layout_s"] == 0
    assert mine[1]["smorms3/reduce_s"] > 0 and mine[1]["smorms3/gather_s"] > 0
    assert mine[-1]["smorms3/state_bytes"] * 2 >= 3 * 4 * sizes
    everything = sum(entry["smorms3/rank0/sent_bytes"] * 2 for entry in mine)
    assert everything == sent > 0


def test_a_rank_without_the_report_is_named_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    def run(comm: ThreadCollectives) -> None:
        trainer = trainer_of(comm, tmp_path)
        if comm.rank != 1:
            trainer.extend(smorms3_dist.extensions.StepReport(every=(2, "iteration")))
        trainer.run()

    message = r"the ranks do different things: ranks 0 and 2 are in the StepReport of iteration 2"
    with pytest.raises(RuntimeError, match=message):
        run_ranks(3, run)


def test_a_trigger_by_time_is_rank_zeros(tmp_path: Path) -> None:
    def run(comm: ThreadCollectives) -> list[int]:
        trainer, found = trainer_of(comm, tmp_path), []

        class At(smorms3_dist.extensions.StepReport):
            def __call__(self, trainer: Any) -> None:
                super().__call__(trainer)
                found.append(trainer.updater.iteration)

        # Only rank 0's says yes.
        trainer.extend(At(every=lambda t: comm.rank == 0 and t.updater.iteration in (2, 5)))
        trainer.run()
        return found

    assert run_ranks(2, run) == [[2, 5]] * 2


def test_the_slowest_rank_is_named_by_its_own_time() -> None:
    def body(optimizer: Any, rank: int) -> dict[str, float]:
        optimizer.update()
        clock = Ticking()
        optimizer.phases.use_clock(clock)
        meter = smorms3_dist.StepMeter(optimizer)
        for step in range(3):
            models.set_gradients(optimizer.target, rank, step)
            # Others wait for rank 1, which computes for longer; that is not their own time.
            clock.now += 1000 if rank == 1 else 0
            with optimizer.phases.during(Phase.AGREE):
                clock.now += 0 if rank == 1 else 1000
            optimizer.update()
        return meter.read(by_rank=True)

    for found in models.on_ranks(3, body):
        assert found["smorms3/slowest_rank"] == 1
        assert found["smorms3/imbalance"] > 2.5
        assert found["smorms3/rank1/compute_s"] > 1000 > found["smorms3/rank1/agree_s"]
        assert found["smorms3/rank2/agree_s"] > 1000 > found["smorms3/rank2/compute_s"]
