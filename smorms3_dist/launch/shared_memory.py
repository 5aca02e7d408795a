"""Where Open MPI keeps what the ranks of a host share: a directory of the job, gone with it.

Open MPI removes the file of a rank that ends by itself, and not that of one that is killed: its 16
MiB would stay in the memory of the host until that is started again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

# The names since Open MPI 5.0, and before.
_VARIABLES = ("OMPI_MCA_btl_sm_backing_directory", "OMPI_MCA_btl_vader_backing_directory")


class SharedMemory:
    """The directory of one attempt on this host, which all its agents make and remove.

    Args:
        secret: That of the attempt: no other one has it.
        place: The file system in memory.

    Attributes:
        directory: The path, made or not.
    """

    def __init__(self, secret: bytes, place: Path = Path("/dev/shm")) -> None:
        name = hashlib.sha256(secret).hexdigest()[:12]
        self.directory = place / f"smorms3_dist-{os.getuid()}-{name}"

    def variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Makes the directory; returns the variables by which Open MPI uses it.

        Args:
            environment: Where the user has chosen another one, or there can be none, Open MPI goes
                on as ever.
        """
        if any(name in environment for name in _VARIABLES):
            return {}
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            return {}
        return dict.fromkeys(_VARIABLES, str(self.directory))

    def release(self, was_killed: bool) -> None:
        """Removes the directory: at the end of the last rank, or of one that was killed."""
        if was_killed:
            shutil.rmtree(self.directory, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # others of its ranks go on, or have removed it
                self.directory.rmdir()
