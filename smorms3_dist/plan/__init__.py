"""``smorms3-dist plan``: what a training will take, before it is started.

In reading order: `commands` is the command line; `setup` a model and how it is to be trained, laid
out by `smorms3_dist.layout` as a training would; `scripts` finds a model in a file; `demand` says
what a rank holds and sends, `times` how long a step takes, and `report` both in JSON and in tables.
Only `scripts` needs Chainer, and nothing needs MPI or a GPU. All of it is tested by the command
(test_commands_of_plan.py), the numbers against real optimizers (test_demand.py, test_times.py).
"""
