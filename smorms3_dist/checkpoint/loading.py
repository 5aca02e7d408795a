"""Loading a step on all ranks together, at any world size.

Every rank reads what it owns, and nothing else, into memory of its own. Only when all ranks have
read and checked theirs is anything changed; then the ranks exchange the parameters. So nothing of a
damaged step ever enters a training.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals.trainers import as_if_started
from smorms3_dist.checkpoint import iterators, trainer_state
from smorms3_dist.checkpoint.arrays import Incoming
from smorms3_dist.checkpoint.files.directory import CheckpointDirectory
from smorms3_dist.checkpoint.files.errors import (
    CheckpointError,
    DamagedCheckpointError,
    OtherTrainingError,
)
from smorms3_dist.checkpoint.files.manifest import RESHARDED, Manifest, full_name
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.lineage import Lineage
from smorms3_dist.checkpoint.model_state import (
    Optimizers,
    differences,
    notes_fault,
    restore_notes,
    rules_of,
)
from smorms3_dist.checkpoint.saving import Saver
from smorms3_dist.checkpoint.searching import SEEN_BY, steps_everywhere
from smorms3_dist.checkpoint.together import together
from smorms3_dist.checkpoint.trainer_state import RankState
from smorms3_dist.checkpoint.unsaved import with_unsaved
from smorms3_dist.optimizer.on_device import device_of
from smorms3_dist.step.agreement import meet

import numpy as np

_logger = logging.getLogger(__name__)


class Loader:
    """Loads steps of one directory. All ranks make and use it alike.

    Args:
        directory: The directory.
        optimizers: The optimizers whose models are loaded, by name.
        strict: Whether model and checkpoint must have the same parameters.
    """

    def __init__(
        self, directory: str | os.PathLike[str], optimizers: Optimizers, strict: bool = True
    ) -> None:
        self._optimizers = optimizers
        self._collectives = next(iter(optimizers.values())).collectives
        self._files = CheckpointDirectory(directory)
        self._strict = strict
        # The names of the trainer's extensions that have a state in what was loaded.
        self.extensions: frozenset[str] = frozenset()

    def load(self, step: int | None, objects: Mapping[str, Any]) -> Manifest | None:
        """Loads a step. Collective.

        Args:
            step: The step; ``None`` for the newest one that is whole on all hosts.
            objects: What is restored of each rank besides parameters and states, by name. Objects
                of the Trainer's are expected under ``trainer``.

        Returns:
            The manifest of the step; ``None`` if the newest was asked for and there is none at all.

        Raises:
            CheckpointError: If the step is damaged, or is of another model or of other objects; on
                all ranks. Nothing has been changed then, but that parameters may have been
                initialized.
            RuntimeError: Before ``setup``.
        """
        for optimizer in self._optimizers.values():
            if optimizer.target is None:
                raise RuntimeError(
                    "the optimizer has no target; call setup(link) before loading a checkpoint"
                )
        meet(self._collectives, "the load of a checkpoint")
        for work in next(iter(self._optimizers.values())).background:
            if isinstance(work, Saver) and work.saves(self._files.path, self._optimizers):
                work.wait("the load of a checkpoint")
        candidates: Iterable[tuple[int, Manifest | None]] = (
            [(step, None)] if step is not None else steps_everywhere(self._files, self._collectives)
        )
        failure: CheckpointError | None = None
        for candidate, manifest in candidates:
            try:
                read = self._read(candidate, manifest)
            except OtherTrainingError:
                raise
            except CheckpointError as error:
                failure = failure or error
                if step is None and self._collectives.rank == 0:
                    _logger.warning("step %d cannot be used: %s", candidate, error)
                continue
            self._move_in(read, objects)
            self._note_loaded(candidate, step is not None)
            return read.manifest
        if failure is not None:
            if type(failure) is CheckpointError:
                raise DamagedCheckpointError(failure.path, failure.reason) from failure
            raise failure
        return None

    def _note_loaded(self, step: int, asked_for: bool) -> None:
        """Notes what was there, on any host. Collective."""
        with together(self._collectives, self._files.path, SEEN_BY):
            there = self._files.numbers()
        there = sorted({n for each in self._collectives.all_gather_object(there) for n in each})
        first = next(iter(self._optimizers.values()))
        Lineage.of(first, self._files.path).note_loaded(step, there, asked_for)

    def _read(self, step: int, manifest: Manifest | None) -> _StepRead:
        """Reads everything that this rank needs. Collective."""
        path = self._files.path
        with together(self._collectives, path, SEEN_BY):
            reader = StepReader(self._files, step, manifest)
            fault = notes_fault(reader.manifest.notes)
            if fault is not None:
                raise CheckpointError(self._files.path_of(step), f"{fault}, which cannot be")
        with reader:
            self._compare_manifests(reader.manifest)
            leave = self._prepare(reader.manifest)
            with together(self._collectives, path, SEEN_BY):
                try:
                    incoming = [
                        Incoming(name, optimizer, reader, leave)
                        for name, optimizer in self._optimizers.items()
                    ]
                    state = self._read_rank_state(reader)
                except MemoryError as error:
                    step_path = self._files.path_of(step)
                    raise CheckpointError(step_path, f"cannot be loaded: {error}") from error
        return _StepRead(reader.manifest, incoming, state)

    def _compare_manifests(self, manifest: Manifest) -> None:
        facts = (manifest.step, manifest.created, [file.sums.xxh3 for file in manifest.files])
        everybodys = self._collectives.all_gather_object(facts)
        for rank, theirs in enumerate(everybodys):
            if theirs != everybodys[0]:
                raise OtherTrainingError(
                    self._files.path,
                    f"holds another step {manifest.step} where rank {rank} looks than where rank 0 "
                    "does: the hosts have directories of different trainings",
                )

    def _prepare(self, manifest: Manifest) -> set[str]:
        """Lays the models out, and compares them with the checkpoint. Collective."""
        for name, optimizer in self._optimizers.items():
            optimizer.lay_out(shape_of=functools.partial(_shape_of, manifest, name))
        found = differences(self._optimizers, manifest)
        if found:
            listed = "; ".join(f"{name} {words}" for name, words in found.items())
            if self._strict:
                raise OtherTrainingError(
                    self._files.path_of(manifest.step),
                    f"is of another model: {listed}. With strict=False these parameters are left "
                    "as they are",
                )
            if self._collectives.rank == 0:
                _logger.warning("left as they are, or unused: %s", listed)
        return set(found)

    def _read_rank_state(self, reader: StepReader) -> RankState | None:
        file = reader.manifest.rank_file(self._collectives.rank % reader.manifest.world_size)
        if file is None:
            return None
        opened = reader.open(file)
        arrays = {}
        for name, tensor in opened.tensors.items():
            arrays[name] = np.empty(tensor.shape, tensor.dtype)
            opened.read(name, 0, tensor.size, arrays[name])
        return RankState(arrays, dict(opened.metadata))

    def _move_in(self, read: _StepRead, objects: Mapping[str, Any]) -> None:
        """Changes the training. Collective."""
        manifest = read.manifest
        self._restore_rank(read, objects)
        notes = manifest.notes.get("optimizers", {})
        for incoming, (name, optimizer) in zip(
            read.incoming, self._optimizers.items(), strict=True
        ):
            with device_of(optimizer):
                incoming.move_in()
                optimizer.sharded_model.gather_exactly(optimizer.collectives)
                restore_notes(optimizer, notes.get(name, {}), manifest)
                optimizer.note_loaded()

    def _restore_rank(self, read: _StepRead, objects: Mapping[str, Any]) -> None:
        """Restores objects and random numbers; or nothing, if one rank cannot. Collective."""
        manifest, state = read.manifest, read.state
        if state is None:
            return
        # What has been resharded has states of as many trainers, but of another number of ranks.
        resized = RESHARDED in manifest.notes or manifest.world_size != self._collectives.size
        everything = with_unsaved({**objects, **rules_of(self._optimizers)})
        before = self._copy(everything)
        stuck: list[str] = []
        models = [optimizer.sharded_model for optimizer in self._optimizers.values()]
        try:
            with (
                together(self._collectives, self._files.path, SEEN_BY),
                trainer_state.without_parameters_of(models),
            ):
                self._restore_objects(state, everything, manifest, resized)
                if resized:
                    stuck = iterators.move(objects, manifest.notes)
                else:
                    trainer_state.restore_random_states(state, models)
        except BaseException:
            if before is not None:
                with contextlib.suppress(Exception):
                    trainer_state.restore(before, everything, strict=False)
            raise
        self.extensions = trainer_state.extensions_in(state)
        if resized and self._collectives.rank == 0:
            _logger.warning(
                "the checkpoint is of %s ranks, and there are %d now: the order of what is left of "
                "the epoch is drawn anew, and random numbers start where the script has left "
                "them%s",
                "other" if RESHARDED in manifest.notes else manifest.world_size,
                self._collectives.size,
                f"; these iterators stay as they are: {', '.join(stuck)}" if stuck else "",
            )

    def _copy(self, objects: Mapping[str, Any]) -> RankState | None:
        """What objects are before they are restored; ``None`` if they cannot be copied yet."""
        models = [optimizer.sharded_model for optimizer in self._optimizers.values()]
        try:
            with as_if_started(objects.values()):
                return trainer_state.copy_objects(objects, models)
        except Exception:
            return None

    def _restore_objects(
        self, state: RankState, objects: Mapping[str, Any], manifest: Manifest, resized: bool
    ) -> None:
        path = self._files.path_of(manifest.step)
        moved = tuple(f"{name}/" for name in iterators.iterators_in(objects)) if resized else ()
        left_out = (*moved, "unsaved/random/") if moved else ()
        try:
            trainer_state.restore(state, objects, self._strict, left_out)
            if not resized:
                iterators.check(objects)
        except KeyError as error:
            raise CheckpointError(
                path,
                f"has no {error.args[0]} of rank {self._collectives.rank}: the trainer had no such "
                "extension or trigger when it was saved. With strict=False it is left as it is",
            ) from error
        except ValueError as error:
            raise CheckpointError(path, f"is of another trainer: {error}") from error


def _shape_of(manifest: Manifest, optimizer: str, path: str) -> tuple[int, ...] | None:
    """The shape that a parameter has in a checkpoint, if it has it."""
    place = manifest.places.get(full_name(optimizer, path))
    return None if place is None else manifest.groups[place[0]].shapes[place[1]]


class _StepRead(NamedTuple):
    manifest: Manifest
    incoming: Sequence[Incoming]
    state: RankState | None
