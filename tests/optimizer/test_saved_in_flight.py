"""Files of trainings with double buffering have the gradient that is in flight."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import smorms3_dist

import converting
import models
import pytest
from chainer import optimizers, serializers
from late_trainings import CALLS, clip, train


def whole_snapshot(optimizer: Any, rank: int, path: Path) -> None:
    optimizer.consolidate()
    if rank == 0:
        serializers.save_npz(path, optimizer)
    optimizer.release_consolidated()


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
def test_a_resumed_training_is_the_same_from_each_kind_of_file(
    gradients: str, tmp_path: Path
) -> None:
    """With the gradient that was in flight."""
    at = 4

    def save(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS[:at])
        smorms3_dist.save_checkpoint(tmp_path / "steps", optimizer, step=at)
        whole_snapshot(optimizer, rank, tmp_path / "whole.npz")
        serializers.save_npz(tmp_path / f"shard{rank}.npz", optimizer)
        if rank == 0:
            serializers.save_npz(tmp_path / "model.npz", optimizer.target)

    def resume(kind: str) -> Any:
        def body(optimizer: Any, rank: int) -> None:
            if kind == "steps":
                smorms3_dist.load_checkpoint(tmp_path / "steps", optimizer)
            elif kind == "export":
                for of, target in (("model", optimizer.target), ("optimizer", optimizer)):
                    path = f"updater/{of}:main/"
                    serializers.load_npz(tmp_path / "export.npz", target, path=path)
            else:
                serializers.load_npz(tmp_path / "model.npz", optimizer.target)
                file = "whole.npz" if kind == "whole" else f"shard{rank}.npz"
                serializers.load_npz(tmp_path / file, optimizer)
                # What waits for the first update is saved as well.
                serializers.save_npz(tmp_path / f"again{rank}.npz", optimizer)
                optimizer.setup(optimizer.target)
                clip(optimizer)
                serializers.load_npz(tmp_path / f"again{rank}.npz", optimizer)
            assert optimizer.t == at - 2
            models.train(optimizer, rank, CALLS[at:])
            assert optimizer.t == len(CALLS) - 2

        return body

    for world_size in (1, 2):
        expected = train(world_size, configure=clip, gradients=gradients)
        train(world_size, configure=clip, gradients=gradients, body=save)
        converting.succeed("export", tmp_path / "steps", tmp_path / "export.npz")
        for kind in ("steps", "whole", "shard", "export"):
            resumed = train(world_size, configure=clip, gradients=gradients, body=resume(kind))
            for ours, theirs in zip(resumed, expected, strict=True):
                models.assert_same_bits(ours.target, theirs.target)
        shutil.rmtree(tmp_path / "steps")
        (tmp_path / "export.npz").unlink()


@pytest.mark.parametrize("kind", ["steps", "whole"])
def test_at_another_world_size_the_gradient_in_flight_is_dealt_out_anew(
    kind: str, tmp_path: Path
) -> None:
    def save(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS[:4])
        smorms3_dist.save_checkpoint(tmp_path / "steps", optimizer, step=4)
        whole_snapshot(optimizer, rank, tmp_path / "whole.npz")
        if rank == 0:
            serializers.save_npz(tmp_path / "model.npz", optimizer.target)

    def resume(optimizer: Any, rank: int) -> None:
        if kind == "steps":
            smorms3_dist.load_checkpoint(tmp_path / "steps", optimizer)
        else:
            serializers.load_npz(tmp_path / "model.npz", optimizer.target)
            serializers.load_npz(tmp_path / "whole.npz", optimizer)
        models.train(optimizer, rank, CALLS[4:5])
        assert optimizer.t == 3

    (expected, *_) = train(3, body=lambda o, rank: models.train(o, rank, CALLS[:5]))
    train(3, body=save)
    for world_size in (1, 2, 4):
        # What the step applies is of the three ranks that there were.
        for optimizer in train(world_size, body=resume):
            models.assert_same_bits(optimizer.target, expected.target)


def test_a_file_with_a_gradient_in_flight_loads_without_double_buffering_and_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def save(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, CALLS[:4])
        smorms3_dist.save_checkpoint(tmp_path, optimizer, step=4)
        whole_snapshot(optimizer, rank, tmp_path / "whole.npz")

    def without(optimizer: Any, rank: int) -> None:
        smorms3_dist.load_checkpoint(tmp_path, optimizer)
        assert (optimizer.t, optimizer.in_flight) == (2, None)
        serializers.load_npz(tmp_path / "whole.npz", optimizer)
        models.train(optimizer, rank, [4])
        assert optimizer.t == 3
        smorms3_dist.save_checkpoint(tmp_path, optimizer, step=5)
        whole_snapshot(optimizer, rank, tmp_path / "whole.npz")

    def back(optimizer: Any, rank: int) -> None:
        smorms3_dist.load_checkpoint(tmp_path, optimizer)
        assert not optimizer.in_flight.are_there
        models.train(optimizer, rank, [5])
        assert optimizer.t == 3
        assert optimizer.in_flight.are_there
        serializers.load_npz(tmp_path / "whole.npz", optimizer)
        assert not optimizer.in_flight.are_there

    train(2, body=save)
    models.on_ranks(2, without)
    assert caplog.text.count("a gradient in flight, which is dropped") == 2
    train(2, body=back)
    plain = optimizers.SMORMS3().setup(models.Model())
    serializers.load_npz(tmp_path / "whole.npz", plain)
    assert plain.t == 3


def test_a_rank_without_more_batches_ends_the_training_and_the_gradient_in_flight_is_saved(
    tmp_path: Path,
) -> None:
    def body(optimizer: Any, rank: int) -> None:
        try:
            models.train(optimizer, rank, CALLS[: 4 + rank])
            optimizer.no_more_batches()
        except smorms3_dist.NoMoreBatches:
            pass
        assert optimizer.t == 2
        smorms3_dist.save_checkpoint(tmp_path, optimizer, step=4)

    def resumed(optimizer: Any, rank: int) -> None:
        smorms3_dist.load_checkpoint(tmp_path, optimizer)
        models.train(optimizer, rank, CALLS[4:])

    train(2, body=body, uneven="stop")
    for ours, theirs in zip(train(2, body=resumed), train(2), strict=True):
        models.assert_same_bits(ours.target, theirs.target)
