"""``smorms3-dist run``: starts ranks, watches them, starts them again.

In reading order: `arguments` reads the command line, and what `sources` finds in a file and in
variables (`hosts`: the lists in it), and `backends` makes the command of mpirun or srun of it, with
the `environment` of the ranks (`cpu_limit`: of their cores). `supervisor` makes attempts until one
has succeeded, or `restarts` have no point, and notes `events`. An `attempt` listens, at the host's
`addresses`, to the agents that mpirun or srun (a `child`) start beside each rank: what it knows of
each is in `ranks`, by which interfaces they are to talk in `network`, and how the job has ended in
`verdict`. An `agent` finds out
`which_rank` it is beside, starts the script, with `shared_memory` of the job's own, sends its lines
over a `wire` and says how it has ended. Lines are `output`, shown on a `terminal`; tracebacks may
be `alike`. So the launcher knows of each rank what has become of it, whatever the exit status of
mpirun says. All of them are started by `run_module`; `commands` puts it together.

Real jobs, in test_run.py, test `supervisor`, `agent`, `child`, `run_module` and
`commands`; test_environment.py tests `which_rank`, too, and test_output.py `terminal`.
"""
