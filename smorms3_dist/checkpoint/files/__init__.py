"""The sharded checkpoint on disk: its format, and how it comes to be and is read.

Each rank writes what it owns into a safetensors file and the rest of its state into another
(`writing`); the leader describes them in a manifest (`manifest`) and makes a step of them by one
rename (`directory`). Ranges of any array are read from whichever files hold them, at any world size
(`reading`), checked (`verify`) and compared. Nothing here communicates, and nothing is pickled: who
calls it brings the ranks together.
"""

from __future__ import annotations

from smorms3_dist.checkpoint.files.directory import CheckpointDirectory, new_token
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import FileRecord, Manifest, Parameter
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.files.verify import Difference, Problem, diff, verify
from smorms3_dist.checkpoint.files.writing import Chunk, write_rank, write_shard

__all__ = [
    "CheckpointDirectory",
    "CheckpointError",
    "Chunk",
    "Difference",
    "FileRecord",
    "Manifest",
    "Parameter",
    "Problem",
    "StepReader",
    "diff",
    "new_token",
    "verify",
    "write_rank",
    "write_shard",
]
