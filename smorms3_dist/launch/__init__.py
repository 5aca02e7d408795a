"""The launcher: ``smorms3-dist run``.

`arguments` reads the command line and `backends` turns it into the command of mpirun or srun.
`supervisor` runs jobs until one has succeeded, and `job` one of them: it listens, and mpirun or
srun start an `agent` for each rank, which connects to it (`wire`). The agent starts the script,
sends its lines (`output`) and says how it has ended. So the launcher knows of each rank what has
become of it, whatever the exit status of mpirun says.
"""
