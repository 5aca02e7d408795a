"""A Chainer snapshot of a trainer as a step, which can then be loaded at any world size."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.checkpoint.files.directory import CheckpointDirectory
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import RESHARDED, FileRecord, Manifest
from smorms3_dist.checkpoint.files.safetensors import SafetensorsWriter, TensorSpec
from smorms3_dist.checkpoint.tools import npz_keys
from smorms3_dist.checkpoint.tools.contents import Contents
from smorms3_dist.checkpoint.tools.dividing import copy_rank_file, new_step, write_shards
from smorms3_dist.checkpoint.tools.npz import CHUNK_BYTES, Member, NpzReader
from smorms3_dist.checkpoint.tools.progress import Meter, Progress
from smorms3_dist.version import __version__

import numpy as np

_RANDOM = "random/"


def import_snapshot(
    path: Path,
    directory: CheckpointDirectory,
    *,
    step: int | None = None,
    ranks: int | None = None,
    tied: Mapping[str, str] | None = None,
    whole: Collection[str] = (),
    fixed: Collection[str] = (),
    progress: Progress | None = None,
) -> tuple[int, list[str]]:
    """Makes a step of a snapshot: Chainer's, or that of this package's extension, or an export.

    Args:
        path: The npz file.
        directory: Where the step goes.
        step: Its number; by default the iteration of the trainer.
        ranks: How many ranks the training had that made the snapshot; by default what the snapshot
            says, or else 1. Each gets what the snapshot has of one.
        tied: As for `Contents`.
        whole: As for `Contents`.
        fixed: As for `Contents`.
        progress: Is told of the bytes that have been written.

    Returns:
        The step, and the keys that have no place in a checkpoint.

    Raises:
        CheckpointError: If the snapshot is damaged, is none of a trainer, or holds what only pickle
            could load; if there is such a step; or if it cannot be written.
    """
    with NpzReader(path) as reader:
        contents = Contents(reader, tied or {}, whole, fixed)
        if ranks is None:
            ranks = contents.world_size or 1
        if step is None:
            step = contents.iteration
        # Random states are those of one rank, and would make the others draw the same.
        kept = {
            name: member
            for name, member in contents.kept.items()
            if ranks == 1 or not name.startswith(_RANDOM)
        }
        manifest = _manifest(contents, step, ranks)
        with new_step(directory, step) as (saving, token):
            sources = contents.sources(saving)
            nbytes = sum(source.size * source.dtype.itemsize for source in sources)
            rest = sum(m.size * m.dtype.itemsize for m in kept.values() if _is_array(m))
            meter = Meter(nbytes + rest, progress)
            files = write_shards(saving, step, sources, ranks, meter)
            first = _write_rank(reader, saving, step, kept, contents.elsewhere, meter)
            copies = Meter(0, None)
            files.append(first)
            for rank in range(1, ranks):
                files.append(copy_rank_file(saving, first, saving, rank, copies))
            directory.commit(token, dataclasses.replace(manifest, files=tuple(files)))
    return step, contents.left_out


def _is_array(member: Member) -> bool:
    """Whether it goes into a rank's file as an array, and not as text."""
    return not member.is_none and member.dtype.kind != "U"


def _write_rank(
    reader: NpzReader,
    saving: Path,
    step: int,
    kept: Mapping[str, Member],
    elsewhere: list[str],
    meter: Meter,
) -> FileRecord:
    """Writes the file with what rank 0 has besides, by name."""
    specs = [TensorSpec(n, m.dtype, m.shape) for n, m in kept.items() if _is_array(m)]
    texts = {name: _text(reader, member) for name, member in kept.items() if not _is_array(member)}
    metadata = {
        npz_keys.VALUES: json.dumps(texts),
        npz_keys.ELSEWHERE: json.dumps(elsewhere),
        "step": str(step),
    }
    path = "rank-00000.safetensors"
    try:
        writer = SafetensorsWriter(saving / path, specs, metadata)
    except ValueError as error:
        raise CheckpointError(reader.path, f"cannot be kept: {error}") from error
    with writer:
        for spec in writer.tensors:
            with reader.stream(kept[spec.name].key, saving) as fill:
                size = math.prod(spec.shape)
                count = CHUNK_BYTES // spec.dtype.itemsize
                for start in range(0, size, count):
                    block = np.empty(min(count, size - start), spec.dtype)
                    fill(block)
                    writer.append(spec.name, block)
                    meter.add(block.nbytes)
        return FileRecord(path, "rank", 0, socket.gethostname(), writer.finish())


def _text(reader: NpzReader, member: Member) -> Any:
    value = reader.value(member.key)
    try:
        return None if value is None else value.tolist()
    except ValueError as error:
        raise reader.error(member.key, f"is no text: {error}") from error


def _manifest(contents: Contents, step: int, ranks: int) -> Manifest:
    """The manifest of the step, still without files."""
    optimizers = {name: contents.notes_of(name) for name in contents.optimizers}
    first = optimizers[contents.optimizers[0]]
    scale = {key: value for key, value in first.items() if key.startswith("loss_scale")}
    notes: dict[str, Any] = {"iterators": contents.positions(), "optimizers": optimizers}
    if contents.resharded or contents.world_size not in (None, ranks):
        notes[RESHARDED] = True
    return Manifest(
        step=step,
        t=first["t"],
        epoch=first["epoch"],
        world_size=ranks,
        local=False,
        created=manifest_json.now(),
        versions={
            "smorms3_dist": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        hyperparameters={},
        loss_scale=None if first["loss_scale"] is None else scale,
        notes=notes,
        parameters=tuple(sorted(contents.parameters.values(), key=lambda p: p.name)),
        files=(),
    )
