"""Stands in for mpirun in tests/launch/test_attempt.py, and does what mpirun does in bad cases.

fake_mpirun.py WHAT N COMMAND...
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

what, size, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]


def start(rank: int, size: int) -> subprocess.Popen[bytes]:
    names = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": size}
    environment = {name: str(value) for name, value in names.items()}
    environment["MPIRUN"] = str(os.getpid())
    return subprocess.Popen(command, env={**os.environ, **environment})


print("fake mpirun:", what, flush=True)
if what == "fails":
    sys.exit(7)
if what == "alone":
    ranks = [start(0, 1) for _ in range(size)]
else:
    ranks = [start(rank, size) for rank in range(size - (what in ("too few", "hangs")))]
if what in ("kills a rank", "stops a rank", "too few", "is killed"):
    while not os.path.exists(os.environ["WHEN"]):
        time.sleep(0.02)
if what in ("kills a rank", "stops a rank"):
    ranks[1].send_signal(signal.SIGKILL if what == "kills a rank" else signal.SIGSTOP)
if what in ("kills a rank", "too few"):
    sys.exit(0)
if what == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600)
sys.exit(max(abs(rank.wait()) for rank in ranks))
