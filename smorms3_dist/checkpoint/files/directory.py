"""A directory of checkpoints: one directory a step, each of which is whole or does not exist.

What there is, is found by looking; no file points to the latest step. The names tell it all:

``step-0000001234``
    A step that has been committed.
``.saving-step-0000001234-TOKEN``
    A save on its way. Every rank writes its own files into it and brings them to the disk; then the
    leader writes the manifest, brings it and the directory to the disk, and gives the directory its
    final name. That rename is the moment from which the step exists.
``.replaced-step-0000001234-TOKEN``
    The older version of a step that is being saved again. A directory cannot be renamed onto
    another one, so a commit first sets the old one aside under this name, then renames the new one,
    then removes the old one. As long as there is no ``step-0000001234``, the one set aside is that
    step: at every moment one whole version is found. After a crash, the next writer gives it its
    name back.
``.removing-step-0000001234-TOKEN``
    An old step that is being removed: it ceases to exist by a rename, before its first file goes.
``abandoned-step-0000001234-TOKEN``
    A step that was set aside, because a training has gone back to an older one, or was told to
    overwrite another training. It counts no more. Removing old steps removes these first.
``.lock``
    The lock of the job that writes; see `smorms3_dist.checkpoint.files.locking`. Who has it may
    remove whatever crashed saves have left.

The *leader* is rank 0, or where each host has a file system of its own (*local*), one rank a host.
Leaders commit the same manifest, each in its own directory. Since they cannot do it at the same
moment, a crash may leave a step on some hosts only; the caller has to take the newest one that all
hosts have, and to remove old steps only after all hosts have committed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.checkpoint.files.errors import CheckpointError, naming
from smorms3_dist.checkpoint.files.locking import Lock
from smorms3_dist.checkpoint.files.manifest import Manifest
from smorms3_dist.checkpoint.files.steps import PASSING, Steps, step_name
from smorms3_dist.checkpoint.files.strict_json import LARGEST

ABANDONED = "abandoned-"
"""What the name of a step begins with that was set aside."""

_TOKEN = re.compile("[0-9A-Za-z]{1,64}")


def new_token() -> str:
    """A token for a save, for the leader to draw and all ranks to use."""
    return secrets.token_hex(8)


class CheckpointDirectory(Steps):
    """The checkpoints in one directory, to look at and to write.

    Any number of processes may look. To write, one of them takes the lock, with `lock` or the first
    `begin`, and keeps it until `close`.

    Args:
        path: The directory. It is made by the first save.
        host: Where this process runs: of checkpoints that are local to hosts, files of this host
            are expected here.
    """

    def __init__(self, path: str | os.PathLike[str], host: str | None = None) -> None:
        super().__init__(path, host)
        self._lock: Lock | None = None
        self._saving: set[Path] = set()

    def __enter__(self) -> CheckpointDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def lock(self) -> None:
        """Makes the directory, takes its lock, and removes what crashed saves have left in it.

        Only looks whether the directory is still the same, if this object has the lock already.

        Raises:
            CheckpointError: If another job writes to the directory, naming its host and pid, or if
                it cannot be written to; or has been removed or replaced since.
        """
        if self._lock is not None:
            self._lock.check()
        else:
            self.numbers()  # refuses what is a step itself
            self._make()
            self._lock = Lock(self.path / ".lock")
            try:
                # Another part of this program may be saving.
                if not self._lock.shared:
                    self.clean()
            except BaseException:
                self.close()
                raise

    def _make(self) -> None:
        with naming(self.path, "made"):
            missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        for path in missing:
            _sync_directory(path.parent)

    def close(self) -> None:
        """Gives the lock up. It may be called again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def saving(self, step: int, token: str) -> Path:
        """Where the files of a save go; for every rank.

        Args:
            step: The step.
            token: The token of the save, the same on all ranks.
        """
        if not 0 <= step <= LARGEST:
            raise ValueError(f"a step is from 0 to {LARGEST}, not {step}")
        return self._passing("saving", step, token)

    def begin(self, step: int, token: str) -> Path:
        """Makes the directory of a save; for the leader. The others must wait until it is done.

        Returns:
            The directory, as `saving` gives it.

        Raises:
            CheckpointError: If another job writes here, or the directory cannot be made.
        """
        self.lock()
        saving = self.saving(step, token)
        with naming(saving, "made"):
            saving.mkdir()
        self._saving.add(saving)
        return saving

    def commit(self, token: str, manifest: Manifest) -> Path:
        """Makes a step of a save; for the leader, once all ranks have written their files.

        Returns:
            The directory of the step.

        Raises:
            CheckpointError: If the manifest is not valid, a file is missing or of another size, or
                something cannot be written. The save is then to be ended with `abort`. If the
                reason is that a replaced step could not be removed, the new one is there.
        """
        saving = self.saving(manifest.step, token)
        if self._lock is not None:
            self._lock.check()
        if saving not in self._saving:
            raise ValueError(f"{saving} has not been begun")
        try:
            self._check_files(saving, manifest)
        except CheckpointError as error:
            remedy = "" if manifest.local else "; is this a file system that all hosts share?"
            raise CheckpointError(error.path, error.reason + remedy) from None
        data, path = manifest_json.dump(manifest), saving / manifest_json.NAME
        with naming(path, "written"), open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(saving)
        final = self.path / step_name(manifest.step)
        aside = self._passing("replaced", manifest.step, token)
        replaces = os.path.lexists(final)
        with naming(saving, "renamed"):
            if replaces:
                os.rename(final, aside)
            try:
                os.rename(saving, final)
            except OSError:
                if replaces:
                    os.rename(aside, final)
                raise
        self._saving.discard(saving)
        _sync_directory(self.path)
        if replaces:
            _remove(aside)
        return final

    def abort(self, step: int, token: str) -> None:
        """Removes what has been written of a save; for the leader, once no rank writes any more.

        Does nothing to a step that has been committed.

        Args:
            step: The step.
            token: The token of the save. It need not have been begun.

        Raises:
            CheckpointError: If it cannot be removed.
        """
        saving = self.saving(step, token)
        if saving in self._saving:
            self._saving.discard(saving)
            _remove(saving)

    def set_aside(self, steps: Iterable[int]) -> None:
        """Lets steps count no more, under another name; for the leader.

        Raises:
            CheckpointError: If another job writes here, or one cannot be renamed.
        """
        self.lock()
        for step in sorted(steps, reverse=True):
            path = self.path_of(step)
            with naming(path, "renamed"):
                os.rename(path, self.path / f"{ABANDONED}{step_name(step)}-{new_token()}")
            _sync_directory(self.path)

    def retain(
        self, keep_last: int, keep_every: int | None = None, protect: Iterable[int] = ()
    ) -> list[int]:
        """Removes old steps, whole or damaged, and all that were set aside; for the leader.

        Args:
            keep_last: How many of the newest whole steps are kept, at least 1, and with them
                whatever damaged ones are newer than the oldest of these.
            keep_every: Steps that are multiples of it are kept, too.
            protect: Other steps to keep, such as one that has just been saved while newer ones of
                an abandoned training are there.

        Returns:
            The steps that have been removed.

        Raises:
            CheckpointError: If another job writes here, or something cannot be removed.
            ValueError: If a number is not positive.
        """
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"keep_last and keep_every must be positive: {keep_last}, {keep_every}"
            )
        self.lock()
        for name in self._names():
            if name.startswith(ABANDONED):
                _remove(self.path / name)
        kept = set(protect)
        whole = 0
        removed = []
        for step in sorted(self._paths(), reverse=True):
            if whole < keep_last:
                whole += self.is_whole(step)
            elif step not in kept and (keep_every is None or step % keep_every):
                self._remove_step(step)
                removed.append(step)
        return removed

    def _remove_step(self, step: int) -> None:
        path = self.path_of(step)
        aside = self._passing("removing", step, new_token())
        with naming(path, "renamed"):
            os.rename(path, aside)
        _sync_directory(self.path)
        _remove(aside)

    def clean(self) -> list[str]:
        """Removes what crashed saves have left, and ends what crashed replacements have begun.

        Returns:
            The names of the directories that were dealt with.

        Raises:
            CheckpointError: If another job writes here, or something cannot be removed.
        """
        self.lock()
        found = []
        for name in self._names():
            passing = PASSING.fullmatch(name)
            path = self.path / name
            if passing is None or path in self._saving:
                continue
            found.append(name)
            final = self.path / passing[2]
            if passing[1] == "replaced" and not os.path.lexists(final):
                with naming(path, "renamed"):
                    os.rename(path, final)
                _sync_directory(self.path)
            else:
                _remove(path)
        return found

    def _passing(self, what: str, step: int, token: str) -> Path:
        if _TOKEN.fullmatch(token) is None:
            raise ValueError(f"a token is of up to 64 letters and digits, not {token!r}")
        return self.path / f".{what}-{step_name(step)}-{token}"


def _sync_directory(path: Path) -> None:
    """Brings the names in a directory to the disk."""
    with naming(path, "synced"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # What file systems say that have nothing to sync for a directory, such as some on FUSE.
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(fd)


def _remove(path: Path) -> None:
    with naming(path, "removed"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
