"""Manifests as JSON: laid out for people, sealed with a checksum, and checked field by field.

The last field is a checksum of all text before it, so that no byte can change unnoticed. The
fields ``format``, ``version`` and that one are the same in all versions.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files.blocks import SummedReader, Sums
from smorms3_dist.checkpoint.files.errors import CheckpointError, NewerVersionError
from smorms3_dist.checkpoint.files.manifest import (
    Array,
    FileRecord,
    Manifest,
    Parameter,
    Place,
    Segment,
    Value,
)
from smorms3_dist.checkpoint.files.safetensors import DTYPES
from smorms3_dist.checkpoint.files.strict_json import Fields, parse, shown

import xxhash

NAME = "manifest.json"
"""The manifest's name in the directory of its step."""

FORMAT = "smorms3_dist checkpoint"
VERSION = 1

MAX_BYTES = 256 << 20
"""Largest manifest. A hundred thousand parameters with four arrays each make about 60 MB, the
checksums of the blocks of ten terabytes 50 MB; reading takes some ten times as much memory."""

_MAX_BLOCK_BYTES = 64 << 20
"""A reader has memory for one block of a file."""

_SEAL = ',\n "checksum": "%s"\n}\n'
_SEALED = re.compile(rb',\n "checksum": "([0-9a-f]{16})"\n\}\n')
_SEAL_BYTES = len(_SEAL % ("0" * 16))

