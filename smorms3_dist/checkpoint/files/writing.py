"""Writes the files of one rank, each with the record that the manifest has of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from smorms3_dist.checkpoint.files.blocks import BLOCK_BYTES
from smorms3_dist.checkpoint.files.manifest import Array, FileRecord, StoredSegment
from smorms3_dist.checkpoint.files.safetensors import write_safetensors

import numpy as np


class Chunk(NamedTuple):
    """A range of an array that a rank saves.

    Attributes:
        array: Of which parameter, and what of it.
        start: Offset of the first element in the parameter.
        values: The elements, of any shape; a view is enough, and is read only while it is written.
    """

    array: Array
    start: int
    values: np.ndarray


def write_shard(
    directory: Path,
    rank: int,
    host: str,
    chunks: Iterable[Chunk],
    metadata: Mapping[str, str] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> FileRecord:
    """Writes what a rank owns of the parameters and of what belongs to them.

    Args:
        directory: The directory of the save.
        rank: The rank.
        host: Its host.
        chunks: What it owns. Empty ones are left out.
        metadata: Strings to keep in the file.
        block_bytes: Bytes of a block that has a checksum of its own.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    tensors = {}
    segments = []
    for array, start, values in chunks:
        if values.size:
            stop = start + values.size
            parameter, kind, state = array
            name = f"{kind if state is None else f'{kind} {state}'} {parameter} {start}:{stop}"
            segments.append(StoredSegment(name, array, start, stop))
            tensors[name] = values
    path = f"shard-{rank:05d}.safetensors"
    sums = write_safetensors(directory / path, tensors, metadata, block_bytes)
    return FileRecord(path, "shard", rank, host, sums, tuple(segments))


def write_rank(
    directory: Path,
    rank: int,
    host: str,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> FileRecord:
    """Writes the rest of a rank's state, arrays by name; see `write_shard`."""
    path = f"rank-{rank:05d}.safetensors"
    sums = write_safetensors(directory / path, arrays, metadata, block_bytes)
    return FileRecord(path, "rank", rank, host, sums)
