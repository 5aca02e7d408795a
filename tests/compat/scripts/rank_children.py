"""A ChainerMN script, as most are: nothing stands under a main block, and the data hold a lambda.

The argument is the start method that it chooses; without one it leaves that to Chainer.
"""

import functools
import multiprocessing
import operator
import sys

import chainer
import chainermn
from mpi4py import MPI

if sys.argv[1:]:
    multiprocessing.set_start_method(sys.argv[1], force=True)
comm = chainermn.create_communicator("naive")
data = chainermn.scatter_dataset(range(16), comm)
# What can be pickled gets as far as the children, where those are not forked.
double = functools.partial(operator.mul, 2) if sys.argv[1:] else lambda i: 2 * i
data = chainer.datasets.TransformDataset(data, double)
iterator = chainer.iterators.MultiprocessIterator(data, 3, repeat=False, n_processes=2)
total = sum(map(sum, iterator))
iterator.finalize()
print("read", comm.mpi_comm.allreduce(total, MPI.SUM), flush=True)
