"""What Chainer's extensions do not save of themselves, though a resumed training needs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smorms3_dist.chainer_internals.trainers import (
    entries_of,
    serialize_early_stopping,
    shift_of,
    unsaved_parts,
)
from smorms3_dist.checkpoint.iterators import OwnRandomStates

from chainer.training import Trainer
from chainer.training.triggers import EarlyStoppingTrigger


def with_unsaved(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Objects by name, and with them what they do not save of themselves."""
    trainers = {
        f"unsaved/{name}": UnsavedParts(item)
        for name, item in objects.items()
        if isinstance(item, Trainer)
    }
    return {**objects, **trainers, "unsaved/random": OwnRandomStates(objects)}


class UnsavedParts:
    """Inner triggers and unfinished means of a trainer's extensions, and its early stopping.

    What a file lacks is left as it is.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def serialize(self, serializer: Any) -> None:
        """Writes or reads them."""
        for entry in entries_of(self._trainer):
            for name, part in unsaved_parts(entry.extension):
                self._serialize(serializer[entry.extension.name], name, part.serialize)
        stop = self._trainer.stop_trigger
        if isinstance(stop, EarlyStoppingTrigger):
            self._serialize(serializer, "stop", lambda child: serialize_early_stopping(stop, child))

    def _serialize(self, serializer: Any, name: str, serialize: Any) -> None:
        try:
            # Files of versions before, and of trainers without this extension, have none.
            serializer[name]("saved", True)
        except KeyError:
            return
        serialize(serializer[name])


def resume_shifts(trainer: Trainer, hyperparameters: dict[str, dict[str, Any]]) -> None:
    """Sets what extensions have shifted as it was, after they have initialized it anew.

    Args:
        trainer: The trainer.
        hyperparameters: What was saved of each optimizer, by its name.
    """
    optimizers = trainer.updater.get_all_optimizers()
    for entry in entries_of(trainer):
        shift = shift_of(entry.extension)
        if shift is None:
            continue
        attribute, given = shift
        for name, optimizer in optimizers.items():
            mine = (
                name == "main"
                if given is None
                else given in (optimizer, getattr(optimizer, "actual_optimizer", None))
            )
            value = hyperparameters.get(name, {}).get(attribute)
            if mine and isinstance(value, (int, float)):
                setattr(optimizer, attribute, value)
