"""What the keys of a Chainer snapshot mean: parameters with their states, numbers, and the rest."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import MAIN, RESHARDED, Array, Parameter, full_name
from smorms3_dist.checkpoint.files.safetensors import DTYPES
from smorms3_dist.checkpoint.files.strict_json import LARGEST, shown
from smorms3_dist.checkpoint.tools import npz_keys
from smorms3_dist.checkpoint.tools.dividing import Source
from smorms3_dist.checkpoint.tools.npz import Fill, Member, NpzReader
from smorms3_dist.checkpoint.tools.npz_keys import OWN, optimizer_key, own_key

import numpy as np

_NOT_IN_SNAPSHOTS = ("trainer/", "models/", "rules/")


class Contents:
    """The contents of a snapshot, as a checkpoint has them.

    Args:
        reader: The file.
        tied: Second names of parameters, and the names under which the checkpoint is to have them.
        whole: The parameters whose update rules are run on whole arrays, where the snapshot does
            not tell.
        fixed: The parameters without update rules, which a snapshot does not tell from persistent
            values.

    Attributes:
        optimizers: The names of the sharded optimizers, the main one first.
        parameters: The parameters by name.
        kept: What goes into a rank's file, by name.
        elsewhere: Names in a rank's file of what is in shards.
        left_out: Keys that have no place in a checkpoint.
        world_size: How many ranks the training had, as far as the snapshot says so.
        resharded: Whether the checkpoint that the snapshot is of had been resharded.
        iteration: The iteration of the trainer.

    Raises:
        CheckpointError: If it is no snapshot of a trainer, makes no sense, or holds what a
            checkpoint cannot.
    """

    def __init__(
        self,
        reader: NpzReader,
        tied: Mapping[str, str],
        whole: Collection[str],
        fixed: Collection[str],
    ) -> None:
        self._reader = reader
        self._members = reader.members
        self._whole = whole
        self.parameters: dict[str, Parameter] = {}
        self.kept: dict[str, Member] = {}
        self.elsewhere: list[str] = []
        self.left_out: list[str] = []
        self._sources: dict[Array, Member] = {}
        self._progress: dict[str, dict[str, dict[str, int | float]]] = {}
        self.optimizers = self._find_optimizers()
        # The keys in optimizers by what comes before their last part, and by that.
        self._leaves: dict[tuple[str, str], dict[str, str]] = {}
        # The keys of parameters by name, and all keys that belong to a parameter.
        self._keys: dict[str, str] = {}
        self._used: set[str] = set()
        self._find_parameters(fixed)
        for name in (*tied, *tied.values(), *whole, *fixed):
            if name not in self._keys:
                raise CheckpointError(reader.path, f"has no parameter {shown(name)}")
        for name, key in self._keys.items():
            if name in tied:
                self._check_tied(name, tied[name])
                self.elsewhere += npz_keys.names_of(key, of_model=True)
            else:
                self._take_parameter(name, key)
        self._sort_out_the_rest()
        says = f"{OWN}/world_size"
        self.world_size = self.integer(says, low=1) if says in self._members else None
        self.resharded = f"{OWN}/{RESHARDED}" in self._members
        t = self.integer(optimizer_key(self.optimizers[0], "/t"))
        self.iteration = self.integer("updater/iteration", t)

    def _find_optimizers(self) -> list[str]:
        found = [npz_keys.OPTIMIZER.fullmatch(key) for key in self._members]
        names = dict.fromkeys(match[1] for match in found if match is not None)
        if not names:
            raise CheckpointError(
                self._reader.path,
                "is no snapshot of a trainer: it has no key that starts with updater/optimizer:",
            )
        for name in names:
            size = own_key(name, "/world_size")
            if size in self._members:
                raise CheckpointError(
                    self._reader.path,
                    f"has the states of rank {self.integer(own_key(name, '/rank'))} of "
                    f"{self.integer(size)} only: load it with as many ranks, and save with "
                    "smorms3_dist.ShardedCheckpoint",
                )
            version = self.integer(own_key(name, "/version"), npz_keys.VERSION)
            if version > npz_keys.VERSION:
                raise CheckpointError(
                    self._reader.path,
                    f"was written by a later version of smorms3_dist (format {version}; this one "
                    f"reads up to {npz_keys.VERSION}): update the package",
                )
        # Where one has been a sharded optimizer, the others have not.
        ours = [name for name in names if own_key(name, "/version") in self._members]
        return sorted(ours or names, key=lambda name: (name != MAIN, name))

    # Parameters

    def _find_parameters(self, fixed: Collection[str]) -> None:
        for key in self._members:
            found = npz_keys.OPTIMIZER.fullmatch(key)
            if found is not None and found[1] in self.optimizers:
                path, _, leaf = found[2].rpartition("/")
                self._leaves.setdefault((found[1], path), {})[leaf] = key
        for key in self._members:
            found = npz_keys.MODEL.fullmatch(key)
            if found is None or found[1] not in self.optimizers:
                continue
            name, rule = full_name(found[1], found[2]), self._leaves.get((found[1], found[2]), {})
            if "t" in rule or name in fixed:
                self._keys[name] = key
                self._used.update([key, *rule.values()])

    def _rule(self, name: str) -> dict[str, Member]:
        """What the update rule of a parameter has, by name."""
        leaves = self._leaves.get(npz_keys.split_name(name, self.optimizers), {})
        return {leaf: self._members[key] for leaf, key in leaves.items()}

    def _check_tied(self, second: str, first: str) -> None:
        ours = {"": self._members[self._keys[second]], **self._rule(second)}
        theirs = {"": self._members[self._keys[first]], **self._rule(first)}
        for leaf, member in ours.items():
            other = theirs.get(leaf)
            if other is None or (other.info.CRC, other.info.file_size) != (
                member.info.CRC,
                member.info.file_size,
            ):
                raise self._reader.error(member.key, f"is not what {first} has: they are not tied")

    def _take_parameter(self, name: str, key: str) -> None:
        optimizer, path = npz_keys.split_name(name, self.optimizers)
        member, rule = self._members[key], self._rule(name)
        if member.is_none:
            # Not initialized; whoever asks for the parameter is told so.
            self._keep(key, of_model=True)
            return
        self.elsewhere += npz_keys.names_of(key, of_model=True)
        self._take(Array(name, "param", None), member)
        states = {leaf: m for leaf, m in rule.items() if leaf != "t" and not m.is_none}
        master = self._members.get(own_key(optimizer, f"/masters{path}/array"))
        if (
            name in self._whole
            or own_key(optimizer, f"/whole{path}") in self._members
            or any(state.shape != member.shape for state in states.values())
        ):
            for leaf, each in rule.items():
                self.kept[f"rules/{optimizer}{path}/{leaf}"] = self._usable(each)
            if master is not None:
                self.left_out.append(master.key)
            states, master = {}, None
        for leaf, state in states.items():
            self._take(Array(name, "state", leaf), state)
        widened = master is None and any(_is_wider(state, member) for state in states.values())
        if widened:
            # A master as Chainer would make it at the next update: it does not save them.
            master = member
        if master is not None:
            if master.shape != member.shape:
                raise self._reader.error(master.key, f"is not of the shape of {name}")
            self._take(Array(name, "master", None), master)
        self.parameters[name] = Parameter(
            name=name,
            shape=member.shape,
            dtype=member.dtype.name,
            update="imported",
            states={leaf: state.dtype.name for leaf, state in states.items()},
            master="float32" if widened else None if master is None else master.dtype.name,
            rule_t=self.integer(rule["t"].key) if "t" in rule else 0,
            hyperparameters={},
        )
        progress = self._leaves.get((optimizer, f"/{OWN}/progress{path}"), {})
        if progress:
            numbers = {leaf: self.number(each) for leaf, each in progress.items()}
            self._progress.setdefault(optimizer, {})[path] = numbers

    def _take(self, array: Array, member: Member) -> None:
        self._sources[array] = self._usable(member)

    def sources(self, scratch: Path) -> list[Source]:
        """The arrays of the shards.

        Args:
            scratch: A directory with room for any of them.
        """
        found = []
        for array, member in self._sources.items():
            parameter = self.parameters[array.parameter]
            opener: Callable[[], AbstractContextManager[Fill]]
            opener = functools.partial(self._reader.stream, member.key, scratch)
            dtype = member.dtype
            if array.kind == "master" and dtype.name != parameter.master:
                opener = functools.partial(_widened, opener, dtype)
                dtype = np.dtype(parameter.master)
            found.append(Source(array, dtype, member.size, opener))
        return found

    # The rest

    def _sort_out_the_rest(self) -> None:
        for key in self._members:
            model, optimizer = npz_keys.MODEL.fullmatch(key), npz_keys.OPTIMIZER.fullmatch(key)
            if key in self._used or key.startswith(f"{OWN}/"):
                continue
            if optimizer is not None and optimizer[1] in self.optimizers:
                if optimizer[2] not in ("/t", "/epoch") and not optimizer[2].startswith(f"/{OWN}/"):
                    self.left_out.append(key)
            elif key.startswith(_NOT_IN_SNAPSHOTS):
                self.left_out.append(key)
            else:
                self._keep(key, of_model=model is not None and model[1] in self.optimizers)

    def _keep(self, key: str, of_model: bool) -> None:
        member = self._members[key]
        if member.dtype.kind != "U":
            self._usable(member)
        for name in npz_keys.names_of(key, of_model):
            self.kept[name] = member

    def _usable(self, member: Member) -> Member:
        if not member.is_none and member.dtype.newbyteorder("=") not in DTYPES.values():
            raise self._reader.error(
                member.key, f"is an array of {member.dtype}, which a checkpoint cannot hold"
            )
        return member

    def notes_of(self, optimizer: str) -> dict[str, Any]:
        """What a manifest notes of an optimizer.

        Args:
            optimizer: Its name.
        """
        scale = own_key(optimizer, "/loss_scale")
        return {
            "t": self.integer(optimizer_key(optimizer, "/t")),
            "epoch": self.integer(optimizer_key(optimizer, "/epoch"), 0),
            "loss_scale": float(self.number(scale)) if scale in self._members else None,
            "loss_scale_is_dynamic": bool(self.integer(f"{scale}_is_dynamic", 0)),
            "loss_scale_was_too_large": bool(self.integer(f"{scale}_was_too_large", 0)),
            "progress": self._progress.get(optimizer, {}),
        }

    def positions(self) -> dict[str, float | None]:
        """How many passes the iterators have made, if known; for loading at another world size."""
        noted, end = f"{OWN}/iterators/", "/current_position"
        found: dict[str, float | None] = {}
        for key in self._members:
            if key.startswith(noted):
                found[key.removeprefix(noted)] = float(self.number(key))
            elif key.startswith("updater/iterator:") and key.endswith(end):
                name = key.removeprefix("updater/iterator:").removesuffix(end)
                found.setdefault(name, self._position(key.removesuffix(end)))
        return found

    def _position(self, iterator: str) -> float | None:
        if f"{iterator}/epoch" not in self._members:
            return None
        epoch = self.integer(f"{iterator}/epoch")
        position = self.integer(f"{iterator}/current_position")
        if position == 0:
            return float(epoch)
        # Without shuffling, nothing tells how large the dataset is.
        for key in (f"{iterator}/order", f"{iterator}/_order"):
            order = self._members.get(key)
            if order is not None and not order.is_none and order.size:
                return epoch + position / order.size
        return None

    def number(self, key: str, default: int | None = None) -> int | float:
        """A number of the snapshot.

        Args:
            key: Its key.
            default: What it is if there is none.

        Raises:
            CheckpointError: If there is none, or it is something else.
        """
        if default is not None and key not in self._members:
            return default
        value = self._reader.value(key)
        if value is None or value.shape != () or value.dtype.kind not in "iuf":
            raise self._reader.error(key, "is not one number")
        number = value.item()
        if isinstance(number, float) and not math.isfinite(number):
            raise self._reader.error(key, f"is {number}")
        return number

    def integer(self, key: str, default: int | None = None, low: int = 0) -> int:
        """An integer of the snapshot, of at least ``low``; see `number`."""
        value = self.number(key, default)
        if isinstance(value, float) or not low <= value <= LARGEST:
            raise self._reader.error(key, f"is {value} and not an integer from {low} on")
        return value


def _is_wider(state: Member, member: Member) -> bool:
    return (member.dtype.name, state.dtype.name) == ("float16", "float32")


@contextlib.contextmanager
def _widened(opener: Callable[[], AbstractContextManager[Fill]], dtype: np.dtype) -> Iterator[Fill]:
    """Reads an array into another dtype than its own."""
    with opener() as fill:

        def fill_wider(out: np.ndarray) -> None:
            values = np.empty(out.size, dtype)
            fill(values)
            out[...] = values

        yield fill_wider
