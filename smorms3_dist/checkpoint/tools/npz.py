"""Npz files, written as streams: no array is ever in memory as a whole.

An npz file is a zip file with an npy file for each array: a line of text with dtype and shape, and
the elements. Chainer writes a pickle for each value that is ``None``, always the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from smorms3_dist.checkpoint.files.errors import naming
from smorms3_dist.checkpoint.tools.new_files import new_file

import numpy as np

CHUNK_BYTES = 1 << 20
"""How much of an array is in memory at once."""

NONE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117)
    + b"\n\x80\x03cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02"
    b"C\x01bq\x03\x87q\x04Rq\x05(K\x01)cnumpy\ndtype\nq\x06X\x02\x00\x00\x00O8q\x07\x89\x88\x87"
    b"q\x08Rq\t(K\x03X\x01\x00\x00\x00|q\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tq\x0bb\x89]"
    b"q\x0cNatq\rb."
)
"""The npy file of ``numpy.asarray(None)``, as all versions of NumPy can read it."""


class Entry(NamedTuple):
    """An array that is going to be written.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        blocks: Gives its elements in C order, in contiguous arrays.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def new_npz(path: Path, compress: bool = False) -> Iterator[NpzWriter]:
    """Makes an npz file that exists under its name once it is whole, where the context ends.

    If the context fails, nothing is left.

    Raises:
        CheckpointError: If it exists or cannot be written.
    """
    with new_file(path) as (file, temporary):
        writer = NpzWriter(file, temporary, compress)
        try:
            yield writer
            with naming(temporary, "written"):
                writer.finish()
        finally:
            writer.close()


class NpzWriter:
    """Writes an npz file into one that is open and empty; its path is for errors."""

    def __init__(self, file: IO[bytes], path: Path, compress: bool) -> None:
        self._path = path
        self._compression = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
        self._zip = zipfile.ZipFile(file, "w", self._compression)

    def add(self, key: str, entry: Entry | None) -> None:
        """Writes an array, or ``None`` as Chainer does.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        info = zipfile.ZipInfo(key + ".npy")
        info.compress_type = self._compression
        info.external_attr = 0o600 << 16
        with naming(self._path, "written"):
            file = self._zip.open(info, "w", force_zip64=True)
        try:
            # `naming` is for this file: the blocks come from others.
            for data in [NONE] if entry is None else _npy(entry):
                with naming(self._path, "written"):
                    file.write(data)
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            raise
        with naming(self._path, "written"):
            file.close()

    def finish(self) -> None:
        """Writes the end of the file.

        Raises:
            OSError: If the disk does not take it.
        """
        self._zip.close()

    def close(self) -> None:
        """Gives the file up; unless `finish` came first, it is not whole."""
        # ZipFile knows no other end than to write its directory, for which there may be no room.
        with contextlib.suppress(OSError):
            self._zip.close()


def _npy(entry: Entry) -> Iterator[bytes | memoryview]:
    """An array as an npy file, piece by piece."""
    header = {
        "descr": np.lib.format.dtype_to_descr(entry.dtype),
        "fortran_order": False,
        "shape": entry.shape,
    }
    start = io.BytesIO()
    np.lib.format.write_array_header_1_0(start, header)
    yield start.getvalue()
    for block in entry.blocks():
        if block.size:
            yield block.reshape(-1).view(np.uint8).data
