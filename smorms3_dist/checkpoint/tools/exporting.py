"""A step as a Chainer snapshot of its trainer: one npz file that Chainer itself can load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import MAIN, RESHARDED, Array, Parameter, full_name
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.files.safetensors import SafetensorsReader
from smorms3_dist.checkpoint.files.steps import Steps
from smorms3_dist.checkpoint.files.strict_json import LARGEST, parse, shown
from smorms3_dist.checkpoint.tools import npz_keys
from smorms3_dist.checkpoint.tools.npz import CHUNK_BYTES, new_npz
from smorms3_dist.checkpoint.tools.npz_keys import model_key, optimizer_key, own_key
from smorms3_dist.checkpoint.tools.progress import Meter, Progress

import numpy as np


class _Stored(NamedTuple):
    """An array of the shards."""

    array: Array
    dtype: np.dtype
    shape: tuple[int, ...]


class _Kept(NamedTuple):
    """An array of the rank's file."""

    tensor: str
    dtype: np.dtype
    shape: tuple[int, ...]


_MAX_KEY_BYTES = 60_000

_Entry = _Stored | _Kept | np.ndarray | None


def export(
    directory: Steps,
    step: int,
    out: Path,
    *,
    compress: bool = False,
    tied: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Writes a step as an npz file, with the keys of Chainer's snapshots of a trainer.

    Parameters and states are those of all ranks; everything else is that of rank 0.

    Args:
        directory: Where the step is.
        step: The step.
        out: The file, which must not exist.
        compress: Whether to compress it.
        tied: Second names of parameters, and the names under which the checkpoint has them.
        progress: Is told of the bytes that have been written.

    Returns:
        The keys of what refers to parameters elsewhere than in models, which are left out.

    Raises:
        CheckpointError: If the step is damaged, or the file exists or cannot be written.
    """
    with StepReader(directory, step) as reader:
        entries = _Entries(reader, str(directory.path_of(step)), tied or {})
        total = sum(_nbytes(entry) for entry in entries.found.values())
        meter = Meter(total, progress)
        with new_npz(out, compress) as writer:
            for key, entry in entries.found.items():
                if isinstance(entry, _Stored):
                    blocks = _stored_blocks(reader, entry, meter)
                    writer.add(key, entry.dtype, entry.shape, blocks)
                elif isinstance(entry, _Kept):
                    writer.add(key, entry.dtype, entry.shape, entries.blocks(entry, meter))
                else:
                    writer.add_value(key, entry)
                    meter.add(_nbytes(entry))
        return entries.left_out


def _nbytes(entry: _Entry) -> int:
    if entry is None:
        return 0
    if isinstance(entry, np.ndarray):
        return entry.nbytes
    return int(np.prod(entry.shape, dtype=object)) * entry.dtype.itemsize


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST)


def _stored_blocks(reader: StepReader, entry: _Stored, meter: Meter) -> Iterator[np.ndarray]:
    for _, values in reader.whole(entry.array, CHUNK_BYTES // entry.dtype.itemsize):
        yield values
        meter.add(values.nbytes)


class _Entries:
    """What goes into the file, by key."""

    def __init__(self, reader: StepReader, path: str, tied: Mapping[str, str]) -> None:
        self.found: dict[str, _Entry] = {}
        self.left_out: list[str] = []
        self._path = path
        self._reader = reader
        manifest = reader.manifest
        notes = manifest.notes.get("optimizers")
        self._notes = notes if isinstance(notes, dict) and notes else {MAIN: {}}
        self._names: dict[str, list[str]] = {p.name: [p.name] for p in manifest.parameters}
        for second, first in tied.items():
            if first not in self._names:
                raise CheckpointError(path, f"has no parameter {shown(first)}")
            self._names[first].append(second)
        self._add_rank_state(tied)
        for parameter in manifest.parameters:
            for name in self._names[parameter.name]:
                self._add_parameter(parameter, *npz_keys.split_name(name, self._notes))
        for optimizer, noted in self._notes.items():
            self._add_optimizer(optimizer, noted if isinstance(noted, dict) else {})
        self.found.setdefault("updater/iteration", np.array(manifest.step))
        self._add(f"{npz_keys.OWN}/world_size", np.array(manifest.world_size))
        if manifest.notes.get(RESHARDED):
            self._add(f"{npz_keys.OWN}/{RESHARDED}", np.array(1))
        positions = manifest.notes.get("iterators")
        for name, position in positions.items() if isinstance(positions, dict) else ():
            if _is_number(position):
                self._add(f"{npz_keys.OWN}/iterators/{name}", np.array(float(position)))

    def _add(self, key: str, entry: _Entry) -> None:
        if key in self.found:
            raise CheckpointError(self._path, f"has two values that are {shown(key)} in a snapshot")
        if "\0" in key or len(key.encode()) > _MAX_KEY_BYTES:
            raise CheckpointError(self._path, f"has a name that no zip file can have: {shown(key)}")
        self.found[key] = entry

    def _add_parameter(self, parameter: Parameter, optimizer: str, path: str) -> None:
        for array, dtype in parameter.arrays:
            if array.kind == "param":
                key = model_key(optimizer, path)
            elif array.kind == "master":
                key = own_key(optimizer, f"/masters{path}/array")
            else:
                key = optimizer_key(optimizer, f"{path}/{array.state}")
            self._add(key, _Stored(array, np.dtype(dtype), parameter.shape))
        # A rule that is run on whole arrays is in the rank's file.
        key = optimizer_key(optimizer, f"{path}/t")
        if key in self.found:
            self._add(own_key(optimizer, f"/whole{path}"), np.array(1))
        else:
            self._add(key, np.array(parameter.rule_t))

    def _add_optimizer(self, name: str, noted: Mapping[str, Any]) -> None:
        manifest = self._reader.manifest

        def number(key: str, default: int | None = None) -> int | float | None:
            value = noted.get(key, default)
            if value is not None and not _is_number(value):
                raise CheckpointError(
                    self._path, f"notes {shown(value)} as {key} of optimizer {shown(name)}"
                )
            return value

        self._add(optimizer_key(name, "/t"), np.array(number("t", manifest.t)))
        self._add(optimizer_key(name, "/epoch"), np.array(number("epoch", manifest.epoch)))
        self._add(own_key(name, "/version"), np.array(npz_keys.VERSION))
        scale = number("loss_scale")
        if scale is not None:
            self._add(own_key(name, "/loss_scale"), np.array(float(scale)))
            for key in ("loss_scale_is_dynamic", "loss_scale_was_too_large"):
                self._add(own_key(name, f"/{key}"), np.array(int(bool(number(key)))))
        progress = noted.get("progress")
        for path, values in progress.items() if isinstance(progress, dict) else ():
            for key, value in values.items() if isinstance(values, dict) else ():
                if _is_number(value):
                    self._add(own_key(name, f"/progress{path}/{key}"), np.array(value))

    # What rank 0 has besides

    def _add_rank_state(self, tied: Mapping[str, str]) -> None:
        record = self._reader.manifest.rank_file(0)
        self._record = record
        if record is None:
            return
        file = self._reader.open(record)
        values = self._text(file, npz_keys.VALUES, "{}")
        elsewhere = self._text(file, npz_keys.ELSEWHERE, "[]")
        if not isinstance(values, dict) or not isinstance(elsewhere, list):
            raise CheckpointError(self._path, f"has metadata in {record.path} that make no sense")
        # The same persistent value may be there as the trainer's, and without one.
        for name in sorted([*file.tensors, *values], key=lambda n: not n.startswith("trainer/")):
            entry: _Entry
            if name in file.tensors:
                tensor = file.tensors[name]
                entry = _Kept(name, tensor.dtype, tensor.shape)
            else:
                entry = self._strings(name, values[name])
            for key in self._keys(name):
                if name.startswith("models/") and key in self.found:
                    continue
                self._add(key, entry)
                model = npz_keys.MODEL.fullmatch(key)
                if entry is None and model is not None and model[1] in self._notes:
                    # A parameter without an array, or else nobody asks for this.
                    rule_t = optimizer_key(model[1], f"{model[2]}/t")
                    self.found.setdefault(rule_t, np.array(0))
        for key in dict.fromkeys(npz_keys.key_of(str(name)) for name in elsewhere):
            self._check_elsewhere(key, tied)

    def _text(self, file: SafetensorsReader, name: str, default: str) -> Any:
        return parse(file.metadata.get(name, default).encode(), self._path)

    def _strings(self, name: str, value: Any) -> np.ndarray | None:
        try:
            return None if value is None else np.array(value, dtype=np.str_)
        except ValueError:
            raise CheckpointError(
                self._path, f"has {shown(value)} for {shown(name)}, which is no array of strings"
            ) from None

    def _keys(self, name: str) -> Iterator[str]:
        """The keys of what has a name in the rank's file: several where a rule is shared."""
        key = npz_keys.key_of(name)
        yield key
        if name.startswith("rules/"):
            found = npz_keys.OPTIMIZER.fullmatch(key)
            assert found is not None
            optimizer = found[1]
            path, _, leaf = found[2].rpartition("/")
            for other in self._names.get(full_name(optimizer, path), [])[1:]:
                other_optimizer, other_path = npz_keys.split_name(other, self._notes)
                yield optimizer_key(other_optimizer, f"{other_path}/{leaf}")

    def _check_elsewhere(self, key: str, tied: Mapping[str, str]) -> None:
        found = npz_keys.MODEL.fullmatch(key)
        if found is None or found[1] not in self._notes:
            self.left_out.append(key)
            return
        name = full_name(found[1], found[2])
        if name not in self._names and name not in tied:
            raise CheckpointError(
                self._path,
                f"has a parameter to which {name} is a second path, but does not say which. Say it:"
                f" --tied {name}=PATH",
            )

    def blocks(self, entry: _Kept, meter: Meter) -> Iterator[np.ndarray]:
        """Reads an array of the rank's file, a bounded number of elements at a time."""
        assert self._record is not None
        size = int(np.prod(entry.shape, dtype=object))
        count = CHUNK_BYTES // entry.dtype.itemsize
        for start in range(0, size, count):
            values = np.empty(min(count, size - start), entry.dtype)
            self._reader.open(self._record).read(entry.tensor, start, start + values.size, values)
            yield values
            meter.add(values.nbytes)
