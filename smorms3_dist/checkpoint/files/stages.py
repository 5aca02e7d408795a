"""The stages of a save, for tests that kill a process at each of them.

Where the environment variable ``SMORMS3_DIE_AT`` is ``STAGE`` or ``STAGE:RANK``, the process (of
that rank) sends SIGKILL to itself when it comes to the stage. It is for tests only.
"""

from __future__ import annotations

import os
import signal

STAGES = (
    "saving begun",
    "shard file begun",
    "shard file half written",
    "shard file written",
    "shard file synced",
    "rank file begun",
    "rank file half written",
    "rank file written",
    "rank file synced",
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


def reach(stage: str, rank: int = 0) -> None:
    """Dies here if a test wants it so.

    Args:
        stage: One of `STAGES`.
        rank: The rank that comes to it.
    """
    if os.environ.get("SMORMS3_DIE_AT") in (stage, f"{stage}:{rank}"):
        os.kill(os.getpid(), signal.SIGKILL)
