"""Run by smorms3-dist run in tests/launch: one of the ranks does what the test is about.

ranks.py WHAT [RANK]      the rank does it, in the middle of an exchange; rank 1 by default
"""

from __future__ import annotations

import os
import signal
import sys
import time

from mpi4py import MPI

comm = MPI.COMM_WORLD
what = sys.argv[1]
is_it = comm.rank == int(sys.argv[2] if len(sys.argv) > 2 else 1)

if what in ("raise", "exit", "kill", "vanish") and os.fork() == 0:
    # A helper, which holds the output of its rank.
    os.execvp("sleep", ["sleep", "3600"])

# Where ranks of this host have files in memory.
shared = os.environ.get("OMPI_MCA_btl_sm_backing_directory")  # noqa: SIM112

if what == "environment":
    names = sys.argv[3:]
    print(*(f"{name}={os.environ.get(name)}" for name in names))
elif what == "lines":
    for number in range(200):
        print(f"out {comm.rank} {number} " + "x" * 200)
        print(f"err {comm.rank} {number} " + "y" * 200, file=sys.stderr)
elif what == "huge and binary":
    sys.stdout.buffer.write(b"z" * (3 << 20) + b"\nafter\n")
    sys.stdout.buffer.write(bytes(range(256)) + b"\n\xff\xfe\nno end")
elif what == "leave":
    # A child that outlives its parent, and holds its pipes.
    if is_it and os.fork() == 0:
        os.execvp("sleep", ["sleep", "3600"])
    print("left", flush=True)
elif what == "vanish" and is_it:
    comm.Barrier()
    print("about to vanish with", shared, flush=True)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
elif is_it:
    comm.Barrier()
    print("about to", what, "with", shared, flush=True)
    if what == "raise":
        raise ValueError("the reason")
    if what == "exit":
        sys.exit(3)
    if what == "return 0 at once":
        os._exit(0)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(3600)
else:
    comm.Barrier()
    # The others wait for it for ever.
    comm.Barrier()
print("end of rank", comm.rank, flush=True)
