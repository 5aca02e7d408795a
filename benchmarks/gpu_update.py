"""The fused SMORMS3 update on a GPU, beside a copy of the same bytes and beside its peers.

Then the peak memory of training steps, beside ChainerMN's: see `gpu_memory.py`.

    python benchmarks/gpu_update.py [--sizes 1e6 1e7 1e8 1e9] [--output FOLDER]

Times are medians of CUDA events around launches that are repeated until they take long enough; each
table is measured in one run, side by side. PyTorch is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import smorms3_dist  # noqa: E402
from benchmarks import gpu_memory  # noqa: E402
from smorms3_dist.kernels.cuda import CupyLauncher  # noqa: E402
from smorms3_dist.kernels.tables import Arrays, Rates, Run, UpdateTable  # noqa: E402
from tests.helpers.rank_threads import run_ranks  # noqa: E402

import chainer  # noqa: E402
import cupy  # noqa: E402
import numpy as np  # noqa: E402

BYTES = 36
"""Bytes that a float32 update moves an element: parameter and 3 states read and written, gradient
read."""


def seconds(work: Callable[[], Any], rounds: int = 7, at_least: float = 0.02) -> float:
    """Seconds of one call on the GPU: the median over rounds."""
    work()
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()

    def measured(calls: int) -> float:
        start.record()
        for _ in range(calls):
            work()
        stop.record()
        stop.synchronize()
        return cupy.cuda.get_elapsed_time(start, stop) / 1e3

    calls = 1
    while measured(calls) < at_least:
        calls *= 2
    return statistics.median(measured(calls) / calls for _ in range(rounds))


def arrays(size: int) -> Arrays:
    make = cupy.random.default_rng(0).standard_normal
    param, grad = (make(size, dtype="f") for _ in range(2))
    return Arrays(param, grad, cupy.ones(size, "f"), cupy.zeros(size, "f"), cupy.zeros(size, "f"))


def fused(size: int) -> dict[str, Any]:
    """The fused update of one run, Chainer's own kernel, and a copy."""
    data = arrays(size)
    result: dict[str, Any] = {"size": size}
    for name, exact in (("fused", False), ("fused_exact", True)):
        table = UpdateTable(CupyLauncher(exact), [Run(0, 0, 0, size)])
        table.set_rates([Rates(1e-3, 1e-16)])
        result[f"{name}_s"] = seconds(lambda table=table: table.update(data))
    param = chainer.Parameter(data.param)
    param.grad = data.grad
    rule = chainer.optimizers.SMORMS3().create_update_rule()
    rule._state = {"mem": data.mem, "g": data.g, "g2": data.g2}
    result["chainer_s"] = seconds(lambda: rule.update_core(param))
    result["copy_s"] = copy(size * BYTES // 2)
    result["of_copy_bandwidth"] = result["copy_s"] / result["fused_s"]
    result |= torch_adam(size)
    return result


def copy(size: int) -> float:
    """Seconds of a copy of so many bytes, which reads and writes as many."""
    source = cupy.empty(size, cupy.int8)
    target = cupy.empty_like(source)
    return seconds(lambda: cupy.copyto(target, source))


def torch_adam(size: int) -> dict[str, Any]:
    """PyTorch's fused Adam, which moves 28 bytes an element."""
    try:
        import torch
    except ImportError:
        return {}
    param = torch.nn.Parameter(torch.randn(size, device="cuda"))
    param.grad = torch.randn(size, device="cuda")
    optimizer = torch.optim.Adam([param], fused=True)
    optimizer.step()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(7):
        start.record()
        optimizer.step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    del param, optimizer
    torch.cuda.empty_cache()
    return {"torch_adam_s": statistics.median(times)}


def many(count: int = 200) -> dict[str, Any]:
    """A step of many parameters of mixed sizes, beside Chainer's loop over them."""
    rng = np.random.RandomState(0)
    sizes = [int(10 ** rng.uniform(1, 5.5)) for _ in range(count)]

    def link() -> chainer.Link:
        made = chainer.Link()
        with made.init_scope():
            for index, size in enumerate(sizes):
                setattr(made, f"p{index}", chainer.Parameter(cupy.ones(size, "f")))
        return made

    def step_s(optimizer: Any, model: chainer.Link) -> float:
        grads = [cupy.full(param.shape, 0.5, "f") for param in model.params()]
        times = []
        for _ in range(30):
            for param, grad in zip(model.params(), grads, strict=True):
                param.grad = grad
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            optimizer.update()
            cupy.cuda.Device().synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[5:])

    theirs = link()
    plain = step_s(chainer.optimizers.SMORMS3().setup(theirs), theirs)

    def run(collectives: Any) -> float:
        ours = link()
        optimizer = smorms3_dist.create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives
        ).setup(ours)
        return step_s(optimizer, ours)

    sharded = run_ranks(1, run)[0]
    return {"parameters": count, "elements": sum(sizes), "chainer_s": plain, "ours_s": sharded}


def describe() -> dict[str, Any]:
    device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "GPU": device["name"].decode(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "CUDA runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "CuPy": cupy.__version__,
        "NumPy": np.__version__,
        "Python": platform.python_version(),
    }


def markdown(result: dict[str, Any]) -> str:
    lines = ["# The fused SMORMS3 update on a GPU", ""]
    lines += [f"- {key}: {value}" for key, value in result["machine"].items()]
    lines += [
        "",
        "| elements | fused, ms | exact, ms | Chainer's kernel, ms | copy of the same bytes, ms "
        "| of the copy's bandwidth | PyTorch's fused Adam, ms (28 of 36 bytes) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["fused"]:
        times = [
            f"{1e3 * row[key]:.4f}" if key in row else ""
            for key in ("fused_s", "fused_exact_s", "chainer_s", "copy_s")
        ]
        adam = f"{1e3 * row['torch_adam_s']:.4f}" if "torch_adam_s" in row else ""
        lines.append(
            f"| {row['size']:.0e} | {' | '.join(times)} | {row['of_copy_bandwidth']:.3f} | {adam} |"
        )
    step = result["many"]
    lines += [
        "",
        f"A step of {step['parameters']} parameters ({step['elements']} elements): "
        f"{1e3 * step['ours_s']:.3f} ms, Chainer's loop {1e3 * step['chainer_s']:.3f} ms: "
        f"{step['chainer_s'] / step['ours_s']:.1f} times faster.",
    ]
    if "memory" in result:
        lines += ["", *gpu_memory.markdown(result["memory"])]
    return "\n".join(lines) + "\n"


def store(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{result['machine']['date']}-gpu-update"
    (folder / f"{name}.md").write_text(markdown(result))
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 1e7, 1e8, 1e9])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    rows = []
    for size in map(int, options.sizes):
        free, _ = cupy.cuda.runtime.memGetInfo()
        if size * 64 > free:
            print(f"{size:.0e} elements are left out: {free / 2**30:.0f} GiB are free")
            continue
        rows.append(fused(size))
        cupy.get_default_memory_pool().free_all_blocks()
    result = {"machine": describe(), "fused": rows, "many": many()}
    # What has been measured is kept, whatever becomes of the processes that come now.
    store(result, options.output)
    cupy.get_default_memory_pool().free_all_blocks()
    result["memory"] = gpu_memory.compare(cupy.cuda.runtime.getDeviceCount())
    print(markdown(result))
    store(result, options.output)


if __name__ == "__main__":
    main()
