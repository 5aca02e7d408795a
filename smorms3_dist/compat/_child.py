"""Run by path in a new child process: imports this package from where the parent has it."""

import sys
from pathlib import Path

_root = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, _root)
try:
    from smorms3_dist.compat import children  # the import applies the patches
finally:
    sys.path.remove(_root)
children.leave_mpi_alone(parent)  # type: ignore[name-defined]  # noqa: F821 (see children)
