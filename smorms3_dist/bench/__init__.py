"""``smorms3-dist bench``: how fast this machine trains, beside ChainerMN and plain Chainer.

In reading order: `commands` is the command line; `suite` has the cases, part by part, and runs them
in turn; `processes_of_cases` starts the processes of one; `conditions` says what else the machine
did. What these processes run: `update_step` (optimizer and communication alone), `whole_step`,
`rule_kernels`, `rank_exchanges` and `start_up`, with `ranks_of_mpi`; `workloads` has the models of
the first, and `clock` what all measure alike. `summary` makes tables of what was measured, and
`simulation` foretells steps of more ranks from it; `gpu_simulation` does so for GPUs, from assumed
speeds.

What PyTorch's interpreter imports of it, `clock` and `workloads`, needs NumPy alone. The checkout's
``benchmarks/`` adds PyTorch, checkpoints, pictures and a page.
"""
