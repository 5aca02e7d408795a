"""Runs a command with a hard time limit, for tests: all its processes end with it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest


def start(
    *command: str | Path, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """Starts a command as the leader of a process group, stdout and stderr in one pipe."""
    return subprocess.Popen(
        [str(part) for part in command],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], limit: float = 120) -> tuple[int, str]:
    """Waits for at most ``limit`` seconds; returns the exit code and the rest of the output."""
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{process.args} took more than {limit} s; its output:\n{output}")
    return process.returncode, output


def run(
    *command: str | Path,
    limit: float = 120,
    env: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
) -> tuple[int, str]:
    """Starts a command and waits for it."""
    return finish(start(*command, env=env, cwd=cwd), limit)
