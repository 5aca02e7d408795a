"""The page of a rank, and trainings that are asked there to end: all ranks do at the same step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smorms3_dist import Preempted, ShardedCheckpoint, create_multi_node_optimizer, rank_page
from smorms3_dist.checkpoint.files import CheckpointDirectory
from smorms3_dist.rank_page import PREEMPTED, Page

import chainer
import models
import numpy as np
import pytest
from chainer.training import StandardUpdater, Trainer
from rank_threads import ThreadCollectives, run_ranks


@pytest.fixture(autouse=True)
def page() -> Iterator[Page]:
    """The page of this process, which its threads share."""
    found = rank_page.page
    yield found
    found.asked = found.preempted = found.handles = 0


def test_two_processes_see_the_same_page(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_bytes(bytes(rank_page.NBYTES))
    rank, agent = Page(str(path)), Page(str(path))
    rank.entered += 3
    rank.finished = 1 << 40
    agent.asked = 1
    assert (agent.entered, agent.finished, rank.asked) == (3, 1 << 40, 1)
    with pytest.raises(AttributeError):
        _ = rank.nonsense


def test_steps_are_counted_and_one_rank_that_is_asked_is_enough(page: Page) -> None:
    def run(comm: ThreadCollectives) -> list[bool]:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm)
        optimizer.setup(models.Model())
        found = []
        for step in range(5):
            models.set_gradients(optimizer.target, comm.rank, step)
            if step == 3 and comm.rank == comm.size - 1:
                page.asked = 1
            optimizer.update()
            found.append(optimizer.asked_to_end)
        return found

    before = page.entered, page.finished
    run_ranks(1, run)
    assert (page.entered - before[0], page.finished - before[1]) == (5, 5)
    page.asked = page.handles = 0
    ours, theirs = run_ranks(2, run)
    assert ours == theirs
    assert ours[:3] == [False] * 3 and ours[4]
    assert page.handles == 1


def make_trainer(comm: ThreadCollectives, directory: Path, every: Any) -> Trainer:
    model = models.Model()
    optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm).setup(model)
    iterator = chainer.iterators.SerialIterator(np.arange(8, dtype=np.int32), 2)

    def loss(indices: np.ndarray) -> chainer.Variable:
        return sum(chainer.functions.sum(param * param) for param in model.params())

    updater = StandardUpdater(iterator, optimizer, loss_func=loss)
    trainer = Trainer(updater, (9, "iteration"), out=str(directory))
    trainer.extend(ShardedCheckpoint(directory, every=every))
    return trainer


@pytest.mark.parametrize(
    ("every", "world_size"), [((100, "iteration"), 1), ((1, "epoch"), 2), ((4, "iteration"), 3)]
)
def test_a_trainer_saves_whatever_its_trigger_says_and_ends(
    tmp_path: Path, page: Page, every: Any, world_size: int
) -> None:
    def run(comm: ThreadCollectives) -> int:
        trainer = make_trainer(comm, tmp_path, every)

        def ask(trainer: Trainer) -> None:
            if trainer.updater.iteration == 3 and comm.rank == comm.size - 1:
                page.asked = 1

        trainer.extend(ask, trigger=(1, "iteration"))
        with pytest.raises(Preempted) as raised:
            trainer.run()
        assert raised.value.code == PREEMPTED
        return trainer.updater.iteration

    (ended,) = set(run_ranks(world_size, run))
    assert ended in (3, 4)
    assert CheckpointDirectory(tmp_path).steps() == [ended]
    assert page.preempted == 1
    page.asked = 0

    def go_on(comm: ThreadCollectives) -> None:
        trainer = make_trainer(comm, tmp_path, every)
        (extension,) = (e.extension for e in trainer._extensions.values())
        assert extension.maybe_load(trainer) == ended
        trainer.run()
        assert trainer.updater.iteration == 9

    run_ranks(world_size, go_on)


def test_the_directory_may_come_from_the_launcher(
    tmp_path: Path, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.handles = 0
    monkeypatch.delenv("SMORMS3_CHECKPOINT_DIR", raising=False)
    with pytest.raises(ValueError, match="smorms3-dist run --checkpoint-dir"):
        ShardedCheckpoint()
    monkeypatch.setenv("SMORMS3_CHECKPOINT_DIR", str(tmp_path))
    assert page.handles == 0
    assert ShardedCheckpoint()._directory == str(tmp_path)
    assert page.handles == 1, "nothing kills a training that is about to start"
