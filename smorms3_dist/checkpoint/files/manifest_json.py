"""Manifests as JSON: laid out for people, and sealed with a checksum.

The last field is a checksum of all text before it, so that no byte can change unnoticed. The
fields ``format``, ``version`` and that one are the same in all versions.

Version 2 has groups of parameters, column by column, and ranges of their lines. Version 1, which
`smorms3_dist.checkpoint.files.manifest_v1` reads, had a record for each parameter, and one for each
of its arrays and each rank.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files.blocks import SummedReader, Sums
from smorms3_dist.checkpoint.files.errors import CheckpointError, NewerVersionError
from smorms3_dist.checkpoint.files.manifest import (
    FileRecord,
    GroupLine,
    Manifest,
    ParameterGroup,
    StoredRange,
    Value,
)
from smorms3_dist.checkpoint.files.manifest_v1 import in_groups
from smorms3_dist.checkpoint.files.strict_json import parse, shown

import xxhash

NAME = "manifest.json"
"""The manifest's name in the directory of its step."""

FORMAT = "smorms3_dist checkpoint"
VERSION = 2

MAX_BYTES = 256 << 20
"""Largest manifest. The checksums of the blocks of ten terabytes make 250 MB, a million parameters
50 MB; reading takes some ten times as much memory."""

_SEAL = ',\n "checksum": "%s"\n}\n'
_SEALED = re.compile(rb',\n "checksum": "([0-9a-f]{16})"\n\}\n')
_SEAL_BYTES = len(_SEAL % ("0" * 16))

_CONTAINERS = (dict, list, tuple)
_LAID_OUT = 2
"""How many containers within each other are laid out over lines: lists of records, and records."""

_encode = json.JSONEncoder(allow_nan=False).encode


def now() -> str:
    """The time in UTC, to the second, as manifests give it: ``2026-01-31T23:59:59Z``."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def dump(manifest: Manifest) -> bytes:
    """A manifest as text.

    Raises:
        CheckpointError: If it could not be read again; the reason names the field.
    """
    fields = {"format": FORMAT, "version": VERSION, **_fields_of(manifest)}
    try:
        _check_keys(manifest.notes)
        parts = (f" {_encode(name)}: {_lay_out(value, 1)}" for name, value in fields.items())
        body = ("{\n" + ",\n".join(parts)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(NAME, f"cannot be written as JSON: {error}") from error
    data = body + (_SEAL % xxhash.xxh3_64_hexdigest(body)).encode()
    load(data, NAME)
    return data


def read(path: Path) -> Manifest:
    """Reads the file of a manifest; see `load`."""
    with SummedReader(path) as reader:
        if reader.size > MAX_BYTES:
            raise reader.error(f"has {reader.size} bytes; the limit is {MAX_BYTES}")
        data = bytearray(reader.size)
        reader.read(0, memoryview(data))
    return load(data, str(path))


def load(data: bytes | bytearray, path: str) -> Manifest:
    """Reads the text of a manifest.

    Raises:
        CheckpointError: If it is damaged, is of a newer version, or does not fit together.
    """
    body = memoryview(data)[: max(len(data) - _SEAL_BYTES, 0)]
    seal = _SEALED.fullmatch(data, len(body))
    if seal is None:
        raise CheckpointError(path, "does not end with its checksum: cut off, or no manifest")
    if xxhash.xxh3_64_hexdigest(body).encode() != seal[1]:
        raise CheckpointError(path, "is damaged: its checksum is wrong")
    fields = parse(data, path)
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise CheckpointError(path, f"is no manifest: its format is not {FORMAT!r}")
    version = fields.pop("version", None)
    if type(version) is not int or version < 1:
        raise CheckpointError(path, f"its version is {shown(version)}, which never existed")
    if version > VERSION:
        raise NewerVersionError(
            path,
            f"has version {version} of the format, and this smorms3_dist reads up to {VERSION}: "
            "update the package",
        )
    del fields["checksum"]
    try:
        manifest = _manifest(fields if version > 1 else in_groups(fields))
        disagreement = manifest.disagreement()
    except (TypeError, LookupError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(path, f"has a field that is not as it should be: {error}") from error
    if disagreement is not None:
        raise CheckpointError(path, disagreement)
    return manifest


def _check_keys(value: Any) -> None:
    """Refuses keys that are no strings, which JSON would make strings of."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"the key {shown(name)} is not a string")
    for member in value.values() if isinstance(value, dict) else value:
        if isinstance(member, _CONTAINERS):
            _check_keys(member)


