"""The sharded checkpoint on disk: its format, and how it comes to be and is read.

Nothing here communicates, and nothing is pickled: who calls it brings the ranks together. In
reading order, with the tests of each in ``tests/checkpoint``:

- `directory` makes a step by one rename, and removes old ones (``test_directory``).
- `steps` finds what steps there are (``test_directory``).
- `worth` finds the best of them (``test_keeping``).
- `locking` lets one job write at a time (``test_directory``).
- `writing` writes the two files of each rank (``test_reading``).
- `manifest` describes a step: parameters, files, and what lies where (``test_manifest``).
- `manifest_json` is that as text with a checksum (``test_manifest``, ``test_fuzz``).
- `manifest_v1` reads what the first version of it said (``test_v1``).
- `reading` reads ranges of arrays from whichever files hold them (``test_reading``).
- `verify` finds damage, and where two steps differ (``test_verify``).
- `safetensors` is the format of the files (``test_safetensors``, ``test_fuzz``).
- `blocks` writes and reads bytes with checksums (``test_safetensors``).
- `strict_json` refuses what ``json`` would let pass (``test_safetensors``).
- `errors` has the error that names a file and what is wrong with it.
"""

from __future__ import annotations

from smorms3_dist.checkpoint.files.directory import CheckpointDirectory, new_token
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import FileRecord, Manifest, ParameterGroup
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
    "ParameterGroup",
    "Problem",
    "StepReader",
    "diff",
    "new_token",
    "verify",
    "write_rank",
    "write_shard",
]
