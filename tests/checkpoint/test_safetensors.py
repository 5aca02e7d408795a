"""Safetensors files: what is written is read, by us and by the library, and nothing else is."""

from __future__ import annotations

import errno
import gc
import json
import os
import tracemalloc
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


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape)
        assert array.tobytes() == theirs[name].tobytes()


def with_header(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with a header of any content."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    sums = write(tmp_path / "f", example(), rank="3", text="é")
    for checked in (sums, None):
        with SafetensorsReader(tmp_path / "f", checked) as reader:
            assert reader.metadata == {"rank": "3", "text": "é"}
            assert_same(read(reader), example())


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "none", {})
    assert safetensors.numpy.load_file(tmp_path / "none") == {}
    write(tmp_path / "f", example(), rank="3")
    assert_same(safetensors.numpy.load_file(tmp_path / "f"), example())
    with safetensors.safe_open(tmp_path / "f", "np") as file:
        assert file.metadata() == {"rank": "3"}


def test_data_are_aligned(tmp_path: Path) -> None:
    for length in range(70):
        path = tmp_path / str(length)
        write(path, {"x" * length: np.ones(3, np.int8), "y": np.ones(3), "z": np.ones(1, "f2")})
        with SafetensorsReader(path) as reader:
            assert min(tensor.offset for tensor in reader.tensors.values()) % 64 == 0
            for tensor in reader.tensors.values():
                assert tensor.offset % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_checksums_are_those_of_the_file(tmp_path: Path, block_bytes: int) -> None:
    sums = write(tmp_path / "f", example(), block_bytes)
    data = (tmp_path / "f").read_bytes()
    blocks = [data[start : start + block_bytes] for start in range(0, len(data), block_bytes)]
    assert sums.size == len(data)
    assert sums.xxh3 == xxhash.xxh3_64_hexdigest(data)
    assert sums.blocks == tuple(xxhash.xxh3_64_hexdigest(block) for block in blocks)


@pytest.mark.parametrize("block_bytes", [1000, 3 << 20])
def test_bytes_are_written_in_order_however_many_at_once(tmp_path: Path, block_bytes: int) -> None:
    piece = 1 << 20  # up to which bytes are gathered
    sizes = [0, 1, 0, piece - 1, 1, 5, piece - 4, piece, 3, piece + 1, 7, 3 * piece + 9, 11, 0]
    random = np.random.default_rng(0)
    parts = [random.bytes(size) for size in sizes]
    with SummedWriter(tmp_path / "f", block_bytes) as writer:
        for part in parts:
            writer.write(part)
        sums = writer.finish()
    data = b"".join(parts)
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
    tracemalloc.start()
    try:
        sums = write(tmp_path / "f", {"x": array}, 1 << 20)
        out = np.empty(1 << 18, np.float32)
        with SafetensorsReader(tmp_path / "f", sums) as reader:
            for start in range(0, array.size, out.size):
                reader.read("x", start, start + out.size, out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
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


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"/f: cannot be made: File exists"):
        write(tmp_path / "f", {})
    assert (tmp_path / "f").read_bytes() == b"mine"


def test_any_range_is_read(tmp_path: Path) -> None:
    arrays = {"a": np.arange(50, dtype="f4"), "b": np.arange(50, dtype="i2")}
    sums = write(tmp_path / "f", arrays, 32)
    with SafetensorsReader(tmp_path / "f", sums) as reader:
        for name, array in arrays.items():
            for start in range(51):
                for stop in range(start, 51):
                    out = np.full(stop - start, -1, array.dtype)
                    reader.read(name, start, stop, out)
                    np.testing.assert_array_equal(out, array[start:stop])


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
        offset = reader.tensors["x"].offset
        assert offset == 128
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
    data = bytearray((tmp_path / "f").read_bytes())
    damaged = len(data) // 2
    data[damaged] ^= 16
    (tmp_path / "f").write_bytes(data)
    with SafetensorsReader(tmp_path / "f", sums, "of rank 3 on host b") as reader:
        first = (damaged // 64 * 64 - reader.tensors["x"].offset) // 4
        out = np.zeros(values.size, "f4")
        for _ in range(2):
            with pytest.raises(
                CheckpointError,
                match=rf"/f: is damaged: wrong checksum of the bytes {damaged // 64 * 64} to "
                rf"{damaged // 64 * 64 + 63} \(of rank 3 on host b\)",
            ):
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
        (b"", "does not start with a brace"),
        (b" {}", "does not start with a brace"),
        (b"[]", "does not start with a brace"),
        (b"{", "its JSON is not valid"),
        (b'{"\xff": 1}', "its JSON is not valid"),
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
        (
            {**entry(), "y": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}},
            "tensor 'y' starts at byte 3 of the data, where the one before it ends at 4",
        ),
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
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"said to have {length} bytes"):
            SafetensorsReader(tmp_path / "f")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_elements_that_are_no_booleans_are_refused(tmp_path: Path) -> None:
    path = with_header(tmp_path / "f", entry(dtype="BOOL"), b"\0\1\2\1")
    with SafetensorsReader(path) as reader:
        out = np.zeros(2, bool)
        reader.read("x", 0, 2, out)
        assert out.tolist() == [False, True]
        with pytest.raises(CheckpointError, match="'x' has elements that are not booleans"):
            reader.read("x", 1, 3, out)
        assert out.tolist() == [False, True]


def test_a_truncated_file_is_refused_at_any_length(tmp_path: Path) -> None:
    sums = write(tmp_path / "f", {"x": np.arange(18, dtype="f4")})
    for length in reversed(range(sums.size)):
        os.truncate(tmp_path / "f", length)
        with pytest.raises(CheckpointError, match=f"has {length} bytes, and {sums.size} were"):
            SafetensorsReader(tmp_path / "f", sums)
        with pytest.raises(
            CheckpointError, match=r"too short|is said to have|no tensor within the"
        ):
            SafetensorsReader(tmp_path / "f")


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
    header = {
        "zeros": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        "last": {"dtype": "F64", "shape": [3], "data_offsets": [size, size + 24]},
    }
    path = with_header(tmp_path / "f", header)
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
        first = xxhash.xxh3_64_hexdigest(file.read(block))
        file.seek(total // block * block)
        last = xxhash.xxh3_64_hexdigest(file.read())
    zeros = xxhash.xxh3_64_hexdigest(bytes(block))
    sums = Sums(total, "0" * 16, block, (first, *[zeros] * (total // block - 1), last))
    for checked in (None, sums):
        with SafetensorsReader(path, checked) as reader:
            out = np.zeros(2)
            reader.read("last", 1, 3, out)
            assert out.tolist() == [2, 3]
            middle = np.ones(10, np.uint8)
            reader.read("zeros", (1 << 31) - 5, (1 << 31) + 5, middle)
            assert not middle.any()


def test_a_writer_that_is_left_early_leaves_no_open_file(tmp_path: Path) -> None:
    gc.collect()  # what other tests have left may be closed at any time
    before = os.listdir("/proc/self/fd")
    with pytest.raises(KeyError), SummedWriter(tmp_path / "f") as writer:
        writer.write(b"abc")
        raise KeyError
    assert os.listdir("/proc/self/fd") == before
