"""Reads ranges of the arrays of one step from whichever files hold them."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator

from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import Array, FileRecord, GroupLine, Manifest
from smorms3_dist.checkpoint.files.safetensors import SafetensorsReader
from smorms3_dist.checkpoint.files.steps import Steps

import numpy as np

_OPEN_FILES = 16
"""Each has a block in memory. Who reads a shard in order needs one or two at a time."""


class StepReader:
    """Reads one step. Files are opened when they are first needed, and a few are kept open.

    Each block of a file is checked before anything of it is given out. Not for several threads at
    once.

    Args:
        directory: The directory of the checkpoints.
        step: A step of it.
        manifest: Its manifest, if that has been read already.

    Raises:
        CheckpointError: If there is no such step, or its manifest is not valid.
    """

    def __init__(self, directory: Steps, step: int, manifest: Manifest | None = None) -> None:
        self.manifest = directory.manifest(step) if manifest is None else manifest
        self._path = directory.path_of(step)
        self._host = directory.host
        self._open: OrderedDict[str, SafetensorsReader] = OrderedDict()

    def __enter__(self) -> StepReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files. It may be called again."""
        while self._open:
            self._open.popitem()[1].close()

    def dtype(self, array: Array) -> np.dtype:
        """The dtype of an array.

        Raises:
            CheckpointError: If the step has no such array.
        """
        return np.dtype(self.manifest.lines[self._place(array)[0]])

    def _place(self, array: Array) -> tuple[GroupLine, int, int]:
        """Its line, its first element there, and how many it has."""
        found = self.manifest.line_of(array)
        if found is None:
            raise CheckpointError(self._path, f"has no {array}")
        line, start, stop = found
        return line, start, stop - start

    def read(self, array: Array, start: int, stop: int, out: np.ndarray) -> None:
        """Reads a range of an array's elements, in C order.

        Args:
            array: The array.
            start: First element, in the parameter's flattened offsets.
            stop: One past the last element.
            out: Where they go: a C-contiguous array of ``stop - start`` elements of the array's
                dtype. If this raises, it holds no damaged elements, but may be half filled.

        Raises:
            CheckpointError: If the step has no such array, or a file is missing or damaged, naming
                the file, its rank and its host.
            ValueError: If the range is not within the array, or ``out`` does not fit.
        """
        line, begin, size = self._place(array)
        if not 0 <= start <= stop <= size:
            raise ValueError(f"{array} has {size} elements, not {start} to {stop}")
        self.read_line(line, begin + start, begin + stop, out)

    def read_line(self, line: GroupLine, start: int, stop: int, out: np.ndarray) -> None:
        """Reads a range of a line: of an array of neighbouring parameters of a group.

        Args:
            line: A line of the manifest.
            start: First element.
            stop: One past the last element; not beyond the line.
            out: As for `read`.

        Raises:
            CheckpointError: As `read` does.
            ValueError: If ``out`` does not fit.
        """
        dtype = np.dtype(self.manifest.lines[line])
        if out.dtype != dtype or out.size != stop - start or not out.flags.c_contiguous:
            raise ValueError(
                f"{stop - start} elements of {dtype} of {tuple(line)} cannot be read into an array "
                f"of {out.size} of {out.dtype}, or one that is not C-contiguous"
            )
        flat = out.reshape(-1)
        locations = self.manifest.locations[line]
        index = bisect.bisect_right(locations, start, key=lambda found: found.range.start) - 1
        for found, file in map(locations.__getitem__, range(max(index, 0), len(locations))):
            if found.start >= stop:
                break
            first, last = max(start, found.start), min(stop, found.stop)
            part = flat[first - start : last - start]
            reader = self.open(file)
            reader.read(found.tensor, first - found.start, last - found.start, part)

    def whole(self, array: Array, block_elements: int = 1 << 20) -> Iterator[np.ndarray]:
        """Reads an array from its start to its end, a bounded number of elements at a time.

        Yields:
            The blocks in order. Their memory is used again for the next one.

        Raises:
            CheckpointError: As `read` does.
        """
        _, _, size = self._place(array)
        dtype = self.dtype(array)
        buffer = np.empty(min(block_elements, size), dtype)
        for start in range(0, size, block_elements):
            values = buffer[: min(block_elements, size - start)]
            self.read(array, start, start + values.size, values)
            yield values

    def open(self, file: FileRecord) -> SafetensorsReader:
        """Opens a file of the step, or gives the one that is open.

        It is closed by this reader: at the latest by `close`, but also once many others have been
        opened.

        Raises:
            CheckpointError: If it is missing, is not of the right size, its header is damaged, or
                it lacks a tensor that the manifest names.
        """
        if file.path in self._open:
            self._open.move_to_end(file.path)
            return self._open[file.path]
        path = self._path / file.path
        if self.manifest.local and file.host != self._host and not path.exists():
            raise CheckpointError(
                path,
                f"is missing here, on host {self._host}: each host has its own files, and this one "
                f"is {file.origin}",
            )
        reader = SafetensorsReader(path, file.sums, file.origin)
        self._open[file.path] = reader
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._check_tensors(reader, file)
        return reader

    def _check_tensors(self, reader: SafetensorsReader, file: FileRecord) -> None:
        for each in file.ranges:
            size, dtype = each.stop - each.start, self.manifest.lines[each.line]
            tensor = reader.tensors.get(each.tensor)
            if tensor is None or (tensor.size, tensor.dtype) != (size, dtype):
                found = "none" if tensor is None else f"{tensor.size} of {tensor.dtype}"
                raise CheckpointError(
                    self._path / file.path,
                    f"should have {size} elements of {dtype} in the tensor {each.tensor}, and "
                    f"has {found} ({file.origin})",
                )
