"""Where iterators are in their datasets, and how they get there on another number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

from smorms3_dist.chainer_internals.trainers import iterators_of, own_random_state_of

import numpy as np
from chainer.serializers import NpzDeserializer
from chainer.training import Trainer

OF_TRAINER = "trainer/updater/iterator:"
"""What stands before the names of a trainer's iterators in the state of a rank."""


def iterators_in(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The iterators among objects, and of trainers among them, by where their state is."""
    found: dict[str, Any] = {}
    for name, item in objects.items():
        if isinstance(item, Trainer):
            prefix = f"{name}/updater/iterator:"
            found |= {prefix + key: each for key, each in iterators_of(item.updater).items()}
        elif hasattr(item, "epoch_detail") and hasattr(item, "serialize"):
            found[name] = item
    return found


def positions_of(objects: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """What a manifest notes of the iterators among objects: how many passes each has made."""
    notes: dict[str, dict[str, float | None]] = {"iterators": {}, "positions": {}}
    for name, iterator in iterators_in(objects).items():
        detail = getattr(iterator, "epoch_detail", None)
        position = float(detail) if isinstance(detail, (int, float)) else None
        if name.startswith(OF_TRAINER):
            notes["iterators"][name.removeprefix(OF_TRAINER)] = position
        else:
            notes["positions"][name] = position
    return notes


def move(objects: Mapping[str, Any], notes: Mapping[str, Any]) -> list[str]:
    """Moves the iterators among objects to the positions that a manifest notes.

    Returns:
        The names of those that cannot be moved.
    """
    stuck = []
    for name, iterator in iterators_in(objects).items():
        of_trainer = name.startswith(OF_TRAINER)
        short = name.removeprefix(OF_TRAINER)
        position = notes.get("iterators" if of_trainer else "positions", {}).get(short)
        if not isinstance(position, (int, float)) or not _move_to(iterator, float(position)):
            stuck.append(short)
    return stuck


def _move_to(iterator: Any, epoch_detail: float) -> bool:
    """Moves an iterator to where another one was whose dataset was divided otherwise.

    The order of what is left of the pass is drawn anew.

    Args:
        iterator: An iterator that serializes itself as Chainer's do, or ChainerMN's around one.
        epoch_detail: How many passes the other had made.

    Returns:
        Whether that was possible.
    """
    # ChainerMN's multi-node iterator: one rank has the actual one, and the others its numbers.
    iterator = getattr(iterator, "actual_iterator", iterator)
    epoch = int(epoch_detail)
    if hasattr(iterator, "dataset_size"):
        iterator.epoch, iterator.is_new_epoch = epoch, False
        size = iterator.dataset_size
        iterator.current_position = min(round((epoch_detail - epoch) * size), size - 1)
        return True
    if not (hasattr(iterator, "reset") and hasattr(iterator, "dataset")):
        return False
    iterator.reset()
    size = len(iterator.dataset)
    batch = getattr(iterator, "batch_size", 1)
    values = {
        "current_position": np.array(min(round((epoch_detail - epoch) * size), size - 1)),
        "epoch": np.array(epoch),
        "is_new_epoch": np.array(False),
        "previous_epoch_detail": np.array(max(epoch_detail - batch / size, 0.0)),
    }
    order = ("order", "_order")
    reader = NpzDeserializer(values, "", True, lambda key: key in order)
    try:
        iterator.serialize(reader)
    except KeyError:
        return False
    return True


def check(objects: Mapping[str, Any]) -> None:
    """Raises `ValueError` if an iterator is past the end of its dataset."""
    for name, iterator in iterators_in(objects).items():
        dataset = getattr(iterator, "dataset", None)
        position = getattr(iterator, "current_position", 0)
        if isinstance(dataset, Sized) and position > len(dataset):
            raise ValueError(
                f"{name} does not fit: it was at item {position}, and its dataset has "
                f"{len(dataset)} now"
            )


class OwnRandomStates:
    """The random numbers that iterators draw their orders from, where these are of their own.

    Chainer does not save them. What a file lacks is left as it is.

    Args:
        objects: The objects among which the iterators are.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = objects

    def _states(self) -> Iterator[tuple[str, np.random.RandomState]]:
        for name, iterator in iterators_in(self._objects).items():
            random = own_random_state_of(iterator)
            if random is not None:
                yield name, random

    def serialize(self, serializer: Any) -> None:
        """Writes or reads them."""
        for name, random in self._states():
            state: Any = random.get_state(legacy=True)
            if not isinstance(state, tuple):
                # Of a generator other than Chainer's and ChainerMN's.
                continue
            child = serializer[name]
            try:
                keys = child("keys", np.array(state[1], np.uint32))
                rest = child("rest", np.array(state[2:], np.float64))
            except KeyError:
                continue
            position, has_gauss, cached = rest.tolist()
            random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
