"""What a child prints: in its order, and in time."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from smorms3_dist.launch import child
from smorms3_dist.launch.child import Child

import pytest


async def nothing() -> None:
    pass


def test_if_both_are_there_a_traceback_comes_after_what_was_printed(tmp_path: Path) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    code = (
        "import os, sys, time\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "os.write(2, b'err\\n')\n"
        "os.write(1, b'out\\n')\n"
        "open(sys.argv[2], 'w').close()\n"
    )

    async def run() -> list[bytes]:
        found: list[bytes] = []
        one = Child([sys.executable, "-c", code, str(go), str(done)], os.environ)
        reading = asyncio.create_task(one.read(lambda line, is_error: found.append(line), nothing))
        for _ in range(20):  # until it listens to both
            await asyncio.sleep(0)
        go.touch()
        while not done.exists():
            time.sleep(0.01)  # nothing is read meanwhile
        await asyncio.wait_for(reading, 60)
        await asyncio.wait_for(one.ended.wait(), 60)
        return found

    assert asyncio.run(run()) == [b"out\n", b"err\n"]


def test_the_beginning_of_a_line_is_given_when_no_more_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_UNFINISHED_S", 0.01)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "os.write(1, b'Loading')\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "os.write(1, b' done\\n')\n"
    )
    found: list[bytes] = []

    def take(piece: bytes, is_error: bool) -> None:
        found.append(piece)
        # Only then the rest of the line comes.
        (tmp_path / "go on").touch()

    async def run() -> None:
        one = Child([sys.executable, str(script), str(tmp_path / "go on")], os.environ)
        await asyncio.wait_for(one.read(take, nothing), 60)
        await asyncio.wait_for(one.ended.wait(), 60)

    asyncio.run(run())
    assert (found[0], b"".join(found)) == (b"Loading", b"Loading done\n")
