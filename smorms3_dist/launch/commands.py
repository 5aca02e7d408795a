"""``smorms3-dist run``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from smorms3_dist.launch.arguments import make_parser, parse
from smorms3_dist.launch.backends import BackendError
from smorms3_dist.launch.environment import make_home_known
from smorms3_dist.launch.supervisor import Supervisor
from smorms3_dist.waiting import stall_warning

__all__ = ["main", "make_parser"]


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`."""
    options = parse(arguments, program)
    make_home_known()
    try:
        stall_warning()
        supervisor = Supervisor(options)
        if options.dry_run:
            print(supervisor.dry_run())
            return 0
        return asyncio.run(supervisor.run())
    except (BackendError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
