"""What an optimizer remembers of snapshots between two steps.

Chainer calls ``serialize`` on any rank, at any time, so nothing can be agreed on then. What has
been saved and loaded is remembered instead, and compared before the next step: a snapshot that only
some ranks have made, or loaded, does not go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist.chainer_internals.trainers import (
    is_in_multi_node_checkpointer,
    is_in_snapshot_extension,
)
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.optimizer import serialization
from smorms3_dist.optimizer.serialization import SavedInFlight, ShardStates, States
from smorms3_dist.sharding.gradients_in_flight import GradientsInFlight
from smorms3_dist.sharding.sharded_model import ShardedModel
from smorms3_dist.sharding.states import IN_FLIGHT
from smorms3_dist.step.agreement import REMEDY

import chainer


class SnapshotLog:
    """The snapshots of one optimizer.

    Attributes:
        loaded: Whether parameters and states have been loaded since the last step.
    """

    def __init__(self) -> None:
        self.loaded = False
        self._saved = False
        # The whole states, on the rank for which they were brought together; until the next change.
        self._whole: States | None = None
        self._consolidated = False
        # States of a shard that wait for a layout.
        self._pending: ShardStates | None = None
        # Gradients in flight that do.
        self._pending_in_flight: SavedInFlight | None = None

    def since_last_step(self, t: int) -> tuple[str, ...]:
        """What has been saved and loaded since the last step, in words."""
        words: tuple[str, ...] = ()
        if self.loaded:
            words += (f"has loaded a snapshot (t = {t})",)
        if self._saved:
            words += ("has saved its shard of the optimizer states",)
        return words

    def start_step(self) -> None:
        """Forgets what the ranks have compared, and what does not hold after the step."""
        self.loaded = self._saved = False
        self.release()

    def release(self) -> None:
        """Frees the whole states."""
        self._whole = None
        self._consolidated = False

    def write_pending_states(
        self, sharded: ShardedModel, in_flight: GradientsInFlight | None
    ) -> None:
        """Puts states that have waited for a layout into it, and gradients in flight."""
        if self._pending is not None:
            self._pending.write_into(sharded)
            self._pending = None
        if self._pending_in_flight is not None and in_flight is not None:
            self._pending_in_flight.write_into(sharded, in_flight)
        self._pending_in_flight = None

    def consolidate(
        self,
        sharded: ShardedModel | None,
        collectives: Collectives,
        root: int,
        in_flight: GradientsInFlight | None,
    ) -> None:
        """Brings the whole states together. Collective.

        Raises:
            RuntimeError: If states wait for a layout.
        """
        if self._pending is not None:
            raise RuntimeError(
                "the states that this optimizer has loaded are shards and wait for its first "
                "update; consolidate after that"
            )
        if sharded is None:
            self._whole = {} if collectives.rank == root else None
        else:
            self._whole = serialization.consolidate(sharded, collectives, root, in_flight)
        self._consolidated = True

    def read(
        self,
        optimizer: chainer.GradientMethod,
        serializer: Any,
        sharded: ShardedModel | None,
        collectives: Collectives,
        in_flight: GradientsInFlight | None,
        warn: Callable[[str], None],
    ) -> None:
        """Reads an optimizer; see `smorms3_dist.optimizer.serialization.read`."""
        shard = serialization.read(optimizer, serializer, sharded, collectives)
        self.release()
        self._pending = shard
        self._pending_in_flight = SavedInFlight.read(optimizer, serializer)
        if in_flight is not None:
            in_flight.drop()
            if self._pending_in_flight is not None:
                in_flight.are_there = True
                in_flight.loss_scale = self._pending_in_flight.loss_scale
        elif self._pending_in_flight is not None:
            warn(
                "the snapshot has a gradient in flight, which is dropped: this optimizer is made "
                "without double_buffering=True"
            )
        if sharded is not None:
            self.write_pending_states(sharded, in_flight)
        self.loaded = True

    def write(
        self,
        optimizer: chainer.GradientMethod,
        serializer: Any,
        sharded: ShardedModel | None,
        collectives: Collectives,
        in_flight: GradientsInFlight | None,
        warn: Callable[[str], None],
    ) -> None:
        """Writes an optimizer: whole if the states are at hand, else the shard of this rank.

        ``warn`` says something to the user, once.

        Raises:
            RuntimeError: If the states of the other ranks would be lost.
        """
        whole, shard = self._whole, None
        if sharded is not None and whole is None and collectives.size == 1:
            whole = serialization.consolidate(sharded, collectives, 0, in_flight)
        if whole is None and (sharded is not None or self._pending is not None):
            self._check_caller(collectives, warn)
            shard = self._pending
            if shard is None:
                assert sharded is not None
                shard = ShardStates.of(sharded)
            self._saved = not self._consolidated
        if self._pending_in_flight is not None:
            whole = {**(whole or {}), IN_FLIGHT: self._pending_in_flight.whole}
        serialization.write(optimizer, serializer, whole, shard, collectives, in_flight)

    def _check_caller(self, collectives: Collectives, warn: Callable[[str], None]) -> None:
        if is_in_snapshot_extension():
            raise RuntimeError(
                f"this snapshot would hold the optimizer states of rank {collectives.rank} alone, "
                f"1/{collectives.size} of them. {REMEDY}"
            )
        if not (self._consolidated or is_in_multi_node_checkpointer()):
            warn(
                "a snapshot holds this rank's shard of the optimizer states alone: every rank has "
                f"to save its own. {REMEDY}"
            )
