"""``smorms3-dist doctor``: is this machine fit for training?

In reading order: `commands` reads the command line and prints; `checks` is the list of what is
looked at, in the order in which it is shown, each of which gives one of the `findings`. A check
judges facts that are handed to it: `packages`, `mpi_findings`, `gpu_findings`, `machine` and, for a
job of `two_ranks_program`, `two_ranks`. Facts that could take a process down are asked for in
another one (`probes`), which never outlives its time (`processes`). Judgements are tested by
test_checks.py, all that runs by test_doctor.py.
"""
