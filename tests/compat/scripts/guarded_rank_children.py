"""A ChainerMN script that is fit for any start method; the arguments are those it tries."""

import multiprocessing
import sys

import chainer
import chainermn
from mpi4py import MPI


class Data(chainer.dataset.DatasetMixin):
    """Examples that tell whether the child that reads them has touched MPI."""

    def __len__(self):
        return 8

    def get_example(self, i):
        inside = multiprocessing.parent_process() is not None
        return i, inside, MPI.Is_initialized()


def main():
    comm = chainermn.create_communicator("naive")
    for method in sys.argv[1:]:
        multiprocessing.set_start_method(method, force=True)
        iterator = chainer.iterators.MultiprocessIterator(
            Data(), 3, repeat=False, shuffle=False, n_processes=2, shared_mem=1000
        )
        examples = [example for batch in iterator for example in batch]
        iterator.finalize()
        # A fork inherits what MPI has told its parent.
        assert examples == [(i, True, method == "fork") for i in range(8)], examples
        print(comm.mpi_comm.allreduce(len(examples)), "read by", method, flush=True)


if __name__ == "__main__":
    main()
