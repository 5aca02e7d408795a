"""`TensorBoardReport`, which writes a trainer's observation for TensorBoard."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from chainer.reporter import DictSummary
from chainer.training import PRIORITY_READER, Extension, Trainer, get_trigger


class TensorBoardReport(Extension):
    """Writes scalars of the observation for TensorBoard: an extension of Chainer's Trainer.

    It is for rank 0 alone, and looks at every iteration: as LogReport it writes the means of what
    was observed since it wrote last, at the number of the iteration. It needs the package
    tensorboardX (the extra ``tensorboard``).

    Args:
        directory: Where the files go; by default ``tensorboard`` in the trainer's output directory.
        every: When they are written, as `chainer.training.Trainer.extend` takes it.
        keys: The keys to write; all if ``None``.

    Raises:
        ImportError: If tensorboardX is missing.
    """

    priority = PRIORITY_READER
    trigger = (1, "iteration")

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        every: Any = (1, "epoch"),
        keys: tuple[str, ...] | list[str] | None = None,
    ) -> None:
        self._writer_class = _writer_class()
        self._directory = directory
        self._every = get_trigger(every)
        self._keys = keys
        self._summary = DictSummary()
        self._writer: Any = None

    def initialize(self, trainer: Trainer) -> None:
        """Opens the file."""
        directory = os.path.join(trainer.out, "tensorboard")
        if self._directory is not None:
            directory = os.fspath(self._directory)
        self._writer = self._writer_class(directory)

    def __call__(self, trainer: Trainer) -> None:
        """Takes in what is observed, and writes it if it is time."""
        seen = trainer.observation
        keys = seen if self._keys is None else [key for key in self._keys if key in seen]
        self._summary.add({key: seen[key] for key in keys})
        if not self._every(trainer):
            return
        for key, value in self._summary.compute_mean().items():
            self._writer.add_scalar(key, float(value), trainer.updater.iteration)
        self._writer.flush()
        self._summary = DictSummary()

    def finalize(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _writer_class() -> Any:
    with contextlib.suppress(ImportError):
        from tensorboardX import SummaryWriter

        return SummaryWriter
    raise ImportError(
        "TensorBoardReport needs tensorboardX: pip install 'smorms3-dist[tensorboard]'"
    )
