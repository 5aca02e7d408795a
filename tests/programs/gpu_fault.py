"""A kernel that faults in the middle of a training: the error has to come at once, by its name."""

import sys
import time

import smorms3_dist
from smorms3_dist.collectives.nccl_waiting import NcclError

import chainer
import cupy
import models
from rank_threads import Meeting, ThreadCollectives

FAULT = """extern "C" __global__ void fault(float* nowhere) {
    long long start = clock64();
    while (clock64() - start < 200000000LL) {}
    nowhere[0] = 1;
}"""

link = models.Model()
link.to_device("@cupy:0")
# A single rank sends none otherwise, and its host never waits.
optimizer = smorms3_dist.create_multi_node_optimizer(
    chainer.optimizers.SMORMS3(),
    ThreadCollectives(0, Meeting(1, 60.0)),
    communication_dtype="float16",
).setup(link)
fault = cupy.RawKernel(FAULT, "fault")
try:
    for step in range(5):
        for param in link.params():
            param.grad = cupy.ones_like(param.array)
        if step == 2:
            # The host is ahead of the GPU: it comes to wait before the fault happens.
            fault((1,), (1,), (0,))
            start = time.monotonic()
        optimizer.update()
except (NcclError, cupy.cuda.runtime.CUDARuntimeError) as error:
    took = time.monotonic() - start
    print(f"after {took:.1f} s: {type(error).__name__}: {error}")
    sys.exit(took > 20 or "IllegalAddress" not in str(error))
sys.exit("no error has come")
