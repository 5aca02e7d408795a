"""Writes a step again, as if another number of ranks had saved it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

from smorms3_dist.checkpoint.files.directory import CheckpointDirectory
from smorms3_dist.checkpoint.files.manifest import RESHARDED, Array
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.files.steps import Steps
from smorms3_dist.checkpoint.tools.dividing import Source, copy_rank_file, new_step, write_shards
from smorms3_dist.checkpoint.tools.npz import Fill
from smorms3_dist.checkpoint.tools.progress import Meter, Progress

import numpy as np


def reshard(
    directory: Steps,
    step: int,
    out: CheckpointDirectory,
    ranks: int,
    progress: Progress | None = None,
) -> None:
    """Writes the same step for another number of ranks; everything is checked on the way.

    Each rank gets a copy of the trainer's state of that rank which would give it one if the step
    were loaded by so many ranks as it is.

    Args:
        directory: Where the step is.
        step: The step.
        out: Where it goes.
        ranks: How many ranks.
        progress: Is told of the bytes that have been written.

    Raises:
        CheckpointError: If the step is damaged, is in ``out`` already, or cannot be written.
    """
    with StepReader(directory, step) as reader:
        manifest = reader.manifest
        sources = [
            Source(
                array,
                reader.dtype(*_place(array)),
                parameter.size,
                functools.partial(_opened, reader, array),
            )
            for parameter in manifest.parameters
            for array, _ in parameter.arrays
        ]
        kept = [manifest.rank_file(rank % manifest.world_size) for rank in range(ranks)]
        total = sum(source.size * source.dtype.itemsize for source in sources)
        meter = Meter(total + sum(file.sums.size for file in kept if file is not None), progress)
        with new_step(out, step) as (saving, token):
            files = write_shards(saving, step, sources, ranks, meter)
            for rank, file in enumerate(kept):
                if file is not None:
                    reader.open(file)
                    files.append(copy_rank_file(directory.path_of(step), file, saving, rank, meter))
            notes = dict(manifest.notes)
            if ranks != manifest.world_size:
                notes[RESHARDED] = True
            out.commit(
                token,
                dataclasses.replace(
                    manifest, world_size=ranks, local=False, notes=notes, files=tuple(files)
                ),
            )


def _place(array: Array) -> tuple[str, str | None, str]:
    return array.kind, array.state, array.parameter


@contextlib.contextmanager
def _opened(reader: StepReader, array: Array) -> Iterator[Fill]:
    done = 0

    def fill(out: np.ndarray) -> None:
        nonlocal done
        reader.read(*_place(array), done, done + out.size, out)
        done += out.size

    yield fill
