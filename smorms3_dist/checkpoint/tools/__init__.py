"""What the command line does with checkpoints, without ranks and with bounded memory.

`commands` reads the arguments, and `reports` prints what there is. `exporting` makes a snapshot of
Chainer's from a step, `importing` a step from a snapshot, and `resharding` a step of another number
of ranks; they read and write arrays in pieces.
"""
