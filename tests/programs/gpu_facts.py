"""What the package takes for granted of a GPU, CuPy and NCCL, a line each; 1 if it is not so.

With the argument kernels it only launches a kernel of each kind, and compares with NumPy.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from smorms3_dist.device.gpu_check import missing_for_gpu
from smorms3_dist.device.memory import running_host
from smorms3_dist.kernels.chainer_rules import (
    ADAM,
    MOMENTUM_SGD,
    SGD,
    Constants,
    Formula,
)
from smorms3_dist.kernels.cuda import CupyLauncher
from smorms3_dist.kernels.tables import PackedPart, Rates, Run

import cupy
import kernel_checks as checks
import numpy as np
from cupy.cuda import nccl, nvrtc, runtime

RULES = (
    (SGD, (0.1,)),
    (MOMENTUM_SGD, (0.1, 0.9)),
    (ADAM, (1e-3, 0.1, 1e-3, 1e-8, 1.0, -1.0)),
)

SPIN = """extern "C" __global__ void spin(long long ticks) {
    long long start = clock64();
    while (clock64() - start < ticks) {}
}"""
failed = False


def say(what: str, value: Any) -> None:
    print(f"{what:45} {value}", flush=True)


def check(what: str, look: Callable[[], Any]) -> None:
    global failed
    try:
        value = look()
        say(what, "ok" if value is None else value)
    except Exception as error:
        failed = True
        say(what, f"FAILED: {type(error).__name__}: {error}")


def update_by(device: checks.Device, formula: Formula, constants: Constants) -> None:
    rates, dtypes = [Rates(constants)], ("float32",) * 3
    checks.check_update(device, dtypes, [Run(0, 0, 0, 9001)], rates, formula=formula)


def launch_each_kind() -> None:
    exact = checks.Device(CupyLauncher(exact=True), cupy.asarray, cupy.asnumpy)
    contracting = checks.Device(CupyLauncher(), cupy.asarray, cupy.asnumpy)
    grad = checks.numbers(np.random.RandomState(1), 9001, "float32")
    parts = [PackedPart(0, grad.size, 3)]
    for dtypes in checks.DTYPES:
        what = f"update {'-'.join(dtypes)}"
        check(
            what,
            lambda dtypes=dtypes: checks.check_update(exact, dtypes, [Run(0, 0, 0, 9001)]) and None,
        )
    float32 = ("float32",) * 3
    for formula, constants in RULES:
        check(f"update by {formula.name}", functools.partial(update_by, exact, formula, constants))
    check("contracting training", lambda: checks.check_training(contracting, float32, checks.close))
    for dtype in ("float16", "uint16"):
        check(
            f"pack into {dtype}", lambda dtype=dtype: checks.check_pack(exact, dtype, [grad], parts)
        )
    check("norm", lambda: checks.check_norm(exact, [grad], "float32") is None)


def events() -> str:
    spin = cupy.RawKernel(SPIN, "spin")
    spin((1,), (1,), (np.int64(1),))
    cupy.cuda.Device().synchronize()
    event = cupy.cuda.Event(disable_timing=True)
    spin((1,), (1,), (np.int64(100_000_000),))
    event.record()
    busy = runtime.eventQuery(event.ptr)
    event.synchronize()
    after = runtime.eventQuery(event.ptr)
    assert (busy, after) == (600, 0), (busy, after)
    return "600 while it is busy, then 0"


def pageable_copy(nbytes: int) -> None:
    spin, stream = cupy.RawKernel(SPIN, "spin"), cupy.cuda.Stream(non_blocking=True)
    host = np.full(nbytes, 1, np.uint8)
    with stream:
        there = cupy.zeros(nbytes, np.uint8)
        spin((1,), (1,), (np.int64(100_000_000),))
    there.set(host, stream=stream)
    host[...] = 9
    stream.synchronize()
    assert (there.get() == 1).all(), "what was overwritten afterwards has come to the GPU"


def pinned_memory() -> str:
    memory = cupy.cuda.PinnedMemory(5_000_001)
    array = np.ndarray(5_000_001, np.uint8, buffer=cupy.cuda.PinnedMemoryPointer(memory, 0))
    array[...] = 3
    assert (cupy.asarray(array) == 3).all()
    return f"{memory.size} bytes for 5000001"


def nccl_memory() -> str:
    before = runtime.memGetInfo()[0]
    comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    assert comm.check_async_error() is None
    return f"{(before - runtime.memGetInfo()[0]) >> 20} MiB for a communicator"


def nothing_is_missing() -> None:
    missing = missing_for_gpu(nccl=True)
    assert missing is None, missing


def devices() -> int:
    count = runtime.getDeviceCount()
    for number in range(count):
        found = runtime.getDeviceProperties(number)
        words = [found["name"].decode(), f"sm_{found['major']}{found['minor']}"]
        words += [f"{found['multiProcessorCount']} SMs", f"{found['totalGlobalMem'] >> 20} MiB"]
        say(f"GPU {number}", ", ".join([*words, runtime.deviceGetPCIBusId(number)]))
    return count


def main() -> None:
    if sys.argv[1:] != ["kernels"]:
        say("host", running_host())
        say("Python, NumPy, CuPy", (sys.version.split()[0], np.__version__, cupy.__version__))
        say("CUDA runtime, driver", (runtime.runtimeGetVersion(), runtime.driverGetVersion()))
        say("NVRTC, newest GPU that it knows", (nvrtc.getVersion(), max(nvrtc.getSupportedArchs())))
        say("NCCL", nccl.get_version())
        check("GPUs", devices)
        # Other than 0, one process alone can use it.
        check("compute mode", lambda: runtime.deviceGetAttribute(20, 0))
        check("reads all host memory itself", lambda: runtime.deviceGetAttribute(88, 0))
        check("all that is needed", nothing_is_missing)
        check("cudaEventQuery", events)
        for nbytes in (4096, 60_000, 200_000, 10_000_000):
            check(f"copy of {nbytes} pageable bytes", lambda n=nbytes: pageable_copy(n))
        check("page-locked memory", pinned_memory)
        check("NCCL", nccl_memory)
    launch_each_kind()
    sys.exit(failed)


main()
