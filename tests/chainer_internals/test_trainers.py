"""What is believed of trainers and their extensions is so in Chainer."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import smorms3_dist  # noqa: F401  (patches Chainer)
from smorms3_dist.chainer_internals.trainers import (
    is_in_multi_node_checkpointer,
    is_in_snapshot_extension,
    snapshot_of_replica_sets,
)

import chainer
import chainermn
import models
from chainer.optimizers import SMORMS3
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater


def test_the_snapshot_in_one_of_replica_sets_is_known() -> None:
    comm = types.SimpleNamespace(rank=0, size=1)
    inner = extensions.snapshot()
    outer = chainermn.extensions.multi_node_snapshot(comm, inner, [])
    assert snapshot_of_replica_sets(outer) is inner
    assert snapshot_of_replica_sets(inner) is None


def test_whoever_is_in_a_snapshot_knows_it(tmp_path: Path) -> None:
    seen = []

    class Asks(chainer.Link):
        def serialize(self, serializer: Any) -> None:
            seen.append(is_in_snapshot_extension())
            seen.append(is_in_multi_node_checkpointer())

    optimizer = SMORMS3().setup(models.Model({"a": (3,)}))
    trainer = Trainer(
        StandardUpdater(chainer.iterators.SerialIterator([1], 1), optimizer), out=str(tmp_path)
    )
    extensions.snapshot_object(Asks(), "asks")(trainer)
    chainer.serializers.save_npz(str(tmp_path / "by hand"), Asks())
    assert seen == [True, False, False, False]
