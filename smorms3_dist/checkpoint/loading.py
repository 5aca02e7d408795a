"""Loading a step on all ranks together, at any world size.

Every rank reads what it owns, and nothing else, into memory of its own. Only when all ranks have
read and checked theirs is anything changed; then the ranks exchange the parameters. So nothing of a
damaged step ever enters a training.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals import iterators_of
from smorms3_dist.checkpoint import trainer_state
from smorms3_dist.checkpoint.arrays import Incoming
from smorms3_dist.checkpoint.files.directory import CheckpointDirectory
from smorms3_dist.checkpoint.files.errors import (
    CheckpointError,
    NewerVersionError,
    OtherTrainingError,
)
from smorms3_dist.checkpoint.files.manifest import RESHARDED, Manifest, full_name
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.model_state import (
    Optimizers,
    differences,
    restore_notes,
    rules_of,
)
from smorms3_dist.checkpoint.together import together
from smorms3_dist.checkpoint.trainer_state import RankState
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
        self._host = socket.gethostname()
        self._files = CheckpointDirectory(directory, self._host)
        self._strict = strict

    def load(self, step: int | None, objects: Mapping[str, Any]) -> Manifest | None:
        """Loads a step. Collective.

        Args:
            step: The step; ``None`` for the newest one that is whole on all hosts.
            objects: What is restored of each rank besides parameters and states, by name. Objects
                of the Trainer's are expected under ``trainer``.

        Returns:
            The manifest of the step; ``None`` if the newest was asked for and there is none at all.

        Raises:
            CheckpointError: If the step is damaged, or is of another model; on all ranks. Nothing
                has been changed then, but that parameters may have been initialized. Or if it fits
                the model and not the objects, of which some may have been changed.
        """
        meet(self._collectives)
        candidates = [step] if step is not None else self._candidates()
        failure: CheckpointError | None = None
        for candidate in candidates:
            try:
                read = self._read(candidate)
            except OtherTrainingError:
                raise
            except CheckpointError as error:
                failure = failure or error
                if step is None and self._collectives.rank == 0:
                    _logger.warning("step %d cannot be used: %s", candidate, error)
                continue
            self._move_in(read, objects)
            return read.manifest
        if failure is not None:
            raise failure
        return None

    def _candidates(self) -> list[int]:
        """The steps that all ranks see, newest first."""
        with together(self._collectives, self._files.path, _SEEN_BY):
            steps, found = self._files.steps(), self._files.damaged()
        damaged = {number: str(error) for number, error in found.items()}
        ahead = {number for number, e in found.items() if isinstance(e, NewerVersionError)}
        everybodys = self._collectives.all_gather_object((self._host, steps, damaged, ahead))
        common = sorted(set.intersection(*(set(steps) for _, steps, _, _ in everybodys)))
        newest = common[-1] if common else -1
        broken = {
            s: text for _, _, found, _ in everybodys for s, text in found.items() if s > newest
        }
        for number in sorted(set().union(*(ahead for *_, ahead in everybodys)) & broken.keys()):
            raise CheckpointError(
                self._files.path,
                f"has a newest step that a newer smorms3_dist has saved: {broken[number]}. To go on"
                " from an older step instead, move that one away",
            )
        if self._collectives.rank == 0:
            for number, text in sorted(broken.items()):
                _logger.warning("step %d cannot be used: %s", number, text)
        if not common:
            if broken:
                listed = "; ".join(f"step {s}: {text}" for s, text in sorted(broken.items()))
                raise CheckpointError(
                    self._files.path,
                    "has no whole step. To train from the start, remove the damaged ones: "
                    + listed,
                )
            fullest = max(everybodys, key=lambda item: len(item[1]))
            for rank, (host, theirs, *_) in enumerate(everybodys):
                if theirs != fullest[1]:
                    raise CheckpointError(
                        self._files.path,
                        f"has {_listed(fullest[1])} where rank {everybodys.index(fullest)} on "
                        f"{fullest[0]} looks, but {_listed(theirs)} where rank {rank} on {host} "
                        "does, and no step everywhere. Bring the files of all hosts to their "
                        "places, or use a directory that all hosts share",
                    )
        return common[::-1]

    def _read(self, step: int) -> _StepRead:
        """Reads everything that this rank needs. Collective."""
        path = self._files.path
        with together(self._collectives, path, _SEEN_BY):
            reader = StepReader(self._files, step)
        with reader:
            self._compare_manifests(reader.manifest)
            leave = self._prepare(reader.manifest)
            with together(self._collectives, path, _SEEN_BY):
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
        saved = {parameter.name: parameter for parameter in manifest.parameters}
        for name, optimizer in self._optimizers.items():
            for path, param in optimizer.target.namedparams():
                parameter = saved.get(full_name(name, path))
                if param.array is None and parameter is not None:
                    param.initialize(parameter.shape)
            optimizer.lay_out()
        found = differences(self._optimizers, saved)
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
        notes = manifest.notes.get("optimizers", {})
        for incoming, (name, optimizer) in zip(
            read.incoming, self._optimizers.items(), strict=True
        ):
            incoming.move_in()
            for group in optimizer.sharded_model.groups:
                optimizer.sharded_model.gather(group, optimizer.collectives)
            restore_notes(optimizer, notes.get(name, {}), manifest)
            optimizer.note_loaded()
        if read.state is None:
            return
        # What has been resharded has states of as many trainers, but of another number of ranks.
        resized = RESHARDED in manifest.notes or manifest.world_size != self._collectives.size
        with together(self._collectives, self._files.path, _SEEN_BY):
            self._restore_objects(read.state, objects, manifest, resized)
        if not resized:
            trainer_state.restore_random_states(read.state)
            return
        stuck = _move_iterators(objects.get("trainer"), manifest.notes.get("iterators", {}))
        if self._collectives.rank == 0:
            _logger.warning(
                "the checkpoint is of %s ranks, and there are %d now: the order of what is left of "
                "the epoch is drawn anew, and random numbers start where the script has left "
                "them%s",
                "other" if RESHARDED in manifest.notes else manifest.world_size,
                self._collectives.size,
                f"; these iterators stay as they are: {', '.join(stuck)}" if stuck else "",
            )

    def _restore_objects(
        self, state: RankState, objects: Mapping[str, Any], manifest: Manifest, resized: bool
    ) -> None:
        path = self._files.path_of(manifest.step)
        try:
            trainer_state.restore(
                state,
                {**objects, **rules_of(self._optimizers)},
                self._strict,
                lambda key: resized and key.startswith("trainer/updater/iterator:"),
            )
        except KeyError as error:
            raise CheckpointError(
                path,
                f"has no {error.args[0]} of rank {self._collectives.rank}: the trainer had no such "
                "extension or trigger when it was saved. With strict=False it is left as it is",
            ) from error
        except ValueError as error:
            raise CheckpointError(path, f"is of another trainer: {error}") from error


_SEEN_BY = "seen by rank"


class _StepRead(NamedTuple):
    manifest: Manifest
    incoming: Sequence[Incoming]
    state: RankState | None


def _listed(steps: Sequence[int]) -> str:
    return f"the steps {', '.join(map(str, steps))}" if steps else "none"


def _move_iterators(trainer: Any, positions: Mapping[str, Any]) -> list[str]:
    """Moves the iterators of a trainer; returns the names of those that cannot be moved."""
    if trainer is None:
        return []
    iterators = iterators_of(trainer.updater)
    return [
        name
        for name, iterator in iterators.items()
        if not isinstance(positions.get(name), (int, float))
        or not trainer_state.move_to(iterator, float(positions[name]))
    ]
