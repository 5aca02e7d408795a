"""``smorms3-dist run``."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Sequence

from smorms3_dist.launch.arguments import make_parser, parse
from smorms3_dist.launch.backends import BackendError, LibraryCheck, choose
from smorms3_dist.launch.environment import make_home_known
from smorms3_dist.waiting import stall_warning

__all__ = ["main", "make_parser"]


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`."""
    options = parse(arguments, program)
    make_home_known()
    try:
        stall_warning()
        with contextlib.ExitStack() as stack:
            check = None
            if options.is_python and not options.dry_run:
                check = LibraryCheck({**os.environ, **options.environment})
                stack.enter_context(check)
            backend = choose(options.backend)
            # Not before: with asyncio, this takes as long as the check, which goes on meanwhile.
            import asyncio

            from smorms3_dist.launch.supervisor import Supervisor

            supervisor = Supervisor(options, backend, check)
            if options.dry_run:
                print(supervisor.dry_run())
                return 0
            status = asyncio.run(supervisor.run())
        # Python ends sooner if it does not look for garbage in all that it has imported.
        gc.freeze()
        return status
    except (BackendError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
