"""The stages of a save, told by what it asks of the operating system, to be killed at each of them.

Nothing in the package knows of them: `die_at` wraps the calls that bring files to the disk and
rename directories, and lets the process send SIGKILL to itself before or after one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.checkpoint.files.blocks import SummedWriter
from smorms3_dist.checkpoint.files.directory import CheckpointDirectory
from smorms3_dist.checkpoint.files.steps import PASSING

STAGES = (
    "saving begun",
    *(f"shard file {what}" for what in ("begun", "half written", "written", "synced")),
    *(f"rank file {what}" for what in ("begun", "half written", "written", "synced")),
    "before manifest",
    "manifest written",
    "manifest synced",
    "before rename",
    "replaced step set aside",
    "after rename",
    "committed",
    "replaced step removed",
    "before retention",
    "old step set aside",
    "old step removed",
    "after retention",
)
"""In the order of a save that replaces a step and removes an old one."""

_FILE = re.compile("(shard|rank)-([0-9]{5}).safetensors")

Hook = Callable[..., None]


def die_at(place: str) -> None:
    """Lets this process die when it comes to ``STAGE``, or to ``STAGE:RANK`` as that rank."""

    def reach(stage: str, rank: int = 0) -> None:
        assert stage in STAGES
        if place in (stage, f"{stage}:{rank}"):
            os.kill(os.getpid(), signal.SIGKILL)

    def reach_file(path: Path, what: str) -> None:
        match = _FILE.fullmatch(path.name)
        assert match is not None
        reach(f"{match[1]} file {what}", int(match[2]))

    # Files

    writes: dict[Path, int] = {}  # to come, of each file, until half of it is written

    def writing(writer: Any, data: Any) -> None:
        if writer.path not in writes:
            # The header; each tensor is written at once.
            tensors = json.loads(bytes(data[8:])).keys() - {"__metadata__"}
            writes[writer.path] = 1 + len(tensors) // 2
        elif writes[writer.path] == 0:
            reach_file(writer.path, "half written")
        writes[writer.path] -= 1

    _around(SummedWriter, "__init__", after=lambda _, path, *more: reach_file(path, "begun"))
    _around(SummedWriter, "write", before=writing)
    _around(
        SummedWriter,
        "finish",
        before=lambda writer: reach_file(writer.path, "written"),
        after=lambda writer: reach_file(writer.path, "synced"),
    )

    # Directories

    last = ""  # what has been renamed, as long as that has not come to the disk
    aside = ""  # what has been set aside to be removed

    def renaming(source: Any, target: Any) -> None:
        new = _kind(source) == "saving" and last != "replaced"
        if new or _kind(target) == "replaced":
            reach("before rename")

    def has_renamed(source: Any, target: Any) -> None:
        nonlocal last, aside
        aside = Path(target).name if _kind(target) else aside
        last = _kind(source) or _kind(target)
        if last == "replaced":
            reach("replaced step set aside")
        elif last == "saving":
            reach("after rename")

    def is_manifest(fd: int) -> bool:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name == manifest_json.NAME

    def synced(fd: int) -> None:
        nonlocal last
        if is_manifest(fd):
            reach("manifest synced")
        elif last and os.path.isdir(f"/dev/fd/{fd}"):
            reach("committed" if last == "saving" else "old step set aside")
            last = ""

    def removed(path: Any, *more: Any, **options: Any) -> None:
        if Path(path).name == aside:
            reach("replaced step removed" if _kind(path) == "replaced" else "old step removed")

    _around(CheckpointDirectory, "begin", after=lambda *_: reach("saving begun"))
    _around(manifest_json, "dump", before=lambda manifest: reach("before manifest"))
    _around(os, "rename", renaming, has_renamed)
    _around(os, "fsync", lambda fd: is_manifest(fd) and reach("manifest written"), synced)
    _around(shutil, "rmtree", after=removed)
    _around(
        CheckpointDirectory,
        "retain",
        before=lambda *_: reach("before retention"),
        after=lambda *_: reach("after retention"),
    )


def _kind(path: Any) -> str:
    """What a directory that is not there to stay is there for."""
    match = PASSING.fullmatch(Path(path).name)
    return match[1] if match is not None else ""


def _around(owner: Any, name: str, before: Hook | None = None, after: Hook | None = None) -> None:
    """Has something called before and after a function, with its arguments."""
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if before is not None:
            before(*arguments)
        result = function(*arguments, **options)
        if after is not None:
            after(*arguments)
        return result

    setattr(owner, name, wrapped)
