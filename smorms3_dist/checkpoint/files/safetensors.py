"""Files in the safetensors format: written as a stream, read by ranges of elements.

Such a file is the length of its header (8 bytes, little-endian), the header (JSON, for each tensor
its dtype, shape and place in the data) and the data, without gaps. The header is padded with spaces
so that the data start at a multiple of 64 bytes, and tensors with larger elements come first, so
that every tensor is aligned to its elements.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smorms3_dist.checkpoint.files.blocks import BLOCK_BYTES, SummedReader, SummedWriter, Sums
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.strict_json import LARGEST, parse, shown

import numpy as np

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's reference implementation: room for about a million tensors."""

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""The dtypes that are stored, by their names in the format."""

_MAX_DIMENSIONS = 32  # of NumPy 1

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_ALIGNMENT = 64
_LENGTH_BYTES = 8


class Tensor(NamedTuple):
    """A tensor of a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def write_safetensors(
    path: Path,
    arrays: Mapping[str, np.ndarray | Sequence[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Sums:
    """Writes arrays into a new file, and brings it to the disk.

    Args:
        path: The file, which must not exist.
        arrays: The arrays by name, of any shape and byte order; or parts of one dimension of an
            array, which lie one behind the other in the file. They are not copied, unless their
            elements do not lie one behind the other.
        metadata: Strings to keep in the header.
        block_bytes: Bytes of a block that has a checksum of its own.

    Raises:
        CheckpointError: If the file cannot be written.
        ValueError: If a name is not possible, or a dtype cannot be stored.
    """
    tensors = {name: [a] if isinstance(a, np.ndarray) else a for name, a in arrays.items()}
    ordered = sorted(tensors.items(), key=lambda item: -item[1][0].dtype.itemsize)
    forms = (
        (name, p[0].dtype, p[0].shape if len(p) == 1 else (sum(part.size for part in p),))
        for name, p in ordered
    )
    header = header_of(forms, metadata or {})
    with SummedWriter(path, block_bytes) as writer:
        writer.write(header)
        for part in (part for _, parts in ordered for part in parts):
            little = np.ascontiguousarray(part, part.dtype.newbyteorder("<"))
            writer.write(little.reshape(-1).view(np.uint8).data)
        return writer.finish()


def header_of(
    tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The beginning of a file, which is followed by the tensors' elements.

    Args:
        tensors: The name, dtype and shape of each tensor; those with larger elements first.
        metadata: Strings to keep.

    Raises:
        ValueError: If a name is not possible, or a dtype cannot be stored.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        code = _CODES.get(dtype.newbyteorder("<"))
        if code is None:
            raise ValueError(f"the tensor {name} has dtype {dtype}, which cannot be stored")
        if name == _METADATA:
            raise ValueError(f"no tensor can be named {name}: the format has that for itself")
        stop = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(entries)} tensors are too many for one file")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


class SafetensorsReader:
    """Reads ranges of the tensors of a file.

    Args:
        path: The file.
        sums: Its checksums. Without them, only the header is checked.
        origin: Whose file it is, in words, for errors.

    Attributes:
        metadata: The strings in the header.
        tensors: The tensors by name, in the order of their data.

    Raises:
        CheckpointError: If it is missing, or its header is damaged or not valid.
    """

    def __init__(self, path: Path, sums: Sums | None = None, origin: str = "") -> None:
        self._reader = SummedReader(path, sums, origin)
        try:
            self.metadata, self.tensors = self._read_header()
        except BaseException:
            self._reader.close()
            raise

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. It may be called again."""
        self._reader.close()

    def _read_header(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        size = self._reader.size
        if size < _LENGTH_BYTES:
            raise self._reader.error(f"has {size} bytes, which is too short for a header")
        length = int.from_bytes(self._bytes(0, _LENGTH_BYTES), "little")
        if length > min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
            raise self._reader.error(
                f"its header is said to have {length} bytes; the file has {size} and the limit is "
                f"{MAX_HEADER_BYTES}"
            )
        header = self._bytes(_LENGTH_BYTES, length)
        start = _LENGTH_BYTES + length
        try:
            return _parse_header(header, str(self._reader.path), start, size - start)
        except CheckpointError as error:
            raise self._reader.error(error.reason) from None

    def _bytes(self, start: int, count: int) -> bytearray:
        data = bytearray(count)
        self._reader.read(start, memoryview(data))
        return data

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Reads a range of a tensor's elements, in C order.

        Args:
            name: The tensor.
            start: First element.
            stop: One past the last element.
            out: Where they go: a C-contiguous array of ``stop - start`` elements of the tensor's
                dtype. If this raises, it holds no damaged elements, but may be half filled.

        Raises:
            CheckpointError: If there is no such tensor, or the file is damaged there.
            ValueError: If the range is not within the tensor, or ``out`` does not fit.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise self._reader.error(f"has no tensor {shown(name)}")
        if not 0 <= start <= stop <= tensor.size:
            raise ValueError(f"{name} has {tensor.size} elements, not {start} to {stop}")
        if out.dtype != tensor.dtype or out.size != stop - start or not out.flags.c_contiguous:
            raise ValueError(
                f"{stop - start} elements of {tensor.dtype} of {name} cannot be read into an array "
                f"of {out.size} of {out.dtype}, or one that is not C-contiguous"
            )
        if out.size == 0:
            return
        # Elements that are no booleans would be booleans that are neither true nor false.
        target = np.empty(out.size, np.uint8) if tensor.dtype == bool else out
        view = target.reshape(-1).view(np.uint8).data
        self._reader.read(tensor.offset + start * tensor.dtype.itemsize, view)
        if target is not out:
            if target.max() > 1:
                raise self._reader.error(f"{shown(name)} has elements that are not booleans")
            out.reshape(-1)[...] = target


def _parse_header(
    header: bytearray, path: str, start: int, size: int
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Checks a header against the bytes of data that there are, from byte ``start`` on."""
    # As the format wants it, so that nothing else passes for it.
    if header[:1] != b"{":
        raise CheckpointError(
            path, "its header does not start with a brace: not a safetensors file"
        )
    entries = parse(header, path)
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise CheckpointError(path, f"{_METADATA} is {shown(metadata)}, which are not all strings")
    found = []
    for name, entry in entries.items():
        tensor, (first, last) = _parse_entry(entry)
        if tensor is None or last > size:
            raise CheckpointError(
                path,
                f"tensor {shown(name)} is {shown(entry)}, which is no tensor within the file's "
                f"{size} bytes of data",
            )
        found.append((first, last, name, tensor._replace(offset=start + first)))
    found.sort(key=lambda item: item[:2])
    end = 0
    for first, last, name, _ in found:
        if first != end:
            raise CheckpointError(
                path,
                f"tensor {shown(name)} starts at byte {first} of the data, where the one before it "
                f"ends at {end}",
            )
        end = last
    if end != size:
        raise CheckpointError(path, f"its tensors have {end} bytes, and its data {size}")
    return metadata, {name: tensor for _, _, name, tensor in found}


def _parse_entry(entry: Any) -> tuple[Tensor | None, tuple[int, int]]:
    """A tensor as the header has it, and its range of the data; no tensor if that is none."""
    wrong = None, (0, 0)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return wrong
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if any(type(number) is not int or number < 0 for number in numbers) or len(offsets) != 2:
        return wrong
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    # All lengths but zeros count: NumPy has no larger arrays, even if they are empty.
    too_large = math.prod(length for length in shape if length) > LARGEST // 8
    if dtype is None or too_large or len(shape) > _MAX_DIMENSIONS:
        return wrong
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        return wrong
    return Tensor(dtype, tuple(shape), 0), (offsets[0], offsets[1])
