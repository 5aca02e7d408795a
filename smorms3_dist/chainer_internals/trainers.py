"""What trainers, updaters, extensions, triggers, iterators and serializers keep."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import chainer
import numpy as np
from chainer.training import extensions
from chainer.training import trainer as trainer_module
from chainer.training.extensions import _snapshot
from chainer.training.triggers import BestValueTrigger, EarlyStoppingTrigger
from chainermn.extensions._multi_node_snapshot import _MultiNodeSnapshot
from chainermn.extensions.checkpoint import _MultiNodeCheckpointer


def is_missing(serializer: Any) -> bool:
    """Whether this is the deserializer of a group that an HDF5 file does not have.

    It can be asked for nothing: not for values, as those of other formats can, nor for groups.
    """
    return getattr(serializer, "group", serializer) is None


def iterators_of(updater: Any) -> Mapping[str, Any]:
    """The iterators of an updater by name; none if it keeps them in a way of its own."""
    return getattr(updater, "_iterators", {})


def entries_of(trainer: chainer.training.Trainer) -> Iterator[Any]:
    """A trainer's entries of its extensions, with ``extension`` and ``trigger``."""
    return iter(trainer._extensions.values())


def put_before(trainer: chainer.training.Trainer, followers: Collection[str]) -> None:
    """Puts the extension that a trainer was extended with last before some others of its priority.

    Args:
        trainer: The trainer.
        followers: The names of these others, some of which the trainer need not have.
    """
    *others, _last = trainer._extensions
    for name in itertools.dropwhile(lambda name: name not in followers, others):
        trainer._extensions.move_to_end(name)


def own_random_state_of(iterator: Any) -> np.random.RandomState | None:
    """What an iterator draws its orders from, unless that is NumPy's global random numbers."""
    random = getattr(getattr(iterator, "order_sampler", None), "_random", None)
    # NumPy's global numbers, and none in old versions of Chainer.
    if random is getattr(np.random.random, "__self__", None):
        return None
    return random if isinstance(random, np.random.RandomState) else None


def unsaved_parts(extension: Any) -> Iterator[tuple[str, Any]]:
    """Parts of an extension of Chainer's that have a state which it does not save."""
    if isinstance(extension, _UNSAVED):
        for name in ("_trigger", "_summary"):
            part = getattr(extension, name, None)
            if hasattr(part, "serialize"):
                yield name, part


def reads_gradients(extension: Any) -> bool:
    """Whether this is Chainer's extension that reads gradients, and it does."""
    return isinstance(extension, extensions.ParameterStatistics) and "grad" in extension._attrs


_UNSAVED = (extensions.PlotReport, extensions.ParameterStatistics)


def shift_of(extension: Any) -> tuple[str, Any] | None:
    """The attribute and the optimizer of an extension that starts anew from the initial value."""
    if isinstance(extension, (extensions.MultistepShift, extensions.WarmupShift)):
        return extension._attr, extension._optimizer
    return None


@contextlib.contextmanager
def as_if_started(objects: Iterable[Any]) -> Iterator[None]:
    """Lets trainers among objects be saved that do not run yet."""
    waiting = [
        each
        for each in objects
        if isinstance(each, chainer.training.Trainer) and each._start_at is None
    ]
    for trainer in waiting:
        trainer._start_at = trainer_module._get_time()
    try:
        yield
    finally:
        for trainer in waiting:
            trainer._start_at = None


def call_before_training(hook: Callable[[chainer.training.Trainer], None]) -> None:
    """Lets a hook be called with each trainer before it initializes its extensions."""
    trainer_class: Any = chainer.training.Trainer
    run = trainer_class.run

    @functools.wraps(run)
    def run_after_hook(self: Any, *args: Any, **kwds: Any) -> Any:
        hook(self)
        return run(self, *args, **kwds)

    trainer_class.run = run_after_hook


def check_trigger_of(trigger: Any) -> Any | None:
    """By which trigger one on a value looks at the value; ``None`` if it is no such trigger."""
    return trigger._interval_trigger if isinstance(trigger, BestValueTrigger) else None


class EarlyStoppingState(NamedTuple):
    """Parts of a trigger that stops early.

    Attributes:
        look: By which trigger it looks at the value.
        limit: The trigger that ends the training in any case.
    """

    look: Any
    limit: Any

    @classmethod
    def of(cls, trigger: EarlyStoppingTrigger) -> EarlyStoppingState:
        """Those of a trigger."""
        return cls(trigger._interval_trigger, trigger._max_trigger)


def serialize_early_stopping(trigger: EarlyStoppingTrigger, serializer: Any) -> None:
    """Writes or reads how far a trigger that stops early has come, which Chainer does not."""
    trigger.count = int(serializer("count", trigger.count))
    trigger.best = float(serializer("best", trigger.best))
    trigger._summary.serialize(serializer["summary"])
    for name in ("_interval_trigger", "_max_trigger"):
        part = getattr(trigger, name)
        if hasattr(part, "serialize"):
            part.serialize(serializer[name.strip("_")])


def is_snapshot(extension: Any) -> bool:
    """Whether this is Chainer's snapshot extension, which saves one rank alone."""
    return isinstance(extension, _snapshot._Snapshot)


def snapshot_of_replica_sets(extension: Any) -> Any | None:
    """Chainer's snapshot extension in ChainerMN's that saves one rank of each of its sets."""
    return extension.snapshot if isinstance(extension, _MultiNodeSnapshot) else None


def saves_on_error(extension: Any) -> bool:
    """Whether a snapshot extension of Chainer's saves when the training fails."""
    return bool(extension._snapshot_on_error)


def newest_snapshot(filename: Any, directory: str) -> str | None:
    """The newest snapshot in a directory, by the name that the snapshot extension gives them."""
    return _snapshot._find_latest_snapshot(filename, directory)


def target_of(extension: Any) -> Any | None:
    """What a snapshot extension of Chainer's saves; ``None`` for the trainer."""
    return extension._target


def is_in_snapshot_extension() -> bool:
    """Whether Chainer's snapshot extension, which saves one rank alone, is at work now."""
    return _is_being_called(_snapshot._Snapshot._make_snapshot)


def is_in_multi_node_checkpointer() -> bool:
    """Whether ChainerMN's multi-node checkpointer, which saves every rank, is at work now."""
    return _is_being_called(_MultiNodeCheckpointer.save)


def _is_being_called(method: Any) -> bool:
    """Whether a method is being executed further up in this thread."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is method.__code__:
            return True
        frame = frame.f_back
    return False
