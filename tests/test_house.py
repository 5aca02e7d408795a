"""The floors of the house. A stand-in: the test itself comes with the rooms."""

from __future__ import annotations

from typing import NamedTuple


class Room(NamedTuple):
    """A room.

    Attributes:
        name: Folder, or module at the top.
        modules: What is in it.
        concern: What it is for.
    """

    name: str
    modules: tuple[str, ...]
    concern: str


FLOORS: list[list[Room]] = [
    [
        Room("compat", ("patches", "importer"), "Patches Chainer for today's Python and NumPy"),
        Room("layout", ("layout",), "Which element lies where, and who owns it"),
    ],
    [Room("kernels", ("mean", "segments", "cpu", "reference", "tables"), "The update of a range")],
    [Room("collectives", ("base", "mpi", "chainermn", "nccl"), "Reduce-scatter and all-gather")],
]
