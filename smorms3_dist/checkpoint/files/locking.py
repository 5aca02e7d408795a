"""A lock that one process holds on a directory, and that ends with it.

Parts of one process, such as a training that is started anew in it, share the lock.

It is ``flock`` on a file in the directory. The kernel drops it when the process dies in whatever
way, so that a lock is never left over; the file itself stays, because removing it would let two
processes lock two files of one name. On NFS, Linux makes a lock on the server of it, which excludes
processes on other hosts and is dropped by the server when their lease ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import weakref
from pathlib import Path

from smorms3_dist.checkpoint.files.errors import CheckpointError, naming


class Lock:
    """Takes the lock, or fails at once.

    Args:
        path: The file, in a directory that exists.

    Attributes:
        shared: Whether this process had it already.

    Raises:
        CheckpointError: If another process has it, naming its host and pid, or if the file cannot
            be written or locked.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with naming(path, "opened"):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        mine = self._identity()
        held = next((lock for lock in list(_held) if lock._identity() == mine), None)
        self.shared = held is not None
        if held is not None:
            # A file description holds a lock until its last descriptor is closed.
            os.close(self._fd)
            self._fd = fcntl.fcntl(held._fd, fcntl.F_DUPFD_CLOEXEC, 0)
            _held.add(self)
            return
        try:
            with naming(path, "locked"):
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise CheckpointError(
                        path.parent,
                        f"is being written to by {self._holder()}: let it end, or choose another "
                        "directory",
                    ) from None
                except OSError as error:
                    if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                        raise
                    raise CheckpointError(
                        path.parent,
                        "its file system has no locks, so nothing would keep two jobs from writing "
                        "to it: mount it with locks (for Lustre, with the option flock), or choose "
                        "another directory",
                    ) from error
                holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, holder, 0)
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def check(self) -> None:
        """Looks whether it is still the lock of the directory.

        Raises:
            CheckpointError: If the directory was removed, or replaced by another.
        """
        try:
            found = os.stat(self._path)
            same = (found.st_dev, found.st_ino) == self._identity()
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                self._path.parent,
                "was removed or replaced while this job was writing to it, so its steps are no "
                "longer there, and another job may be writing. Start the job again",
            )

    def _identity(self) -> tuple[int, int] | None:
        if self._fd < 0:
            return None
        found = os.fstat(self._fd)
        return found.st_dev, found.st_ino

    def _holder(self) -> str:
        """Who has it, as far as the file says: it may be just about to be written."""
        try:
            holder = json.loads(os.pread(self._fd, 1000, 0))
            return f"process {int(holder['pid'])} on host {holder['host']}"
        except (ValueError, TypeError, KeyError):
            return "another process"

    def release(self) -> None:
        """Gives the lock up. It may be called again."""
        _held.discard(self)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.release()


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget() -> None:
    """A forked child, such as an iterator's worker, would keep the lock of a parent that died."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget)
