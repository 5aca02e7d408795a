"""What steps there are in a directory of checkpoints, found by looking.

How their names come about is told in `smorms3_dist.checkpoint.files.directory`.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path

from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.checkpoint.files.errors import CheckpointError, NoCheckpointError, naming
from smorms3_dist.checkpoint.files.manifest import FileRecord, Manifest

_STEP = re.compile("step-([0-9]{10,19})")
PASSING = re.compile("[.](saving|replaced|removing)-(step-[0-9]{10,19})-([0-9A-Za-z]{1,64})")
"""Names that are not there to stay: what is being done, the name of the step, a token."""


class Steps:
    """The steps in a directory, to look at; any number of processes may.

    Args:
        path: The directory. It need not exist.
        host: Where this process runs: of checkpoints that are local to hosts, files of this host
            are expected here.
    """

    def __init__(self, path: str | os.PathLike[str], host: str | None = None) -> None:
        self.path = Path(path)
        self.host = socket.gethostname() if host is None else host

    def steps(self) -> list[int]:
        """The steps that are whole, as far as names and sizes tell, in ascending order.

        Raises:
            CheckpointError: If the directory cannot be read. One that does not exist has no steps.
        """
        return [step for step in sorted(self._paths()) if self.is_whole(step)]

    def numbers(self) -> list[int]:
        """All steps, whole or not, in ascending order; by their names alone.

        Raises:
            CheckpointError: If the directory cannot be read, or is itself a step.
        """
        return sorted(self._paths())

    def damaged(self) -> dict[int, CheckpointError]:
        """The steps that are not whole, and why not. Checksums of data are left to `verify`.

        Raises:
            CheckpointError: If the directory cannot be read.
        """
        found = {}
        for step in sorted(self._paths()):
            try:
                self.check(step)
            except CheckpointError as error:
                found[step] = error
        return found

    def latest(self) -> int | None:
        """The newest whole step, or ``None`` if there is none.

        Raises:
            CheckpointError: If the directory cannot be read.
        """
        paths = sorted(self._paths(), reverse=True)
        return next((step for step in paths if self.is_whole(step)), None)

    def path_of(self, step: int) -> Path:
        """The directory of a step.

        Args:
            step: A step that has been committed, whole or not.

        Raises:
            CheckpointError: If there is no such step.
        """
        paths = self._paths()
        if step not in paths:
            there = ", ".join(map(str, sorted(paths))) or "none"
            raise NoCheckpointError(self.path, f"has no step {step}; it has {there}")
        return paths[step]

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            CheckpointError: If there is no such step, or its manifest is missing or not valid.
        """
        path = self.path_of(step) / manifest_json.NAME
        manifest = manifest_json.read(path)
        if manifest.step != step:
            raise CheckpointError(path, f"is of step {manifest.step}, not {step}")
        return manifest

    def check(self, step: int) -> Manifest:
        """Looks whether a step is whole: its manifest is valid, its files have the right sizes.

        Returns:
            Its manifest.

        Raises:
            CheckpointError: If it is not whole, naming the file, its rank and its host.
        """
        manifest = self.manifest(step)
        self._check_files(self.path_of(step), manifest)
        return manifest

    def expected(self, manifest: Manifest) -> tuple[FileRecord, ...]:
        """The files of a step that should be in this directory: all, or those of this host."""
        return tuple(
            file for file in manifest.files if not manifest.local or file.host == self.host
        )

    def present(self, manifest: Manifest) -> tuple[FileRecord, ...]:
        """The files of a step that are in this directory with the right sizes, whoever wrote them.

        Raises:
            CheckpointError: If there is no such step.
        """
        directory = self.path_of(manifest.step)
        return tuple(file for file in manifest.files if _fault(directory, file) is None)

    def _check_files(self, directory: Path, manifest: Manifest) -> None:
        for file in self.expected(manifest):
            fault = _fault(directory, file)
            if fault is not None:
                raise CheckpointError(directory / file.path, f"{fault} ({file.origin})")

    def is_whole(self, step: int) -> bool:
        """Whether a step is whole, as `check` sees it."""
        try:
            self.check(step)
        except CheckpointError:
            return False
        return True

    def _names(self) -> list[str]:
        with naming(self.path, "listed"):
            try:
                names = os.listdir(self.path)
            except FileNotFoundError:
                return []
        whole_path = self.path.resolve()
        step = _STEP.fullmatch(whole_path.name)
        if step is not None:
            raise CheckpointError(
                self.path,
                f"is one step, not a directory of steps: give {whole_path.parent}, and the step "
                f"{int(step[1])}",
            )
        if manifest_json.NAME in names:
            raise CheckpointError(
                self.path,
                "is one step, under another name than its own, and not a directory of steps: name "
                "it step-, with the ten digits of its number, and give the directory that it is in",
            )
        return names

    def _paths(self) -> dict[int, Path]:
        paths: dict[int, Path] = {}
        # Names with a dot come last: what is set aside counts only if nothing has taken its place.
        for name in sorted(self._names(), reverse=True):
            passing = PASSING.fullmatch(name)
            if passing is not None and passing[1] != "replaced":
                continue
            match = _STEP.fullmatch(name if passing is None else passing[2])
            if match is not None and match[0] == step_name(int(match[1])):
                paths.setdefault(int(match[1]), self.path / name)
        return paths


def step_name(step: int) -> str:
    """The name of a step's directory."""
    return f"step-{step:010d}"


def _fault(directory: Path, file: FileRecord) -> str | None:
    """What is seen to be wrong with a file without reading it."""
    path = directory / file.path
    with naming(path, "looked at", file.origin):
        try:
            found = path.stat()
        except FileNotFoundError:
            return "is missing"
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    if found.st_size != file.sums.size:
        return f"has {found.st_size} bytes, and {file.sums.size} were written"
    return None
