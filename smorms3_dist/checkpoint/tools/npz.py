"""Npz files, read and written as streams: no array is ever in memory as a whole.

An npz file is a zip file with an npy file for each array: a line of text with dtype and shape, and
the elements. Arrays of objects are pickles. Chainer writes one for each value that is ``None``,
always the same bytes for the same NumPy; these are recognized, and nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from smorms3_dist.checkpoint.files.directory import new_token
from smorms3_dist.checkpoint.files.errors import CheckpointError, naming
from smorms3_dist.checkpoint.files.strict_json import LARGEST, MAX_DIMENSIONS, shown

import numpy as np

CHUNK_BYTES = 1 << 20
"""How much of an array is in memory at once."""

Fill = Callable[[np.ndarray], None]
"""Fills an array with the next elements of another one."""

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,20})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,19}, )*[0-9]{1,19}|[0-9]{1,19},|)\), \} *\n"
)
_DTYPE = re.compile("[<>|=]?[A-Za-z][0-9]{0,9}")
_OBJECT_HEADER = (
    b"v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
)
_MAX_SMALL_BYTES = 64 << 20
# The ends of zip files without comments, and what comes before where numbers are large.
_END_BYTES, _LARGE_END_BYTES = 22, 56 + 20
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def _pickle(protocol: int, module: bytes, flags: bytes) -> bytes:
    """How a version of NumPy pickles the array of ``None``."""
    if protocol == 3:
        return (
            b"\x80\x03c"
            + module
            + b"\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02C\x01"
            b"bq\x03\x87q\x04Rq\x05(K\x01)cnumpy\ndtype\nq\x06X\x02\x00\x00\x00O8q\x07"
            + flags
            + b"\x87"
            b"q\x08Rq\t(K\x03X\x01\x00\x00\x00|q\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tq\x0bb\x89]"
            b"q\x0cNatq\rb."
        )
    body = (
        b"\x8c" + bytes([len(module)]) + module + b"\x94\x8c\x0c_reconstruct\x94\x93\x94\x8c\x05"
        b"numpy\x94\x8c\x07ndarray\x94\x93\x94K\x00\x85\x94C\x01b\x94\x87\x94R\x94(K\x01)h\x03\x8c\x05"
        b"dtype\x94\x93\x94\x8c\x02O8\x94"
        + flags
        + b"\x87\x94R\x94(K\x03\x8c\x01|\x94NNNJ\xff\xff\xff"
        b"\xffJ\xff\xff\xff\xffK?t\x94b\x89]\x94Nat\x94b."
    )
    return b"\x80\x04\x95" + len(body).to_bytes(8, "little") + body


# Of all versions of NumPy that Chainer 7 has run on. The first can be read by all of them.
_NONES = tuple(
    _MAGIC + _OBJECT_HEADER + _pickle(protocol, module, flags)
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray")
    for protocol in (3, 4)
    for flags in (b"\x89\x88", b"K\x00K\x01")
)
NONE = _NONES[0]
"""The npy file of ``numpy.asarray(None)``."""


@contextlib.contextmanager
def new_npz(path: Path, compress: bool = False) -> Iterator[NpzWriter]:
    """Makes an npz file that exists under its name once it is whole, where the context ends.

    If the context fails, nothing is left.

    Args:
        path: The file, which must not exist.
        compress: Whether to compress the arrays.

    Yields:
        What writes into it.

    Raises:
        CheckpointError: If it exists or cannot be written.
    """
    if os.path.lexists(path):
        raise CheckpointError(path, "exists already: remove it first, or choose another name")
    temporary = path.parent / f".{path.name}.{new_token()}"
    try:
        with naming(temporary, "written"):
            file = open(temporary, "xb")  # noqa: SIM115
        writer = NpzWriter(file, temporary, compress)
        try:
            yield writer
            with naming(temporary, "written"):
                writer.finish()
                os.rename(temporary, path)
        finally:
            writer.close()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class NpzWriter:
    """Writes an npz file.

    Args:
        file: The file, open and empty.
        path: Its name, for errors.
        compress: Whether to compress the arrays.
    """

    def __init__(self, file: IO[bytes], path: Path, compress: bool) -> None:
        self._file = file
        self._path = path
        self._compression = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
        self._zip = zipfile.ZipFile(file, "w", self._compression)

    def add(
        self, key: str, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]
    ) -> None:
        """Writes an array.

        Args:
            key: Its name.
            dtype: Its dtype.
            shape: Its shape.
            blocks: Its elements in C order, in contiguous arrays.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        start = io.BytesIO()
        np.lib.format.write_array_header_1_0(start, header)
        with self._entry(key) as entry:
            self._write(entry, start.getvalue())
            for block in blocks:
                if block.size:
                    self._write(entry, block.reshape(-1).view(np.uint8).data)

    def add_value(self, key: str, value: np.ndarray | None) -> None:
        """Writes a small array, or ``None`` as Chainer does.

        Args:
            key: Its name.
            value: The array, not of objects.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        if value is None:
            with self._entry(key) as entry:
                self._write(entry, NONE)
        else:
            self.add(key, value.dtype, value.shape, [np.ascontiguousarray(value)])

    @contextlib.contextmanager
    def _entry(self, key: str) -> Iterator[IO[bytes]]:
        info = zipfile.ZipInfo(key + ".npy")
        info.compress_type = self._compression
        info.external_attr = 0o600 << 16
        with naming(self._path, "written"):
            entry = self._zip.open(info, "w", force_zip64=True)
        try:
            # Outside of `naming`: blocks come from other files.
            yield entry
        except BaseException:
            with contextlib.suppress(OSError):
                entry.close()
            raise
        with naming(self._path, "written"):
            entry.close()

    def _write(self, entry: IO[bytes], data: bytes | memoryview) -> None:
        with naming(self._path, "written"):
            entry.write(data)

    def finish(self) -> None:
        """Brings everything to the disk.

        Raises:
            OSError: If the disk does not take it.
        """
        self._zip.close()
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; unless `finish` came first, it is not whole."""
        # ZipFile knows no other end than to write its directory, for which there may be no room.
        with contextlib.suppress(OSError):
            self._zip.close()
        with contextlib.suppress(OSError):
            self._file.close()