_TIME = "%Y-%m-%dT%H:%M:%SZ"
_SUM = re.compile("[0-9a-f]{16}")
# No directories, nothing hidden, nothing that a shell or another file system reads otherwise.
_PATH = re.compile("[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_NOT_FINITE = ("inf", "-inf", "nan")
_CONTAINERS = (dict, list, tuple)
_encode = json.JSONEncoder(allow_nan=False).encode
_DTYPE_NAMES = frozenset(dtype.name for dtype in DTYPES.values())

_MANIFEST_FIELDS = tuple(field.name for field in dataclasses.fields(Manifest))
_PARAMETER_FIELDS = tuple(field.name for field in dataclasses.fields(Parameter))
_FILE_FIELDS = ["path", "kind", "rank", "host", "size", "xxh3", "block_bytes", "blocks", "segments"]


def now() -> str:
    """The time in UTC, to the second, as manifests give it: ``2026-01-31T23:59:59Z``."""
    return datetime.datetime.now(datetime.timezone.utc).strftime(_TIME)


def dump(manifest: Manifest) -> bytes:
    """A manifest as text.

    Args:
        manifest: The manifest.

    Raises:
        CheckpointError: If it could not be read again; the reason names the field.
    """
    fields = {"format": FORMAT, "version": VERSION, **_json_of_manifest(manifest)}
    try:
        parts = (f" {_encode(name)}: {_lay_out(value, 1)}" for name, value in fields.items())
        body = ("{\n" + ",\n".join(parts)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(NAME, f"cannot be written as JSON: {error}") from error
    data = body + (_SEAL % xxhash.xxh3_64_hexdigest(body)).encode()
    load(data, NAME)
    return data


def read(path: Path) -> Manifest:
    """Reads the file of a manifest.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is missing, damaged, not valid, or of a newer version.
    """
    with SummedReader(path) as reader:
        if reader.size > MAX_BYTES:
            raise reader.error(f"has {reader.size} bytes; the limit is {MAX_BYTES}")
        data = bytearray(reader.size)
        reader.read(0, memoryview(data))
    return load(data, str(path))


def load(data: bytes | bytearray, path: str) -> Manifest:
    """Reads the text of a manifest.

    Args:
        data: The text.
        path: The file it is from, for errors.

    Raises:
        CheckpointError: If it is damaged, not valid, or of a newer version.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(path, f"has {len(data)} bytes; the limit is {MAX_BYTES}")
    body = memoryview(data)[: max(len(data) - _SEAL_BYTES, 0)]
    seal = _SEALED.fullmatch(data, len(body))
    if seal is None:
        raise CheckpointError(path, "does not end with its checksum: cut off, or no manifest")
    if xxhash.xxh3_64_hexdigest(body).encode() != seal[1]:
        raise CheckpointError(path, "is damaged: its checksum is wrong")
    fields = parse(data, path)
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(path, f"is no manifest: its format is not {FORMAT!r}")
    version = fields.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(path, f"its version is {shown(version)}, which never existed")
    if version > VERSION:
        raise NewerVersionError(
            path,
            f"has version {version} of the format, and this smorms3_dist reads up to {VERSION}: "
            "update the package",
        )
    for name in ("format", "version", "checksum"):
        fields.pop(name, None)
    return _manifest(fields, path)


def _lay_out(value: Any, depth: int) -> str:
    """JSON with what holds containers over several lines, everything else in one."""
    if not isinstance(value, _CONTAINERS):
        return _encode(value)
    members = value.values() if isinstance(value, dict) else value
    nested = any(isinstance(member, _CONTAINERS) for member in members)
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"the key {shown(name)} is not a string")
        parts = [f"{_encode(name)}: {_lay_out(v, depth + 1)}" for name, v in value.items()]
        opened, closed = "{}"
    elif nested:
        parts = [_lay_out(member, depth + 1) for member in value]
        opened, closed = "[]"
    else:
        return _encode(value)
    if not nested:
        return opened + ", ".join(parts) + closed
    margin = "\n" + " " * depth
    return opened + ",".join(f"{margin} {part}" for part in parts) + margin + closed


def _json_of_manifest(manifest: Manifest) -> dict[str, Any]:
    scale = manifest.loss_scale
    special: dict[str, Any] = {
        "hyperparameters": _json_of_values(manifest.hyperparameters),
        "loss_scale": None if scale is None else _json_of_values(scale),
        "parameters": [
            {name: getattr(parameter, name) for name in _PARAMETER_FIELDS}
            | {"hyperparameters": _json_of_values(parameter.hyperparameters)}
            for parameter in manifest.parameters
        ],
        "files": [
            {
                "path": file.path,
                "kind": file.kind,
                "rank": file.rank,
                "host": file.host,
                "size": file.sums.size,
                "xxh3": file.sums.xxh3,
                "block_bytes": file.sums.block_bytes,
                "blocks": file.sums.blocks,
                "segments": file.segments,
            }
            for file in manifest.files
        ],
    }
    return {
        name: special[name] if name in special else getattr(manifest, name)
        for name in _MANIFEST_FIELDS
    }


def _json_of_values(values: Mapping[str, Value]) -> dict[str, Any]:
    """JSON has no infinite numbers, but a limit on a learning rate may well be one."""
    return {
        name: {"float": str(float(value))}
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in values.items()
    }


def _values(fields: Fields, name: str) -> dict[str, Value]:
    values = {}
    for key, value in fields.mapping(name).items():
        if value in [{"float": text} for text in _NOT_FINITE]:
            value = float(value["float"])
        elif isinstance(value, dict | list):
            raise fields.error(name, f"has {shown(value)} for {shown(key)}, which is not one value")
        values[key] = value
    return values


def _manifest(value: Any, path: str) -> Manifest:
    fields = Fields(value, path, "", _MANIFEST_FIELDS)
    created = fields.text("created")
    try:
        datetime.datetime.strptime(created, _TIME)
    except ValueError:
        raise fields.error("created", f"is {shown(created)} and not a time as in {now()}") from None
    world_size = fields.integer("world_size", 1)
    manifest = Manifest(
        step=fields.integer("step"),
        t=fields.integer("t"),
        epoch=fields.integer("epoch"),
        world_size=world_size,
        local=fields.boolean("local"),
        created=created,
        versions=fields.texts("versions"),
        hyperparameters=_values(fields, "hyperparameters"),
        loss_scale=None if fields.is_null("loss_scale") else _values(fields, "loss_scale"),
        notes=fields.mapping("notes"),
        parameters=tuple(
            _parameter(parameter, path, f"parameters[{index}]")
            for index, parameter in enumerate(fields.list("parameters"))
        ),
        files=tuple(
            _file(file, path, f"files[{index}]", world_size)
            for index, file in enumerate(fields.list("files"))
        ),
    )
    _check_agreement(manifest, fields)
    return manifest


def _parameter(value: Any, path: str, where: str) -> Parameter:
    fields = Fields(value, path, where, _PARAMETER_FIELDS)
    states = fields.texts("states")
    for state, dtype in states.items():
        if dtype not in _DTYPE_NAMES:
            raise fields.error("states", f"has the dtype {shown(dtype)} for {shown(state)}")
    return Parameter(
        name=fields.text("name"),
        shape=fields.shape("shape"),
        dtype=fields.choice("dtype", _DTYPE_NAMES),
        update=fields.text("update"),
        states=states,
        master=None if fields.is_null("master") else fields.choice("master", _DTYPE_NAMES),
        rule_t=fields.integer("rule_t"),
        hyperparameters=_values(fields, "hyperparameters"),
    )


def _file(value: Any, path: str, where: str, world_size: int) -> FileRecord:
    fields = Fields(value, path, where, _FILE_FIELDS)
    size = fields.integer("size")
    block_bytes = fields.integer("block_bytes", 1, _MAX_BLOCK_BYTES)
    blocks = fields.list("blocks")
    if len(blocks) != -(-size // block_bytes):
        raise fields.error("blocks", f"has {len(blocks)} checksums for {size} bytes")
    for block in blocks:
        if not isinstance(block, str) or _SUM.fullmatch(block) is None:
            raise fields.error("blocks", f"has {shown(block)}, which is no checksum")
    name = fields.text("path", _PATH)
    if name == NAME:
        raise fields.error("path", "is that of the manifest itself")
    kind = fields.choice("kind", ("shard", "rank"))
    segments = tuple(_segment(segment, fields) for segment in fields.list("segments"))
    if kind == "rank" and segments:
        raise fields.error("segments", "is not empty, and the file is no shard")
    return FileRecord(
        path=name,
        kind=kind,
        rank=fields.integer("rank", 0, world_size - 1),
        host=fields.text("host"),
        sums=Sums(size, fields.text("xxh3", _SUM), block_bytes, tuple(blocks)),
        segments=segments,
    )


def _segment(value: Any, fields: Fields) -> Segment:
    """Checks the types only: whether it is a range of an array is seen by the coverage."""
    if isinstance(value, list) and len(value) == 6:
        tensor, kind, state, parameter, start, stop = value
        if (
            isinstance(tensor, str)
            and kind in ("param", "master", "state")
            and (isinstance(state, str) if kind == "state" else state is None)
            and isinstance(parameter, str)
            and type(start) is int
            and type(stop) is int
        ):
            return Segment(tensor, kind, state, parameter, start, stop)
    raise fields.error(
        "segments", f"has {shown(value)} instead of [tensor, kind, state, parameter, start, stop]"
    )


def _check_agreement(manifest: Manifest, fields: Fields) -> None:
    """Checks that names are unique, and that each array is covered exactly once."""
    if len(manifest.sizes) != len(manifest.parameters):
        raise fields.error("parameters", "names a parameter twice")
    if len({file.path for file in manifest.files}) != len(manifest.files):
        raise fields.error("files", "names a file twice")
    of_ranks = [file.rank for file in manifest.files if file.kind == "rank"]
    if len(set(of_ranks)) != len(of_ranks):
        raise fields.error("files", "has two files of kind rank for one rank")
    for file in manifest.files:
        if len({segment.tensor for segment in file.segments}) != len(file.segments):
            raise fields.error("files", f"has a tensor twice in {file.path}")
        for segment in file.segments:
            if segment.array not in manifest.dtypes:
                raise fields.error(
                    "files", f"has a segment of an unknown array in {file.path}: {shown(segment)}"
                )
    for array, places in manifest.places.items():
        _check_coverage(array, places, manifest.sizes[array.parameter], fields)


def _check_coverage(array: Array, places: tuple[Place, ...], size: int, fields: Fields) -> None:
    end = 0
    for place in places:
        if place.start != end or place.stop <= place.start:
            raise fields.error(
                "files",
                f"has {array} from element {place.start} to {place.stop}, where a range "
                f"that starts at {end} must come",
            )
        end = place.stop
    if end != size:
        raise fields.error("files", f"has {array} up to element {end} of {size}")
