"""``smorms3-dist run``."""

from __future__ import annotations

from collections.abc import Sequence

from smorms3_dist.launch.arguments import parse
from smorms3_dist.launch.supervisor import Supervisor, supervise


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`."""
    options = parse(arguments, program)
    return supervise(lambda: Supervisor(options), options.dry_run)
