"""``python -m smorms3_dist SCRIPT ARGS...``: runs an unmodified script with the patches applied.

In the place of a script it takes the commands of `smorms3_dist.cli`, too.

Where mpi4py is installed, its own runner runs the script, so that a rank which fails prints its
traceback and then takes the whole MPI job down, instead of leaving the other ranks waiting for it.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from smorms3_dist import cli, compat
from smorms3_dist.collectives.abort import end_job_on_exception
from smorms3_dist.command_line import meant
from smorms3_dist.compat.tracebacks import without_own_frames
from smorms3_dist.launch.environment import make_help_known
from smorms3_dist.launch.which_rank import which_rank
from smorms3_dist.optimizer.options import read_options
from smorms3_dist.optimizer.unmodified import UnmodifiedScript
from smorms3_dist.rank_page import Preempted, page

USAGE = """\
usage: python -m smorms3_dist [--shard[=OPTIONS]] SCRIPT [ARGS...]
       python -m smorms3_dist [--shard[=OPTIONS]] -m MODULE [ARGS...]
       python -m smorms3_dist COMMAND ...
       python -m smorms3_dist --help
       python -m smorms3_dist --version

Run a Python script or module, unmodified, with Chainer made to work on the installed versions of
Python, NumPy and setuptools. Under mpirun, a rank that raises or exits with a status other than
zero ends the whole job with that status (this needs mpi4py).

With --shard, chainermn.create_multi_node_optimizer makes sharded optimizers. OPTIONS are those of
smorms3_dist.create_multi_node_optimizer, such as gradients=replicated,check_finite=error.

Commands are those of smorms3-dist; a script of the same name is run as ./checkpoint, say.
"""


def main(arguments: list[str]) -> int:
    """Runs the command line; SystemExit of the script passes through.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit status: 2 if the command line is wrong; 1, after its traceback, if the script has
        raised something.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if arguments[:1] == ["--version"] or (arguments and arguments[0] in cli.COMMANDS):
        return cli.main(arguments)
    try:
        script, arguments = _shard(arguments)
        _check(arguments)
    except ValueError as error:
        program = "python -m smorms3_dist"
        print(f"{program}: error: {error}\n{program} --help says more", file=sys.stderr)
        return 2
    make_help_known()
    compat.apply()
    if script is not None:
        script.prepare()
    if arguments[0] == "-m" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = os.getcwd()  # as python -m
    pid = os.getpid()
    try:
        if find_spec("mpi4py") is not None:
            import mpi4py.run

            sys.argv[1:] = arguments
            mpi4py.run.main()
        else:
            _run(arguments)
    except Preempted:
        _end_without_abort()
        raise
    except BaseException as error:
        if os.getpid() != pid:
            _end_child(pid, error)
        page.failed = _status(error)
        if isinstance(error, Exception):
            # mpi4py's runner has seen it, and ends the job when this process ends.
            error.__traceback__ = without_own_frames(error, __file__)
            sys.excepthook(type(error), error, error.__traceback__)
            return page.failed
        raise
    finally:
        if script is not None and not page.failed and os.getpid() == pid:
            script.note_end()
    if os.getpid() != pid:
        _end_child(pid, None)
    return 0


def _end_child(pid: int, error: BaseException | None) -> NoReturn:
    """Ends a child that the script has forked, as Python would, but without the end of MPI.

    MPI does not know the child, which would wait in there for ever. What it raises ends the job.
    """
    try:
        mpi = sys.modules.get("mpi4py.MPI")
        if isinstance(error, SystemExit):
            if not isinstance(error.code, int | None):
                print(error.code, file=sys.stderr)
        elif error is not None:
            if mpi is not None and mpi.Is_initialized() and mpi.COMM_WORLD.size > 1:
                end_job_on_exception(mpi.COMM_WORLD.rank, pid)
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0 if error is None else _status(error))


def _status(error: BaseException) -> int:
    """The exit status of a script that has raised something."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _end_without_abort() -> None:
    """Takes back that mpi4py's runner ends the job of a script with an exit status."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None:
        mpi._set_abort_status(0)


def _shard(arguments: list[str]) -> tuple[UnmodifiedScript | None, list[str]]:
    """Takes ``--shard`` from the command line, if it comes first.

    Raises:
        ValueError: If its options are wrong.
    """
    flag, _, text = arguments[0].partition("=") if arguments else ("", "", "")
    if flag != "--shard":
        return None, arguments
    try:
        options = read_options(text)
    except ValueError as error:
        raise ValueError(f"--shard: {error}") from error
    try:
        rank, size = which_rank()[:2]
    except LookupError:
        rank, size = 0, 1
    return UnmodifiedScript(options, rank, size), arguments[1:]


def _check(arguments: list[str]) -> None:
    """Raises ValueError if what is to be run is none."""
    if not arguments:
        raise ValueError("no script is given")
    if arguments[0] == "-m":
        if len(arguments) < 2:
            raise ValueError("-m needs the name of a module")
    elif arguments[0].startswith("-"):
        close = meant(arguments[0], ("--shard", "--help", "--version"))
        raise ValueError(f"{arguments[0]!r} is not an option{close}")
    elif not Path(arguments[0]).exists():
        close = meant(arguments[0], cli.COMMANDS)
        raise ValueError(f"there is no script {arguments[0]!r} in {Path.cwd()}{close}")


def _run(arguments: list[str]) -> None:
    """Runs the script or module in this process, as ``python`` itself would."""
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
