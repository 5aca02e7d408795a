"""The doctor: ``smorms3-dist doctor``.

`commands` reads the command line and prints, and `checks` is the list of what is looked at, in the
order in which it is shown. A check is a function that judges facts which are handed to it:
`packages`, `mpi`, `gpus`, `machine` and, for a job of two ranks, `jobs`. Facts that could take a
process down are asked for in another one (`probes`, `job`), which never outlives its time
(`processes`).
"""
