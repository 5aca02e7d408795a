"""A step as a Chainer snapshot of its trainer: one npz file that Chainer itself can load."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import MAIN, RESHARDED, FileRecord, Parameter, full_name
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.files.safetensors import Tensor
from smorms3_dist.checkpoint.files.steps import Steps
from smorms3_dist.checkpoint.files.strict_json import shown
from smorms3_dist.checkpoint.tools import npz_keys
from smorms3_dist.checkpoint.tools.npz import CHUNK_BYTES, Entry, new_npz
from smorms3_dist.checkpoint.tools.npz_keys import model_key, optimizer_key, own_key
from smorms3_dist.checkpoint.tools.progress import Meter, Progress

import numpy as np

_MAX_KEY_BYTES = 60_000


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

    ``tied`` has second names of parameters, and the names under which the checkpoint has them.

    Returns:
        The keys of what refers to parameters elsewhere than in models, which are left out.

    Raises:
        CheckpointError: If the step is damaged, or the file exists or cannot be written.
    """
    with StepReader(directory, step) as reader:
        entries = Entries(reader, str(directory.path_of(step)), tied or {})
        meter = Meter(sum(entry.nbytes for entry in entries.found.values() if entry), progress)
        with new_npz(out, compress) as writer:
            for key, entry in entries.found.items():
                counted = entry and entry._replace(blocks=functools.partial(_metered, entry, meter))
                writer.add(key, counted)
        return entries.left_out


def _metered(entry: Entry, meter: Meter) -> Iterator[np.ndarray]:
    for block in entry.blocks():
        yield block
        meter.add(block.nbytes)


def _value(value: Any) -> Entry:
    array = np.ascontiguousarray(value).reshape(np.shape(value))
    return Entry(array.dtype, array.shape, lambda: [array])


class Entries:
    """What goes into the file, by key."""

    def __init__(self, reader: StepReader, path: str, tied: Mapping[str, str]) -> None:
        self.found: dict[str, Entry | None] = {}
        self.left_out: list[str] = []
        self._path = path
        self._reader = reader
        manifest = reader.manifest
        self._notes: dict[str, Any] = manifest.notes.get("optimizers") or {MAIN: {}}
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
            self._add_optimizer(optimizer, noted)
        self.found.setdefault("updater/iteration", _value(manifest.step))
        self._add(f"{npz_keys.OWN}/world_size", _value(manifest.world_size))
        if manifest.notes.get(RESHARDED):
            self._add(f"{npz_keys.OWN}/{RESHARDED}", _value(1))
        for name, position in manifest.notes.get("iterators", {}).items():
            if position is not None:
                self._add(f"{npz_keys.OWN}/iterators/{name}", _value(float(position)))

    def _add(self, key: str, entry: Entry | None) -> None:
        if key in self.found:
            raise CheckpointError(self._path, f"has two values that are {shown(key)} in a snapshot")
        if "\0" in key or len(key.encode()) > _MAX_KEY_BYTES:
            raise CheckpointError(self._path, f"has a name that no zip file can have: {shown(key)}")
        self.found[key] = entry

    def _add_parameter(self, parameter: Parameter, optimizer: str, path: str) -> None:
        for array, name in parameter.arrays:
            if array.kind == "param":
                key = model_key(optimizer, path)
            elif array.kind == "master":
                key = own_key(optimizer, f"/masters{path}/array")
            else:
                key = optimizer_key(optimizer, f"{path}/{array.state}")
            dtype = np.dtype(name)
            blocks = functools.partial(self._reader.whole, array, CHUNK_BYTES // dtype.itemsize)
            self._add(key, Entry(dtype, parameter.shape, blocks))
        # A rule that is run on whole arrays is in the rank's file.
        key = optimizer_key(optimizer, f"{path}/t")
        if key in self.found:
            self._add(own_key(optimizer, f"/whole{path}"), _value(1))
        else:
            self._add(key, _value(parameter.rule_t))

    def _add_optimizer(self, name: str, noted: Mapping[str, Any]) -> None:
        manifest = self._reader.manifest
        self._add(optimizer_key(name, "/t"), _value(noted.get("t", manifest.t)))
        self._add(optimizer_key(name, "/epoch"), _value(noted.get("epoch", manifest.epoch)))
        self._add(own_key(name, "/version"), _value(npz_keys.VERSION))
        if noted.get("loss_scale") is not None:
            self._add(own_key(name, "/loss_scale"), _value(float(noted["loss_scale"])))
            for key in ("loss_scale_is_dynamic", "loss_scale_was_too_large"):
                self._add(own_key(name, f"/{key}"), _value(int(bool(noted.get(key)))))
        for path, values in noted.get("progress", {}).items():
            for key, value in values.items():
                self._add(own_key(name, f"/progress{path}/{key}"), _value(value))

    # What rank 0 has besides

    def _add_rank_state(self, tied: Mapping[str, str]) -> None:
        record = self._reader.manifest.rank_file(0)
        if record is None:
            return
        file = self._reader.open(record)
        values = json.loads(file.metadata.get(npz_keys.VALUES, "{}"))
        elsewhere = json.loads(file.metadata.get(npz_keys.ELSEWHERE, "[]"))
        # The same persistent value may be there as the trainer's, and without one.
        for name in sorted([*file.tensors, *values], key=lambda n: not n.startswith("trainer/")):
            entry: Entry | None = None
            if name in file.tensors:
                tensor = file.tensors[name]
                blocks = functools.partial(_blocks, self._reader, record, name, tensor)
                entry = Entry(tensor.dtype, tensor.shape, blocks)
            elif values[name] is not None:
                entry = _value(np.array(values[name], dtype=np.str_))
            for key in self._keys(name):
                if name.startswith("models/") and key in self.found:
                    continue
                self._add(key, entry)
                model = npz_keys.MODEL.fullmatch(key)
                if entry is None and model is not None and model[1] in self._notes:
                    # A parameter without an array, or else nobody asks for this.
                    rule_t = optimizer_key(model[1], f"{model[2]}/t")
                    self.found.setdefault(rule_t, _value(0))
        for key in dict.fromkeys(npz_keys.key_of(name) for name in elsewhere):
            self._check_elsewhere(key, tied)

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


def _blocks(
    reader: StepReader, record: FileRecord, name: str, tensor: Tensor
) -> Iterator[np.ndarray]:
    """Reads a tensor of a file, a bounded number of elements at a time."""
    count = CHUNK_BYTES // tensor.dtype.itemsize
    for start in range(0, tensor.size, count):
        values = np.empty(min(count, tensor.size - start), tensor.dtype)
        # It may have been closed since, for the sake of others.
        reader.open(record).read(name, start, start + values.size, values)
        yield values
