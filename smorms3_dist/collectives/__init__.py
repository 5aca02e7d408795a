"""What the ranks of a job do together: reduce, gather and broadcast, over each transport.

Its modules, in reading order (a test has the name of its module unless it is said):

- `base`: the protocol of the collectives, and the arithmetic that they share
  (tested in tests/collectives/test_collectives.py).
- `connect`: chooses the transport for a communicator, and for the memory of arrays
  (test_collectives.py, test_cuda_aware.py).
- `words`: what ranks of MPI exchange before each step, and when a script ends
  (tested in tests/step/test_leaving.py).
- `beside`: what is reduced beside the training
  (tested in tests/optimizer/test_double_buffering.py).
- `mpi`: over MPI, by a pairwise exchange of pieces (test_collectives.py).
- `chainermn`: over any object with ChainerMN's communicator interface (test_collectives.py).
- `between_hosts`: how arrays go between hosts over MPI.
- `sharing`: arrays that the ranks of a host share.
- `narrowing`: what goes over either of these in a narrow dtype
  (test_collectives.py, and in tests/step test_sent_narrow.py and test_gathered_narrow.py).
- `nccl_buckets`: buckets over NCCL, one by one (test_nccl.py).
- `nccl_waiting`: the end of waits for NCCL (test_nccl.py).
- `nccl_early`: over NCCL during the backward pass (tested in tests/step/test_cuda_overlap.py).
- `nccl_gather`: over NCCL beside the forward pass (tested in tests/step/test_cuda_gather.py).
- `nccl`: on GPUs over NCCL, by buckets.
- `cuda_aware`: on GPUs over an MPI library that takes their pointers.
- `through_host`: on GPUs through host memory, over any of the transports there.
- `clocks`: how far the clocks of ranks are apart, for timelines.
- `gpus`: which GPU a rank uses.
- `abort`: ends the job of MPI when one rank fails.
"""
