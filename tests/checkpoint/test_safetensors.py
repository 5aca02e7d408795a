"""Safetensors files: what is written is read, by us and by the library, and nothing else is."""

from __future__ import annotations

import errno
import gc
import json
import os
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files.blocks import SummedWriter, Sums
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.safetensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    SafetensorsReader,
    write_safetensors,
)

import checkpoints
import numpy as np
import pytest
import safetensors.numpy
import xxhash


def write(
    path: Path, arrays: dict[str, np.ndarray], block_bytes: int = 128, **metadata: str
) -> Sums:
    return write_safetensors(path, arrays, metadata, block_bytes)


def read(reader: SafetensorsReader) -> dict[str, np.ndarray]:
    arrays = {}
    for name, tensor in reader.tensors.items():
        arrays[name] = np.empty(tensor.shape, tensor.dtype)
        reader.read(name, 0, tensor.size, arrays[name])
    return arrays


def example() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {
        f"{code} {size} é\n": (random.integers(0, 2, size) * 3).astype(dtype)
        for code, dtype in DTYPES.items()
        for size in (0, 1, 3, 7, 100)
    }
    return {**arrays, "scalar": np.array(2.5), "shaped": np.ones((2, 3, 4), np.float16)}


def with_header(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with a header of any content."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path: Path) -> None:
    write(tmp_path / "none", {})
    assert safetensors.numpy.load_file(tmp_path / "none") == {}
    sums = write(tmp_path / "f", example(), rank="3", text="é")
    found = [safetensors.numpy.load_file(tmp_path / "f")]
    with safetensors.safe_open(tmp_path / "f", "np") as file:
        assert file.metadata() == {"rank": "3", "text": "é"}
    for checked in (sums, None):
        with SafetensorsReader(tmp_path / "f", checked) as reader:
            assert reader.metadata == {"rank": "3", "text": "é"}
            found.append(read(reader))
    for arrays in found:
        assert arrays.keys() == example().keys()
        for name, array in example().items():
            assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
            assert arrays[name].tobytes() == array.tobytes()
    with pytest.raises(CheckpointError, match=r"/f: cannot be made: File exists"):
        write(tmp_path / "f", {})
    assert (tmp_path / "f").stat().st_size == sums.size


def test_data_are_aligned(tmp_path: Path) -> None:
    for length in range(70):
        path = tmp_path / str(length)
        write(path, {"x" * length: np.ones(3, np.int8), "y": np.ones(3), "z": np.ones(1, "f2")})
        with SafetensorsReader(path) as reader:
            assert min(tensor.offset for tensor in reader.tensors.values()) % 64 == 0
            for tensor in reader.tensors.values():
                assert tensor.offset % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("block_bytes", [1000, 3 << 20])
def test_bytes_are_written_in_order_however_many_at_once(tmp_path: Path, block_bytes: int) -> None:
    piece = 1 << 20  # up to which bytes are gathered
    sizes = [0, 1, 0, piece - 1, 1, 5, piece - 4, piece, 3, piece + 1, 7, 3 * piece + 9, 11, 0]
    data = np.random.default_rng(0).bytes(sum(sizes))
    ends = np.cumsum(sizes)
    with SummedWriter(tmp_path / "f", block_bytes) as writer:
        for end, size in zip(ends, sizes, strict=True):
            writer.write(data[end - size : end])
        sums = writer.finish()
    assert (tmp_path / "f").read_bytes() == data
    assert (sums.size, sums.xxh3) == (len(data), xxhash.xxh3_64_hexdigest(data))
    blocks = [data[start : start + block_bytes] for start in range(0, len(data), block_bytes)]
    assert sums.blocks == tuple(xxhash.xxh3_64_hexdigest(block) for block in blocks)


def test_views_of_any_kind_are_written(tmp_path: Path) -> None:
    whole = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    arrays = {
        "transposed": whole.T,
        "reversed": whole[::-1, :, ::-2],
        "broadcast": np.broadcast_to(whole[0, 0], (4, 5)),
        "strided": np.arange(1 << 19, dtype=np.float32).reshape(-1, 1)[::-1, [0, 0]].T[:, ::-1],
        "columns": np.arange(1 << 20, dtype=np.float64).reshape(-1, 4).T,
        "big-endian": whole.astype(">f4"),
        "read-only": np.frombuffer(whole.tobytes(), np.int16),
    }
    write(tmp_path / "f", arrays)
    with SafetensorsReader(tmp_path / "f") as reader:
        for name, array in read(reader).items():
            np.testing.assert_array_equal(array, arrays[name])


def test_writing_and_reading_take_bounded_memory(tmp_path: Path) -> None:
    array = np.arange(8 << 20, dtype=np.float32).reshape(2048, -1)
    with checkpoints.memory_below(4 << 20):
        sums = write(tmp_path / "f", {"x": array}, 1 << 20)
        out = np.empty(1 << 18, np.float32)
        with SafetensorsReader(tmp_path / "f", sums) as reader:
            for start in range(0, array.size, out.size):
                reader.read("x", start, start + out.size, out)
    assert out[-1] == array[-1, -1]


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        *(("x", dtype, "cannot be stored") for dtype in ("c8", "U3", "O")),
        ("__metadata__", "f4", "the format has that for itself"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    tmp_path: Path, name: str, dtype: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "f", {name: np.zeros(1, dtype)})
    assert not (tmp_path / "f").exists()


def test_only_the_blocks_of_a_range_are_read_and_each_is_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = write(tmp_path / "f", {"x": np.arange(1000, dtype="f4")}, 256)
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def noting(fd: int, buffers: list[Any], start: int) -> int:
        count = preadv(fd, buffers, start)
        reads.append((start, start + count))
        return count

    with SafetensorsReader(tmp_path / "f", sums) as reader:
        assert reader.tensors["x"].offset == 128
        monkeypatch.setattr(os, "preadv", noting)
        out = np.empty(10, "f4")
        reader.read("x", 300, 310, out)  # bytes 1328 to 1368: in the block from 1280
        assert reads == [(1280, 1536)]
        reader.read("x", 310, 320, out)  # the same block, which is still held
        assert reads == [(1280, 1536)]
        reader.read("x", 600, 610, out)  # bytes 2528 to 2568
        reader.read("x", 300, 310, out)  # checked before: only these bytes
        assert reads[1:] == [(2304, 2560), (2560, 2816), (1328, 1368)]
        np.testing.assert_array_equal(out, np.arange(300, 310))


def test_nothing_of_a_damaged_block_is_given_out(tmp_path: Path) -> None:
    values = np.arange(1, 200, dtype="f4")
    sums = write(tmp_path / "f", {"x": values}, 64)
    block = sums.size // 128 * 64
    checkpoints.flip(tmp_path / "f", block + 5)
    words = rf"/f: is damaged: wrong checksum of the bytes {block} to {block + 63} \(of rank 3 on b"
    with SafetensorsReader(tmp_path / "f", sums, "of rank 3 on b") as reader:
        first = (block - reader.tensors["x"].offset) // 4
        out = np.zeros(values.size, "f4")
        for _ in range(2):
            with pytest.raises(CheckpointError, match=words):
                reader.read("x", 0, values.size, out)
        np.testing.assert_array_equal(out[:first], values[:first])
        assert not out[first:].any()
        for start, stop in [(0, first), (first + 16, values.size)]:
            reader.read("x", start, stop, out[start:stop])
            np.testing.assert_array_equal(out[start:stop], values[start:stop])


def test_a_wrong_call_is_a_value_error(tmp_path: Path) -> None:
    write(tmp_path / "f", {"x": np.zeros(4, "f4")})
    with SafetensorsReader(tmp_path / "f") as reader:
        for start, stop in [(-1, 2), (0, 5), (3, 2)]:
            with pytest.raises(ValueError, match="x has 4 elements"):
                reader.read("x", start, stop, np.zeros(abs(stop - start), "f4"))
        for out in (np.zeros(2, "f8"), np.zeros(3, "f4"), np.zeros(4, "f4")[::2]):
            with pytest.raises(ValueError, match="2 elements of float32 of x cannot be read"):
                reader.read("x", 0, 2, out)
        with pytest.raises(CheckpointError, match="has no tensor 'y'"):
            reader.read("y", 0, 0, np.zeros(0))


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        *((header, "does not start with a brace") for header in (b"", b" {}", b"[]")),
        *((header, "its JSON is not valid") for header in (b"{", b'{"\xff": 1}')),
        (b'{"x": NaN}', "NaN is not a number"),
        (b'{"x": 1e999}', "too large"),
        (b'{"x": ' + b"1" * 5000 + b"}", "its JSON is not valid"),
        (b'{"a": {}, "a": {}}', "'a' occurs twice"),
        (b'{"a": ' + b"[" * 10**5, "nested too deeply"),
        (rb'{"\ud800": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}', "not valid"),
        ({"x": 3}, "tensor 'x' is 3, which is no tensor within the file's 4 bytes of data"),
        # What else is no tensor, test_fuzz.py finds out.
        (entry(dtype="U128"), "tensor 'x' is .*, which is no tensor within the file's 4 bytes"),
        (entry(shape=[1] * 33 + [4]), "which is no tensor"),
        (entry(shape=[2**62, 4, 0], data_offsets=[0, 0]), "which is no tensor"),
        (entry(data_offsets=[0, 5], shape=[5]), "which is no tensor"),
        ({}, "its tensors have 0 bytes, and its data 4"),
        (entry(data_offsets=[0, 3], shape=[3]), "its tensors have 3 bytes, and its data 4"),
        (entry(data_offsets=[1, 4], shape=[3]), "starts at byte 1 of the data, where .* ends at 0"),
        ({**entry(), "__metadata__": []}, "__metadata__ is .., which are not all strings"),
        ({**entry(), "__metadata__": {"a": 1}}, "__metadata__ is {'a': 1}"),
    ],
)
def test_a_header_that_is_not_valid_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    with_header(tmp_path / "f", header, b"\1" * 4)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsReader(tmp_path / "f", None, "of rank 2 on host a")
    assert caught.value.path == str(tmp_path / "f")
    assert caught.value.reason.endswith("(of rank 2 on host a)")
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("length", [100, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_the_length_of_a_header_is_checked_before_memory_is_taken(
    tmp_path: Path, length: int
) -> None:
    (tmp_path / "f").write_bytes(length.to_bytes(8, "little") + b"{}")
    os.truncate(tmp_path / "f", MAX_HEADER_BYTES + 100 if length == MAX_HEADER_BYTES + 1 else 10)
    with (
        checkpoints.memory_below(1 << 20),
        pytest.raises(CheckpointError, match=f"said to have {length} bytes"),
    ):
        SafetensorsReader(tmp_path / "f")


def test_elements_that_are_no_booleans_are_refused(tmp_path: Path) -> None:
    path = with_header(tmp_path / "f", entry(dtype="BOOL"), b"\0\1\2\1")
    with SafetensorsReader(path) as reader:
        out = np.zeros(2, bool)
        reader.read("x", 0, 2, out)
        assert out.tolist() == [False, True]
        with pytest.raises(CheckpointError, match="'x' has elements that are not booleans"):
            reader.read("x", 1, 3, out)
        assert out.tolist() == [False, True]


def test_a_truncated_file_is_refused_at_any_length_and_none_stays_open(tmp_path: Path) -> None:
    gc.collect()  # what other tests have left may be closed at any time
    before = os.listdir("/proc/self/fd")
    with pytest.raises(KeyError), SummedWriter(tmp_path / "left early") as writer:
        writer.write(b"abc")
        raise KeyError
    sums = write(tmp_path / "f", {"x": np.arange(18, dtype="f4")})
    for length in reversed(range(sums.size)):
        os.truncate(tmp_path / "f", length)
        with pytest.raises(CheckpointError, match=f"has {length} bytes, and {sums.size} were"):
            SafetensorsReader(tmp_path / "f", sums)
        with pytest.raises(
            CheckpointError, match=r"too short|is said to have|no tensor within the"
        ):
            SafetensorsReader(tmp_path / "f")
    assert os.listdir("/proc/self/fd") == before


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(CheckpointError, match="is not a regular file"):
            SafetensorsReader(path)
    with pytest.raises(CheckpointError, match=r"/none: cannot be opened .of rank 1.*No such file"):
        SafetensorsReader(tmp_path / "none", None, "of rank 1 on host a")


def test_offsets_of_more_than_32_bits(tmp_path: Path) -> None:
    block = 4 << 20
    size = 3 << 30
    zeros = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    last = {"dtype": "F64", "shape": [3], "data_offsets": [size, size + 24]}
    path = with_header(tmp_path / "f", {"zeros": zeros, "last": last})
    start = path.stat().st_size
    try:
        os.truncate(path, start + size)
    except OSError as error:
        assert error.errno in (errno.EFBIG, errno.ENOSPC)
        pytest.skip(f"no file of 3 GiB can be made here: {error}")
    with open(path, "ab") as file:
        file.write(np.array([1.0, 2.0, 3.0]).tobytes())
    total = start + size + 24
    with open(path, "rb") as file:
        parts = [file.read(block), bytes(block), os.pread(file.fileno(), block, total & -block)]
    head, middle, tail = map(xxhash.xxh3_64_hexdigest, parts)
    sums = Sums(total, "0" * 16, block, (head, *[middle] * (total // block - 1), tail))
    for checked in (None, sums):
        with SafetensorsReader(path, checked) as reader:
            out = np.zeros(2)
            reader.read("last", 1, 3, out)
            assert out.tolist() == [2, 3]
            nothing = np.ones(10, np.uint8)
            reader.read("zeros", (1 << 31) - 5, (1 << 31) + 5, nothing)
            assert not nothing.any()
