"""Checkpoints to test with: a small model, saved by any number of ranks of this one process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files import (
    CheckpointDirectory,
    Chunk,
    FileRecord,
    Manifest,
    ParameterGroup,
    StepReader,
    new_token,
    write_rank,
    write_shard,
)
from smorms3_dist.checkpoint.files.manifest import Array, GroupLine
from smorms3_dist.checkpoint.files.manifest_json import now
from smorms3_dist.layout import FlatLayout, ParameterSpec

import numpy as np
import xxhash

Model = dict[Array, np.ndarray]


def example(seed: int = 0) -> Model:
    """Parameters of 0, 1, 3, 7 and 4000 elements, in three dtypes, one with a master."""
    random = np.random.default_rng(seed)
    shapes = {"/empty": (3, 0), "/scale": (), "/l1/b": (3,), "/l1/half": (7,), "/l1/W": (40, 100)}
    states = [("state", key) for key in ("g", "g2", "mem")]
    model = {}
    for name, shape in shapes.items():
        dtype = {"/scale": "f8", "/l1/half": "f2"}.get(name, "f4")
        masters = [("master", None)] if dtype == "f2" else []
        for kind, key in [("param", None), *masters, *states]:
            values = np.asarray(random.standard_normal(shape))
            kept = "f4" if dtype == "f2" and kind != "param" else dtype
            model[Array(name, kind, key)] = values.astype(kept)
    return model


def tiny(seed: int = 0) -> Model:
    """One parameter with one state, in a few bytes; of two ranks, each has a part."""
    random = np.random.default_rng(seed)
    kinds = [("param", None), ("state", "g")]
    return {
        Array("/W", kind, state): random.standard_normal(35).astype("f4") for kind, state in kinds
    }


def groups(model: Model) -> tuple[ParameterGroup, ...]:
    names: dict[tuple[Any, ...], list[str]] = {}
    for name in sorted({array.parameter for array in model}):
        alike = {(a.kind, a.state): v.dtype.name for a, v in model.items() if a.parameter == name}
        names.setdefault(tuple(alike.items()), []).append(name)
    return tuple(
        ParameterGroup(
            dtype=dict(alike)["param", None],
            update="SMORMS3Rule",
            states={str(state): dtype for (kind, state), dtype in alike if kind == "state"},
            master=dict(alike).get(("master", None)),
            names=tuple(members),
            shapes=tuple(model[Array(name, "param", None)].shape for name in members),
            rule_t=(3,) * len(members),
            hyperparameters={"/W": {"lr": 0.5}} if "/W" in members else {},
        )
        for alike, members in names.items()
    )


def chunks(model: Model, rank: int, world_size: int) -> Iterator[Chunk]:
    """What a rank owns."""
    for number, group in enumerate(groups(model)):
        # The layout of parameters of one dtype is as good as any.
        layout = FlatLayout(
            [
                ParameterSpec(n, s, "float32")
                for n, s in zip(group.names, group.shapes, strict=True)
            ],
            world_size,
            bucket_bytes=max(4096, max(values.size for values in model.values())),
        )
        starts = dict(zip(group.names, group.starts, strict=False))
        for segment in layout.groups[0].shards[rank].segments:
            name = segment.slot.name
            for array, values in model.items():
                if array.parameter == name:
                    part = values.reshape(-1)[segment.range_p]
                    line = GroupLine(number, array.kind, array.state)
                    yield Chunk(line, starts[name] + segment.start_p, [part])


def manifest(model: Model, step: int, world_size: int, files: tuple[FileRecord, ...]) -> Manifest:
    return Manifest(
        step=step,
        t=max(step - 1, 0),
        epoch=2,
        world_size=world_size,
        local=False,
        created=now(),
        versions={"smorms3_dist": "0.1.0", "numpy": np.__version__},
        hyperparameters={"lr": float("inf"), "eps": 1e-16, "amsgrad": False},
        loss_scale={"scale": 128.0, "interval": 2000},
        notes={"by": "a test", "list": [1, {"two": None}], "empty": {}},
        groups=groups(model),
        files=files,
    )


def host_of(rank: int) -> str:
    return f"node{rank // 2}"


def write_files(
    saving: Path, model: Model, world_size: int, block_bytes: int = 256
) -> tuple[FileRecord, ...]:
    records = []
    for rank in range(world_size):
        where = (saving, rank, host_of(rank))
        held = groups(model), chunks(model, rank, world_size)
        records.append(write_shard(*where, *held, {"rank": str(rank)}, block_bytes))
        rest = {"iterator/order": np.arange(rank + 3), "flag": np.array(True)}
        records.append(write_rank(*where, rest, {"epoch": "2"}, block_bytes))
    return tuple(records)


def save(
    directory: CheckpointDirectory,
    step: int,
    model: Model,
    world_size: int = 2,
    change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    block_bytes: int = 256,
) -> Path:
    """Saves a step as all ranks together do."""
    token = new_token()
    files = write_files(directory.begin(step, token), model, world_size, block_bytes)
    return directory.commit(token, change(manifest(model, step, world_size, files)))


def read_all(reader: StepReader) -> Model:
    """All arrays of a step, whole."""
    model = {}
    for parameter in reader.manifest.parameters:
        for array, dtype in parameter.arrays:
            out = np.full(parameter.shape, 77, dtype)
            reader.read(array, 0, out.size, out)
            model[array] = out
    return model


def assert_equal(ours: Mapping[Array, np.ndarray], theirs: Mapping[Array, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for array, values in ours.items():
        assert values.dtype == theirs[array].dtype, array
        np.testing.assert_array_equal(values, theirs[array], str(array))
        assert values.shape == theirs[array].shape, array


def edited(manifest: Manifest, **changes: Any) -> Manifest:
    return dataclasses.replace(manifest, **changes)


LEFT_OUT, TWICE = object(), object()
"""What `change_field` does with a field, in the place of giving it a value."""


def change_field(fields: Any, path: Sequence[Any], value: Any) -> None:
    """Changes the field of a manifest that stands at a path."""
    *way, name = path
    holder = functools.reduce(operator.getitem, way, fields)
    if value is LEFT_OUT:
        del holder[name]
    elif value is TWICE:
        holder[name].append(holder[name][0])
    else:
        holder[name] = value


def sealed(fields: Any) -> bytes:
    """Any JSON as a manifest with a right checksum."""
    fields = {key: value for key, value in fields.items() if key != "checksum"}
    body = json.dumps(fields)[:-1].encode()
    return body + f',\n "checksum": "{xxhash.xxh3_64_hexdigest(body)}"\n}}\n'.encode()


@contextlib.contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Fails if more memory is taken at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def flip(path: Path, position: int) -> None:
    """Flips a bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))
