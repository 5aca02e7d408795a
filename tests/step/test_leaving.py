"""Whoever leaves is missed, and what ranks do not do together is named."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist import NoMoreBatches, create_multi_node_optimizer, save_checkpoint

import chainer
import chainer.links as L
import mpirun
import numpy as np
import process
import pytest
from rank_threads import ThreadCollectives, run_ranks

Rank = Callable[[ThreadCollectives], Any]


def optimizer_of(collectives: ThreadCollectives, **options: Any) -> Any:
    actual = chainer.optimizers.SMORMS3()
    return create_multi_node_optimizer(actual, collectives, **options).setup(L.Linear(3, 2))


def update(optimizer: Any, times: int = 1) -> None:
    for _ in range(times):
        for param in optimizer.target.params():
            param.grad = np.ones_like(param.array)
        optimizer.update()


def said_by_all(size: int, run: Rank) -> list[str]:
    """What each rank raises, or an empty text."""

    def catch(collectives: ThreadCollectives) -> str:
        try:
            run(collectives)
        except RuntimeError as error:
            return str(error)
        return ""

    return run_ranks(size, catch)


def test_a_rank_that_returns_is_missed_at_the_next_step() -> None:
    def run(collectives: ThreadCollectives) -> None:
        update(optimizer_of(collectives), 5 - (collectives.rank == 1))

    first, nothing, last = said_by_all(3, run)
    assert not nothing
    for text in (first, last):
        assert text.startswith(
            "rank 1 has ended its script after 4 updates, while ranks 0 and 2 are in update 5. "
            "Give all ranks equal numbers of batches"
        )


def test_all_who_have_left_are_named_and_a_rank_may_leave_before_its_first_update() -> None:
    def run(collectives: ThreadCollectives) -> None:
        update(optimizer_of(collectives), 3 if collectives.rank == 1 else 0)

    assert said_by_all(4, run)[1].startswith(
        "ranks 0, 2 and 3 have ended their scripts after 0 updates, while rank 1 is in update 1."
    )


def test_who_goes_on_alone_is_told_again() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = optimizer_of(collectives)
        update(optimizer, 2)
        if collectives.rank == 0:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="rank 1 has ended its script after 2 upd"):
                    update(optimizer)
            optimizer.consolidate()

    text, _ = said_by_all(2, run)
    assert "rank 1 has ended its script after 2 updates, while rank 0 is in consolidate" in text


def test_a_save_without_those_who_have_left_is_an_error(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = optimizer_of(collectives)
        update(optimizer, 2)
        if collectives.rank == 0:
            save_checkpoint(tmp_path, optimizer, step=7)

    text, _ = said_by_all(2, run)
    assert "rank 1 has ended its script after 2 updates, while rank 0 is in the save of st" in text


def test_ranks_that_do_something_of_their_own_end_later_and_nothing_is_said() -> None:
    others = threading.Event()

    def run(collectives: ThreadCollectives) -> None:
        optimizer = optimizer_of(collectives)
        update(optimizer, 2)
        if collectives.rank == 0:
            # Rank 1 waits for it in the exchange of those who end.
            assert others.wait(30)
        else:
            others.set()

    assert run_ranks(2, run) == [None, None]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        (
            "gather_gradients",
            lambda optimizer, path: optimizer.gather_gradients(),
            lambda optimizer, path: update(optimizer),
        ),
        (
            "consolidate",
            lambda optimizer, path: optimizer.consolidate(root=0),
            lambda optimizer, path: optimizer.consolidate(root=1),
        ),
        (
            "asynchronous save",
            lambda optimizer, path: save_checkpoint(path, optimizer, step=1, asynchronous=True),
            lambda optimizer, path: save_checkpoint(path, optimizer, step=1),
        ),
        (
            "the save of step 1",
            lambda optimizer, path: save_checkpoint(path, optimizer, step=1),
            lambda optimizer, path: save_checkpoint(path, optimizer, step=2),
        ),
    ],
)
def test_what_is_not_done_together_is_named(
    name: str, first: Callable[..., Any], second: Callable[..., Any], tmp_path: Path
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = optimizer_of(collectives)
        optimizer.keep_gradients = True
        update(optimizer, 2)
        (second if collectives.rank else first)(optimizer, tmp_path)

    texts = said_by_all(2, run)
    assert texts[0] == texts[1]
    assert re.match(rf"the ranks do different things: rank 0 is in .*{name}.*, rank 1 ", texts[0])


def test_training_ends_on_all_ranks_when_one_has_no_more_batches() -> None:
    def run(collectives: ThreadCollectives) -> tuple[int, str]:
        optimizer = optimizer_of(collectives, uneven="stop")
        said = ""
        try:
            update(optimizer, 4 + collectives.rank)
            optimizer.no_more_batches()
        except NoMoreBatches as end:
            said = str(end)
        # They are all still there.
        optimizer.consolidate()
        return optimizer.t, said

    (t0, said0), (t1, said1), (t2, said2) = run_ranks(3, run)
    assert t0 == t1 == t2 == 3
    assert not said0
    assert (
        said1
        == said2
        == (
            "rank 0 has no more batches after 4 updates, while ranks 1 and 2 are in update 5: "
            "training ends"
        )
    )


def test_ranks_that_have_no_more_batches_at_once_end_at_once() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = optimizer_of(collectives, uneven="stop")
        update(optimizer, 2)
        optimizer.no_more_batches()
        optimizer.consolidate()

    run_ranks(2, run)


def test_each_epoch_may_end_where_the_first_rank_has_no_more_batches() -> None:
    def run(collectives: ThreadCollectives) -> tuple[int, int]:
        optimizer = optimizer_of(collectives, uneven="stop")
        for epoch in range(3):
            try:
                update(optimizer, 2 + (epoch + collectives.rank) % 2)
                optimizer.no_more_batches()
            except NoMoreBatches:
                pass
        return optimizer.t, collectives.wait.updates

    assert run_ranks(2, run) == [(5, 6)] * 2


def test_a_script_that_ends_ends_the_training_of_the_others_too() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = optimizer_of(collectives, uneven="stop")
        update(optimizer, 2)
        if collectives.rank == 0:
            with pytest.raises(NoMoreBatches, match="rank 1 has ended its script after 2 updates"):
                update(optimizer)

    run_ranks(2, run)


def test_uneven_is_error_or_stop() -> None:
    with pytest.raises(ValueError, match="uneven must be one of error, stop, not 'join'"):
        run_ranks(1, lambda collectives: optimizer_of(collectives, uneven="join"))


@functools.cache
def left() -> list[dict[str, Any]]:
    return mpirun.run_program(3, "leaving.py", limit=120)


@pytest.mark.mpi
def test_mpi_ranks_name_whoever_has_left() -> None:
    for values in (left()[0], left()[2]):
        assert values["missed"].startswith(
            "rank 1 has ended its script after 4 updates, while ranks 0 and 2 are in update 5. Give"
        )
        assert "rank 1 has ended its script" in values["again"]


@pytest.mark.mpi
def test_an_mpi_rank_that_leaves_before_its_first_update_is_missed() -> None:
    first, nothing, last = mpirun.run_program(3, "leaving_early.py", "leaves", limit=60)
    assert nothing["said"] == ["", ""]
    for values in (first, last):
        for said in values["said"]:
            assert said.startswith("rank 1 has ended its script")
        assert values["said"][0].startswith(
            "rank 1 has ended its script after 0 updates, while ranks 0 and 2 are in update 1. Give"
        )


@pytest.mark.mpi
@pytest.mark.parametrize("how", ["freed", "alone", "parts"])
def test_mpi_ranks_without_an_update_end_with_whatever_others_have_made(how: str) -> None:
    for values in mpirun.run_program(3, "leaving_early.py", how, limit=60):
        assert not any(values["said"])


@pytest.mark.mpi
def test_mpi_ranks_name_what_is_not_done_together_and_stop_together() -> None:
    for values in left():
        assert values["different"].startswith(
            "the ranks do different things: rank 0 is in gather_gradients(), ranks 1 and 2 are in "
        )
        assert values["t"] == 2


@pytest.mark.mpi
@pytest.mark.parametrize("runner", [(), ("-m", "smorms3_dist")])
def test_who_has_ended_waits_quietly_for_others_that_do_something_of_their_own(
    runner: tuple[str, ...], tmp_path: Path
) -> None:
    status, output = process.run(
        *mpirun.command(2, *runner, mpirun.PROGRAMS / "ending.py", "late", tmp_path / "end"),
        env=mpirun.environment(),
        limit=60,
    )
    assert status == 0
    assert sorted(output.split()) == ["0", "1"]


@pytest.mark.mpi
def test_a_rank_that_waits_says_so_without_a_launcher(tmp_path: Path) -> None:
    end = tmp_path / "end"
    running = process.start(
        *mpirun.command(2, mpirun.PROGRAMS / "ending.py", "waits", end),
        env=mpirun.environment(SMORMS3_STALL_WARNING="1"),
    )
    # Ends with the process, which a timer ends if nothing is said.
    timer = threading.Timer(60, running.kill)
    timer.start()
    assert running.stdout is not None
    said = next((line for line in running.stdout if "in update 3, " in line), "")
    timer.cancel()
    end.touch()
    status, _ = process.finish(running)
    assert status == 0
    assert said.startswith("smorms3_dist: rank 1 has waited for ")


@pytest.mark.mpi
@pytest.mark.parametrize("runner", ["smorms3_dist", "mpi4py"])
def test_a_rank_that_fails_does_not_wait_for_others_that_wait_elsewhere(
    runner: str, tmp_path: Path
) -> None:
    status, output = process.run(
        *mpirun.command(2, "-m", runner, mpirun.PROGRAMS / "ending.py", "fails", tmp_path / "end"),
        env=mpirun.environment(),
        limit=60,
    )
    assert status == 3
    assert "has ended" not in output
