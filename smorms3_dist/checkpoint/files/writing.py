"""Writes the files of one rank, each with the record that the manifest has of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from smorms3_dist.checkpoint.files.blocks import BLOCK_BYTES
from smorms3_dist.checkpoint.files.manifest import (
    FileRecord,
    GroupLine,
    ParameterGroup,
    StoredRange,
)
from smorms3_dist.checkpoint.files.safetensors import write_safetensors

import numpy as np


class Chunk(NamedTuple):
    """A range of a line that a rank saves.

    Attributes:
        line: The line.
        start: Its first element there.
        values: The elements in arrays of one dimension, one behind the other; views are enough, and
            are read only while they are written.
    """

    line: GroupLine
    start: int
    values: list[np.ndarray]


def write_shard(
    directory: Path,
    rank: int,
    host: str,
    groups: Sequence[ParameterGroup],
    chunks: Iterable[Chunk],
    metadata: Mapping[str, str] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> FileRecord:
    """Writes what a rank owns of the parameters and of what belongs to them.

    Args:
        directory: The directory of the save.
        rank: The rank.
        host: Its host.
        groups: The groups of parameters; their names are in those of tensors, for people.
        chunks: What it owns. Empty ones are left out.
        metadata: Strings to keep in the file.
        block_bytes: Bytes of a block that has a checksum of its own.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    tensors = {}
    ranges = []
    for line, start, values in chunks:
        size = sum(part.size for part in values)
        if size:
            span = groups[line.group].span(start, start + size)
            name = f"{line.kind if line.state is None else f'{line.kind} {line.state}'} {span}"
            ranges.append(StoredRange(name, line, start, start + size))
            tensors[name] = values
    path = f"shard-{rank:05d}.safetensors"
    sums = write_safetensors(directory / path, tensors, metadata, block_bytes)
    return FileRecord(path, "shard", rank, host, sums, tuple(ranges))


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
