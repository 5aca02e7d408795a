"""Writes the arrays of a step as the shards of any number of ranks, without any rank.

All arrays, one after the other, are cut into equal parts. So they are read once, from start to end,
and one file is written at a time.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from smorms3_dist.checkpoint.files.blocks import SummedReader, SummedWriter
from smorms3_dist.checkpoint.files.directory import CheckpointDirectory, new_token
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import Array, FileRecord, Segment
from smorms3_dist.checkpoint.files.safetensors import SafetensorsWriter, TensorSpec
from smorms3_dist.checkpoint.tools.npz import CHUNK_BYTES, Fill
from smorms3_dist.checkpoint.tools.progress import Meter

import numpy as np


class Source(NamedTuple):
    """An array that is to be written.

    Attributes:
        array: Which one.
        dtype: Its dtype.
        size: Number of its elements.
        open: Opens it, to be read from its start to its end.
    """

    array: Array
    dtype: np.dtype
    size: int
    open: Callable[[], AbstractContextManager[Fill]]


class _Range(NamedTuple):
    source: Source
    start: int
    stop: int

    @property
    def segment(self) -> Segment:
        array = self.source.array
        name = f"{array} {self.start}:{self.stop}"
        return Segment(name, array.kind, array.state, array.parameter, self.start, self.stop)


@contextlib.contextmanager
def new_step(directory: CheckpointDirectory, step: int) -> Iterator[tuple[Path, str]]:
    """Makes the directory of a new step, and removes it again if the context fails.

    Args:
        directory: Where. It is locked.
        step: The step, which must not be there.

    Yields:
        The directory for the files, and the token to commit with.

    Raises:
        CheckpointError: If there is such a step, or another job writes here.
    """
    directory.lock()
    if step in directory.steps() or step in directory.damaged():
        raise CheckpointError(
            directory.path, f"has a step {step} already: remove it first, or choose another place"
        )
    token = new_token()
    try:
        yield directory.begin(step, token), token
    except BaseException:
        directory.abort(step, token)
        raise


def write_shards(
    saving: Path, step: int, sources: Sequence[Source], ranks: int, meter: Meter
) -> list[FileRecord]:
    """Writes arrays as the shards of some ranks.

    Args:
        saving: The directory of the save.
        step: The step.
        sources: The arrays.
        ranks: How many ranks.
        meter: Counts the bytes of the elements.

    Raises:
        CheckpointError: If something cannot be read or written.
    """
    # As the files have them: then the arrays come in one order through all files.
    ordered = sorted(sources, key=lambda source: -source.dtype.itemsize)
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    host = socket.gethostname()
    records = []
    with contextlib.ExitStack() as opened:
        fill: Fill
        for rank, ranges in enumerate(_divide(ordered, ranks)):
            path = f"shard-{rank:05d}.safetensors"
            specs = [
                TensorSpec(each.segment.tensor, each.source.dtype, (each.stop - each.start,))
                for each in ranges
            ]
            with SafetensorsWriter(saving / path, specs, {"step": str(step)}) as writer:
                for each in ranges:
                    source, start, stop = each
                    if start == 0:
                        fill = opened.enter_context(source.open())
                    while start < stop:
                        size = min(stop - start, CHUNK_BYTES // source.dtype.itemsize)
                        block = buffer[: size * source.dtype.itemsize].view(source.dtype)
                        fill(block)
                        writer.append(each.segment.tensor, block)
                        meter.add(block.nbytes)
                        start += size
                    if stop == source.size:
                        opened.close()
                sums = writer.finish()
            segments = tuple(each.segment for each in ranges)
            records.append(FileRecord(path, "shard", rank, host, sums, segments))
    return records


def _divide(sources: Sequence[Source], ranks: int) -> list[list[_Range]]:
    """Ranges for each rank, of equal numbers of bytes but for whole elements."""
    total = sum(source.size * source.dtype.itemsize for source in sources)
    ranges: list[list[_Range]] = [[] for _ in range(ranks)]
    rank = offset = 0
    for source in sources:
        itemsize = source.dtype.itemsize
        start = 0
        while start < source.size:
            while total * (rank + 1) // ranks <= offset + start * itemsize:
                rank += 1
            room = total * (rank + 1) // ranks - offset
            stop = min(source.size, -(-room // itemsize))
            ranges[rank].append(_Range(source, start, stop))
            start = stop
        offset += source.size * itemsize
    return ranges


def copy_rank_file(
    source: Path, record: FileRecord, saving: Path, rank: int, meter: Meter
) -> FileRecord:
    """Copies the file with the rest of a rank's state for another rank, and checks it on the way.

    Args:
        source: The directory of the step that it is from.
        record: The file.
        saving: The directory of the save.
        rank: The rank that is to have it.
        meter: Counts its bytes.

    Raises:
        CheckpointError: If it is damaged, or cannot be written.
    """
    path = f"rank-{rank:05d}.safetensors"
    sums = record.sums
    with (
        SummedReader(source / record.path, sums, record.origin) as reader,
        SummedWriter(saving / path, sums.block_bytes) as writer,
    ):
        for index in range(len(sums.blocks)):
            start, stop = sums.block(index)
            block = memoryview(bytearray(stop - start))
            reader.read(start, block)
            writer.write(block)
            meter.add(len(block))
        copied = writer.finish()
    return FileRecord(path, "rank", rank, socket.gethostname(), copied)