def _lay_out(value: Any, depth: int) -> str:
    """JSON with a line for each field of a record, and for each record in a list of them."""
    members = value.values() if isinstance(value, dict) else value
    if not isinstance(value, _CONTAINERS) or depth > _LAID_OUT:
        return _encode(value)
    if not any(issubclass(kind, _CONTAINERS) for kind in set(map(type, members))):
        return _encode(value)
    if isinstance(value, dict):
        parts = [f"{_encode(name)}: {_lay_out(v, depth + 1)}" for name, v in value.items()]
        opened, closed = "{}"
    else:
        parts = [_lay_out(member, depth + 1) for member in value]
        opened, closed = "[]"
    margin = "\n" + " " * depth
    return opened + ",".join(f"{margin} {part}" for part in parts) + margin + closed


def _fields_of(record: Any) -> dict[str, Any]:
    """A dataclass as JSON: of a file, size and checksums are among its own fields."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        name, value = field.name, getattr(record, field.name)
        if isinstance(value, Sums):
            fields |= _fields_of(value)
        elif name == "hyperparameters" and isinstance(record, ParameterGroup):
            fields[name] = {parameter: _finite(own) for parameter, own in value.items()}
        elif name in ("hyperparameters", "loss_scale") and value is not None:
            fields[name] = _finite(value)
        elif name in ("groups", "files"):
            fields[name] = [_fields_of(each) for each in value]
        elif name == "ranges":
            fields[name] = [(tensor, *line, start, stop) for tensor, line, start, stop in value]
        else:
            fields[name] = value
    return fields


def _finite(values: dict[str, Value]) -> dict[str, Any]:
    """JSON has no infinite numbers, but a limit on a learning rate may well be one."""
    return {
        name: {"float": str(float(value))}
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in values.items()
    }


def _manifest(fields: dict[str, Any]) -> Manifest:
    """Undoes `_fields_of`. Nobody forges what is sealed: types are not checked one by one."""
    scale = fields.pop("loss_scale")
    return Manifest(
        hyperparameters=_values(fields.pop("hyperparameters")),
        loss_scale=None if scale is None else _values(scale),
        groups=tuple(_group(**each) for each in fields.pop("groups")),
        files=tuple(_file(**each) for each in fields.pop("files")),
        **fields,
    )


def _group(
    names: Any, shapes: Any, rule_t: Any, hyperparameters: Any, **fields: Any
) -> ParameterGroup:
    return ParameterGroup(
        names=tuple(names),
        shapes=tuple(map(tuple, shapes)),
        rule_t=tuple(rule_t),
        hyperparameters={name: _values(own) for name, own in hyperparameters.items()},
        **fields,
    )


def _file(
    size: Any, xxh3: Any, block_bytes: Any, blocks: Any, ranges: Any, **fields: Any
) -> FileRecord:
    stored = tuple(
        StoredRange(tensor, GroupLine(group, kind, state), start, stop)
        for tensor, group, kind, state, start, stop in ranges
    )
    sums = Sums(size, xxh3, block_bytes, tuple(blocks))
    return FileRecord(sums=sums, ranges=stored, **fields)


def _values(fields: dict[str, Any]) -> dict[str, Value]:
    return {
        name: float(value["float"]) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