class Member(NamedTuple):
    """An array of an npz file.

    Attributes:
        key: Its name.
        dtype: Its dtype; that of objects if it is ``None``.
        shape: Its shape.
        transposed: Whether its elements are in Fortran's order.
        start: Where the first one is in the npy file.
        info: Its entry in the zip file.
    """

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    transposed: bool
    start: int
    info: zipfile.ZipInfo

    @property
    def is_none(self) -> bool:
        """Whether it is Chainer's ``None``."""
        return self.dtype.hasobject

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class NpzReader:
    """Reads an npz file that may be damaged or hostile.

    Args:
        path: The file.

    Attributes:
        path: The file.
        members: The arrays by key.

    Raises:
        CheckpointError: If it is missing, or no npz file, or holds something else than arrays of
            numbers and strings and ``None``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.ExitStack() as stack:
            with naming(path, "opened"):
                # Opening a pipe would wait for its other end.
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise CheckpointError(path, "is not a regular file")
                file = stack.enter_context(open(path, "rb"))
            with self._checking():
                self._zip = stack.enter_context(zipfile.ZipFile(file))
                # A damaged length may make it take an entry for a part of the one before.
                if len(self._zip.infolist()) != _count_of_entries(file):
                    raise zipfile.BadZipFile("its directory is damaged")
            self.members: dict[str, Member] = {}
            for info in self._zip.infolist():
                key = info.filename.removesuffix(".npy")
                if key in self.members or not info.filename.endswith(".npy"):
                    raise self.error(info.filename, "occurs twice, or is no npy file")
                with self._checking(key):
                    self.members[key] = self._member(key, info)
            self._stack = stack.pop_all()

    def __enter__(self) -> NpzReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def error(self, key: str, reason: str) -> CheckpointError:
        """An error about one of the arrays."""
        return CheckpointError(self.path, f"{shown(key)} {reason}")

    @contextlib.contextmanager
    def _checking(self, key: str | None = None) -> Iterator[None]:
        try:
            yield
        except (
            # Whatever zipfile raises: RuntimeError where a password is needed, ValueError for
            # names that are no text.
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
            EOFError,
            NotImplementedError,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:
            reason = f"cannot be read: {error or type(error).__name__}"
            if key is not None:
                raise self.error(key, reason) from error
            raise CheckpointError(self.path, reason) from error

    def _member(self, key: str, info: zipfile.ZipInfo) -> Member:
        if info.compress_type not in _COMPRESSIONS:
            raise self.error(key, "is compressed in a way that NumPy does not know")
        with self._zip.open(info) as file:
            begin = file.read(len(_MAGIC) + 2)
            length = int.from_bytes(begin[len(_MAGIC) :], "little")
            header = file.read(length)
            found = _HEADER.fullmatch(header)
            if not begin.startswith(_MAGIC) or len(header) != length or found is None:
                raise self.error(key, "has no header of a plain array")
            start = len(begin) + length
            name = found[1].decode("ascii", "replace")
            if name == "|O":
                if begin + header + file.read(len(max(_NONES, key=len))) not in _NONES:
                    raise self.error(
                        key,
                        "is an array of objects other than None: a pickle, which could execute "
                        "anything, and is never loaded",
                    )
                return Member(key, np.dtype(object), (), False, start, info)
            # The checksum is looked at where the file ends, to which nobody will read an empty one.
            if start == info.file_size:
                file.read(1)
        shape = tuple(int(text) for text in found[3].split(b",") if text)
        dtype = _dtype(name)
        if dtype is None or dtype.hasobject or not dtype.itemsize or len(shape) > MAX_DIMENSIONS:
            raise self.error(key, f"is an array of {shown(name)}, which a checkpoint cannot hold")
        nbytes = math.prod(length for length in shape if length) * dtype.itemsize
        if nbytes > LARGEST or start + math.prod(shape) * dtype.itemsize != info.file_size:
            raise self.error(
                key,
                f"has {info.file_size} bytes, which are not those of its {shape} elements of "
                f"{dtype}: it is damaged",
            )
        return Member(key, dtype, shape, found[2] == b"True" and len(shape) > 1, start, info)

    def value(self, key: str) -> np.ndarray | None:
        """Reads a small array as a whole; ``None`` if it is ``None``.

        Args:
            key: Its name.

        Raises:
            CheckpointError: If there is none of that name, or it is large, or damaged.
        """
        member = self.members.get(key)
        if member is None:
            raise self.error(key, "is missing")
        if member.is_none:
            return None
        if member.size * member.dtype.itemsize > _MAX_SMALL_BYTES:
            raise self.error(key, f"has {member.size} elements, which are too many for a value")
        order = "F" if member.transposed else "C"
        out = np.empty(member.size, member.dtype)
        with self._raw(member) as fill:
            fill(out)
        return out.reshape(member.shape, order=order)  # type: ignore[call-overload]

    @contextlib.contextmanager
    def stream(self, key: str, scratch: Path) -> Iterator[Fill]:
        """Opens an array, to be read from its start to its end in C order.

        Args:
            key: Its name. It is not ``None``.
            scratch: A directory with room for it, where it is put if it has to be transposed.

        Yields:
            What fills an array of its dtype with the next elements.

        Raises:
            CheckpointError: If it is damaged; at the latest where the context ends, which must be
                after the last element.
        """
        member = self.members[key]
        with self._raw(member) as fill:
            if not member.transposed or member.size == 0:
                yield fill
                return
            mapped = _in_file(member, fill, scratch)
            done = 0

            def next_of_mapped(out: np.ndarray) -> None:
                nonlocal done
                out[...] = mapped.flat[done : done + out.size]
                done += out.size

            yield next_of_mapped

    @contextlib.contextmanager
    def _raw(self, member: Member) -> Iterator[Fill]:
        """The elements in the order in which they are in the file."""
        with self._checking(member.key):
            file = self._zip.open(member.info)
        with file:

            def fill(out: np.ndarray) -> None:
                view = out.view(np.uint8).data
                with self._checking(member.key):
                    if file.readinto(view) != len(view):  # type: ignore[attr-defined]
                        raise EOFError("it ends too soon")
                if member.dtype == bool and out.view(np.uint8).max(initial=0) > 1:
                    raise self.error(member.key, "has elements that are not booleans")

            with self._checking(member.key):
                file.read(member.start)
            yield fill
            # The checksum is looked at where the file ends.
            with self._checking(member.key):
                if file.read(1):
                    raise EOFError("it goes on after its last element")


def _count_of_entries(file: IO[bytes]) -> int:
    """The number of entries that a zip file says it has, of which zipfile takes no notice."""
    file.seek(max(file.seek(0, os.SEEK_END) - _END_BYTES - _LARGE_END_BYTES, 0))
    data = file.read()
    end, large_end = data[-_END_BYTES:], data[:-_END_BYTES]
    if not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0"):
        raise zipfile.BadZipFile("it does not end with its directory")
    count = int.from_bytes(end[10:12], "little")
    if count == 0xFFFF and large_end.startswith(b"PK\6\6"):
        return int.from_bytes(large_end[32:40], "little")
    return count


def _in_file(member: Member, fill: Fill, scratch: Path) -> np.ndarray:
    """Puts an array that is in Fortran's order into a file, and maps that into memory."""
    count = max(CHUNK_BYTES // member.dtype.itemsize, 1)
    with naming(scratch, "written"), tempfile.TemporaryFile(dir=scratch) as file:
        for start in range(0, member.size, count):
            block = np.empty(min(count, member.size - start), member.dtype)
            fill(block)
            file.write(block.view(np.uint8).data)
        file.flush()
        return np.memmap(file, member.dtype, "r", shape=member.shape, order="F")


def _dtype(name: str) -> np.dtype | None:
    if _DTYPE.fullmatch(name) is None:
        return None
    try:
        return np.dtype(name)
    except TypeError:
        return None
