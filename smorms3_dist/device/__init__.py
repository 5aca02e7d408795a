"""The memory that arrays are in, a host's or a GPU's, and what is missing to use a GPU.

Its modules, in reading order:

- `memory`: allocates arrays, and tells what differs between host memory and a GPU's.
- `memory_files`: host memory that several processes have in common (tested by
  tests/collectives/test_sharing.py).
- `malloc`: tells glibc to keep freed memory for the next step.
- `forks`: tells of children that are forked from a process with a GPU.
- `gpu_check`: says what is missing for training on a GPU, and the remedy.
"""
