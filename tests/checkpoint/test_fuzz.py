"""Files of any content: a CheckpointError or a right read, in memory bounded by the file's size."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import Manifest
from smorms3_dist.checkpoint.files.safetensors import DTYPES, SafetensorsReader

import checkpoints
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

Result = TypeVar("Result")

EXAMPLES = settings(max_examples=250)

# What a field may be changed to.
odd = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([2**31, 2**32 + 4, 2**62, 2**63, 2**64, 10**19, 10**25, -(2**63)])
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["F32", "U8", "BOOL", "float32", "shard", "rank", "param", "/W", "a/b", ".."])
    | st.lists(st.integers(0, 5) | st.text(max_size=1), max_size=3)
    | st.dictionaries(st.sampled_from(["float", "dtype", "x"]), st.integers(0, 3), max_size=2)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything within a JSON value."""
    for key, member in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(member, dict | list):
            yield from places(member, (*path, key))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with up to three changes."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(value))
        if not paths:
            break
        *way, key = draw(st.sampled_from(paths))
        holder = value
        for step in way:
            holder = holder[step]
        action = draw(st.sampled_from(["set", "set", "add", "delete", "repeat", "key"]))
        if action == "set":
            holder[key] = draw(odd)
        elif action == "add" and isinstance(holder[key], int | float):
            holder[key] += draw(st.integers(-2, 2))
        elif action == "delete":
            del holder[key]
        elif action == "repeat" and isinstance(holder, list):
            holder.insert(draw(st.integers(0, len(holder))), holder[key])
        elif action == "key" and isinstance(holder, dict):
            holder[draw(st.text(max_size=3))] = holder.pop(key)
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with a few bytes changed, left out, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 8)))
        middle = draw(st.binary(max_size=4) | st.just(data[start:stop] * 2))
        data = data[:start] + middle + data[stop:]
    return data


def bounded(size: int, function: Callable[[], Result]) -> Result | None:
    """Calls a function. It may end in a CheckpointError; what it takes is bounded."""
    tracemalloc.start()
    try:
        return function()
    except CheckpointError as error:
        assert len(str(error)) < 1500
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Objects of Python take much more than their text does, but no more than this.
        assert peak < 100 * size + (1 << 18)


TENSORS = {
    "__metadata__": {"rank": "1"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "e": {"dtype": "F32", "shape": [0], "data_offsets": [24, 24]},
    "b": {"dtype": "BOOL", "shape": [3], "data_offsets": [24, 27]},
    "c": {"dtype": "I8", "shape": [], "data_offsets": [27, 28]},
}
DATA = bytes(28)


def with_header(text: bytes, data: bytes = DATA) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


headers = changed(TENSORS).map(lambda value: with_header(json.dumps(value).encode()))


@EXAMPLES
@given(
    st.binary(max_size=200)
    | st.binary(max_size=100).map(with_header)
    | headers
    | headers
    | damaged(with_header(json.dumps(TENSORS).encode()))
)
@example(with_header(json.dumps(TENSORS).encode()))
def test_a_safetensors_file_of_any_content(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)

    def read() -> dict[str, bytes]:
        found = {}
        with SafetensorsReader(path) as reader:
            for name, tensor in reader.tensors.items():
                out = np.empty(tensor.shape, tensor.dtype)
                assert out.nbytes <= len(content)
                reader.read(name, 0, tensor.size, out)
                found[name] = out.tobytes()
        return found

    found = bounded(len(content), read)
    if found is not None:
        # The library takes whatever we take, and finds the same in it.
        theirs = {name: tensor["data"] for name, tensor in safetensors.deserialize(content)}
        assert {name: bytes(data) for name, data in theirs.items()} == found


@EXAMPLES
@given(st.data())
def test_what_the_library_takes_of_our_dtypes_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "theirs"
    tensors = {}
    for name in data.draw(st.lists(st.text(max_size=5), unique=True, max_size=4)):
        dtype = data.draw(st.sampled_from([d for code, d in DTYPES.items() if code != "BOOL"]))
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        size = int(np.prod(shape)) * dtype.itemsize
        values = data.draw(st.binary(min_size=size, max_size=size))
        tensors[name] = np.frombuffer(values, dtype).reshape(shape)
    path.write_bytes(safetensors.numpy.save(tensors))
    with SafetensorsReader(path) as reader:
        assert reader.tensors.keys() == tensors.keys()
        for name, values in tensors.items():
            out = np.empty(values.shape, values.dtype)
            reader.read(name, 0, out.size, out)
            assert out.tobytes() == values.tobytes()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    model = checkpoints.tiny()
    files = checkpoints.write_files(tmp_path_factory.mktemp("files"), model, 2)
    return checkpoints.manifest(model, 12, 2, files)


@EXAMPLES
@given(st.data())
def test_bytes_of_any_content_as_a_manifest(manifest: Manifest, data: st.DataObject) -> None:
    valid = manifest_json.dump(manifest)
    content = data.draw(
        st.binary(max_size=300)
        | st.dictionaries(st.text(max_size=3), odd, max_size=4).map(checkpoints.sealed)
        | damaged(valid)
    )
    read = bounded(len(content), lambda: manifest_json.load(content, "m"))
    assert read is None or content == valid


@settings(max_examples=100)
@given(st.data())
def test_any_values_survive_in_a_manifest(manifest: Manifest, data: st.DataObject) -> None:
    number = st.integers(-(10**18), 10**18) | st.floats()
    text = st.text(st.characters(exclude_categories=["Cs"]))
    values = st.dictionaries(text, st.none() | st.booleans() | number | text, max_size=4)
    finite = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | text
    notes = st.recursive(
        finite, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=8
    )
    edited = checkpoints.edited(
        manifest,
        hyperparameters=data.draw(values),
        loss_scale=data.draw(st.none() | values),
        versions=data.draw(st.dictionaries(text, text, max_size=3)),
        notes=data.draw(st.dictionaries(text, notes, max_size=3)),
        t=data.draw(st.integers(0, 2**63 - 1)),
        created="2026-01-31T23:59:59Z",
    )
    read = manifest_json.load(manifest_json.dump(edited), "m")
    # As text: what is not a number is not equal to itself.
    assert str(dataclasses.astuple(read)) == str(dataclasses.astuple(edited))
