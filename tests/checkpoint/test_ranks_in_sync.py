"""A model that differs between ranks is not saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smorms3_dist import ShardedCheckpoint, load_checkpoint, save_checkpoint

import models
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks
from resuming import make


def trained(comm: ThreadCollectives, steps: range = range(2)) -> Any:
    optimizer = make(comm)
    for step in steps:
        models.set_gradients(optimizer.target, comm.rank, step)
        optimizer.update()
    return optimizer


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_nothing_is_written_of_a_model_that_differs(
    world_size: int, asynchronous: bool, tmp_path: Path
) -> None:
    def run(comm: ThreadCollectives) -> str:
        optimizer = trained(comm)
        saver = save_checkpoint(tmp_path, optimizer, step=1, asynchronous=asynchronous)
        if comm.rank == world_size - 1:
            optimizer.target.e.array[-1, -1] = np.nan
        with pytest.raises(RuntimeError) as error:
            save_checkpoint(tmp_path, optimizer, step=2, asynchronous=asynchronous)
        saver.close()
        return str(error.value)

    (message,) = set(run_ranks(world_size, run))
    assert message.startswith("the ranks are not in sync (t = 1): parameter /e, float32")
    # The save before is whole.
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-0000000001"]
    assert not [path for path in tmp_path.iterdir() if "2" in path.name and path.is_dir()]


def test_it_is_saved_where_that_is_not_looked_at(tmp_path: Path) -> None:
    def run(comm: ThreadCollectives) -> float:
        optimizer = trained(comm)
        if comm.rank == 1:
            optimizer.target.b.array[...] = 7
        save_checkpoint(tmp_path, optimizer, step=1, check_sync=False)
        other = make(comm)
        load_checkpoint(tmp_path, other)
        return float(other.target.b.array[0])

    assert len(set(run_ranks(2, run))) == 1


def test_the_extension_says_the_same() -> None:
    assert ShardedCheckpoint("d")._check_sync
    assert not ShardedCheckpoint("d", check_sync=False)._check_sync


def test_what_was_loaded_goes_on_without_a_word(tmp_path: Path) -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm)
        save_checkpoint(tmp_path, optimizer)
        load_checkpoint(tmp_path, optimizer)
        models.set_gradients(optimizer.target, comm.rank, 5)
        optimizer.update()
        optimizer.check_sync()

    run_ranks(3, run)
