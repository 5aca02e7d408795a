"""``smorms3-dist plan``: what a training will take, before it is started.

`setup` holds the sizes of a model and how it is to be trained, `memory` and `times` the formulas,
`scripts` finds the sizes of a model in a file, `commands` is the command line. Only `scripts` needs
Chainer, and nothing needs MPI or a GPU.
"""
