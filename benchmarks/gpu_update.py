"""The fused update on a GPU, beside a copy of the same bytes and beside its peers.

Rules, kinds of gradients, the parts of ranks, packing and norms; a step of many parameters; then
the peak memory of training steps, beside ChainerMN's: see `gpu_memory.py`.

    python benchmarks/gpu_update.py [--sizes 1e6 1e7 1e8 1e9] [--output FOLDER] [--seconds S]
        [--dry-run]

What tells most is measured first; each line is printed, and stored, as soon as it is there. With
``--seconds`` nothing is begun any more after so many, but the first line always is. Times are
medians of CUDA events around launches that are repeated until they take long enough; what stands
in one line was measured side by side. PyTorch is left out where it is not installed. A dry run
launches everything twice, times nothing, and measures no memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import smorms3_dist  # noqa: E402
from benchmarks import gpu_memory  # noqa: E402
from smorms3_dist.bench.processes_of_cases import CaseError  # noqa: E402
from smorms3_dist.kernels import tables  # noqa: E402
from smorms3_dist.kernels.chainer_rules import application_of  # noqa: E402
from smorms3_dist.kernels.cuda import APPROXIMATE, CupyLauncher  # noqa: E402
from smorms3_dist.kernels.narrow import BFLOAT16  # noqa: E402
from smorms3_dist.kernels.tables import Arrays, PackedPart, Preparation, Rates, Run  # noqa: E402
from tests.helpers.rank_threads import run_ranks  # noqa: E402

import chainer  # noqa: E402
import cupy  # noqa: E402
import numpy as np  # noqa: E402

RULES = ("SMORMS3", "Adam", "MomentumSGD")
KINDS = ("dense", "zero", "sparse")
RANKS = (8, 64)
MEMORY_S = 30
"""Without so much time left, memory is not compared."""

ROW = 256
"""Elements of an embedding's row; of a hundred rows one has a gradient."""

Seconds = Callable[[Callable[[], Any]], float]


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


def called_twice(work: Callable[[], Any]) -> float:
    """In the place of `seconds`, in a dry run."""
    work()
    work()
    return float("nan")


def numbers(size: int) -> Any:
    """Numbers from -1 to 1, the same on every GPU."""
    return cupy.sin(cupy.arange(size, dtype="f"))


def gradient(kind: str, size: int) -> Any:
    if kind == "zero":
        return cupy.zeros(size, "f")
    grad = numbers(size)
    if kind == "sparse":
        grad *= (cupy.arange(size) // ROW % 100) == 0
    return grad


class Fused:
    """A rule of Chainer's on one range: by the fused update, and by Chainer's own kernel."""

    def __init__(self, name: str, size: int, kind: str = "dense") -> None:
        self._rule = getattr(chainer.optimizers, name)().create_update_rule()
        self._rule.t = 1
        told = application_of(type(self._rule), self._rule, np.dtype("f"))
        assert told is not None
        self._formula, self._constants = told
        self._states = {n: cupy.full(size, n == "mem", "f") for n in self._formula.states}
        states = [*self._states.values()]
        self._arrays = Arrays(numbers(size), gradient(kind, size), states)
        self._size = size

    @property
    def nbytes(self) -> int:
        """Bytes that an update moves: the gradient is read, all else is read and written."""
        return (4 + 8 * (1 + len(self._states))) * self._size

    def by_table(
        self, exact: bool = False, mean: float = 1.0, more: Sequence[str] = ()
    ) -> Callable[[], None]:
        """One launch of the fused update, compiled with ``more`` options."""
        launcher = CupyLauncher(exact, more)
        table = tables.UpdateTable(launcher, self._formula, [Run(0, 0, 0, self._size)])
        table.set_rates([Rates(self._constants)])
        return lambda: table.update(self._arrays, Preparation(mean))

    def by_chainer(self) -> Callable[[], None]:
        """One launch of Chainer's kernel."""
        param = chainer.Parameter(self._arrays.param)
        param.grad = self._arrays.grad
        self._rule._state = self._states
        return lambda: self._rule.update_core(param)


def fused(name: str, size: int, seconds: Seconds) -> dict[str, Any]:
    """The fused update of one run, Chainer's own kernel, and a copy."""
    work = Fused(name, size)
    result: dict[str, Any] = {"rule": name, "size": size}
    result["fused_s"] = seconds(work.by_table())
    result |= of_copy(result["fused_s"], work.nbytes, seconds)
    result["fused_exact_s"] = seconds(work.by_table(exact=True))
    result["approximate_s"] = seconds(work.by_table(more=APPROXIMATE))
    result["chainer_s"] = seconds(work.by_chainer())
    if name == "Adam":
        result |= torch_adam(size)
    return result


def of_copy(measured: float, moved: int, seconds: Seconds) -> dict[str, float]:
    """Seconds of a copy that reads and writes so many bytes, and how near a time comes to it."""
    source = cupy.empty(moved // 2, cupy.int8)
    target = cupy.empty_like(source)
    taken = seconds(lambda: cupy.copyto(target, source))
    return {"copy_s": taken, "of_copy_bandwidth": taken / measured}


def by_gradients(name: str, kind: str, size: int, seconds: Seconds) -> dict[str, Any]:
    """The update by gradients that take other paths through divisions and roots."""
    work = Fused(name, size, kind)
    result = {"rule": name, "gradients": kind, "size": size, "fused_s": seconds(work.by_table())}
    return result | {"approximate_s": seconds(work.by_table(more=APPROXIMATE))}


def part(name: str, ranks: int, size: int, seconds: Seconds) -> dict[str, Any]:
    """The update of what one of many ranks owns."""
    work = Fused(name, max(size // ranks, 1))
    taken = seconds(work.by_table(mean=1 / ranks))
    result = {"rule": name, "ranks": ranks, "size": size, "fused_s": taken}
    return result | of_copy(taken, work.nbytes, seconds)


def packing(dtype: np.dtype, size: int, seconds: Seconds) -> dict[str, Any]:
    """Gradients into a bucket."""
    grad, bucket = numbers(size), cupy.empty(size, dtype)
    table = tables.PackTable(CupyLauncher(), [PackedPart(0, size, 0)])
    taken = seconds(lambda: table.pack([grad], bucket))
    label = "bfloat16" if dtype == BFLOAT16 else dtype.name
    result = {"launch": f"pack into {label}", "size": size, "fused_s": taken}
    return result | of_copy(taken, (4 + dtype.itemsize) * size, seconds)


def norm(size: int, seconds: Seconds) -> dict[str, Any]:
    """The norm of a gradient."""
    grad, check = numbers(size), tables.GradientCheck(CupyLauncher(), [size])
    taken = seconds(lambda: check.run([grad], grad.dtype))
    result = {"launch": "norm", "size": size, "fused_s": taken}
    return result | of_copy(taken, 4 * size, seconds)


def torch_adam(size: int) -> dict[str, Any]:
    """PyTorch's fused Adam."""
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
    return {"torch_s": statistics.median(times)}


def many(name: str, count: int, steps: int) -> dict[str, Any]:
    """A step of many parameters of mixed sizes, beside Chainer's loop over them."""
    rng = np.random.RandomState(0)
    sizes = [int(10 ** rng.uniform(1, 5.5)) for _ in range(count)]
    make = getattr(chainer.optimizers, name)

    def link() -> chainer.Link:
        made = chainer.Link()
        with made.init_scope():
            for index, size in enumerate(sizes):
                setattr(made, f"p{index}", chainer.Parameter(cupy.ones(size, "f")))
        return made

    def step_s(optimizer: Any, model: chainer.Link) -> float:
        grads = [cupy.full(param.shape, 0.5, "f") for param in model.params()]
        times = []
        for _ in range(steps):
            for param, grad in zip(model.params(), grads, strict=True):
                param.grad = grad
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            optimizer.update()
            cupy.cuda.Device().synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[steps // 6 :])

    theirs = link()
    plain = step_s(make().setup(theirs), theirs)

    def run(collectives: Any) -> float:
        ours = link()
        optimizer = smorms3_dist.create_multi_node_optimizer(make(), collectives).setup(ours)
        return step_s(optimizer, ours)

    result = {"rule": name, "parameters": count, "elements": sum(sizes), "chainer_s": plain}
    return result | {"ours_s": run_ranks(1, run)[0]}


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


TABLES = {
    "updates": "One launch for one range",
    "gradients": "Gradients of other kinds",
    "parts": "What one of several ranks owns",
    "others": "Packing, and norms",
    "many": "A step of many parameters",
    "memory": "Peak memory",
}
COLUMNS = {
    "rule": "rule",
    "launch": "launch",
    "gradients": "gradients",
    "ranks": "ranks",
    "parameters": "parameters",
    "elements": "elements",
    "size": "elements",
    "fused_s": "fused, ms",
    "fused_exact_s": "exact, ms",
    "approximate_s": "approximate, ms",
    "ours_s": "fused, ms",
    "chainer_s": "Chainer, ms",
    "torch_s": "PyTorch's fused, ms",
    "copy_s": "copy of the same bytes, ms",
    "of_copy_bandwidth": "of the copy's bandwidth",
}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a table of rows, of which some have columns that others have not."""
    columns = [column for column in COLUMNS if any(column in row for row in rows)]

    def cell(row: dict[str, Any], column: str) -> str:
        value = row.get(column, "")
        if not isinstance(value, float):
            return f"{value:.0e}" if column == "size" else str(value)
        return f"{1e3 * value:.4f}" if column.endswith("_s") else f"{value:.3f}"

    lines = ["| " + " | ".join(COLUMNS[column] for column in columns) + " |"]
    lines.append("|---" * len(columns) + "|")
    lines += ["| " + " | ".join(cell(row, each) for each in columns) + " |" for row in rows]
    return lines


def line(key: str, row: dict[str, Any]) -> str:
    """A row in one line."""
    head, _, cells = table([row])
    names, values = (part.strip("| ").split(" | ") for part in (head, cells))
    told = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    return f"{TABLES[key]}: {told}"


def markdown(result: dict[str, Any]) -> str:
    lines = ["# The fused update on a GPU", ""]
    lines += [f"- {key}: {value}" for key, value in result["machine"].items()]
    for key, title in TABLES.items():
        if key in result:
            rows = gpu_memory.markdown(result[key]) if key == "memory" else table(result[key])
            lines += ["", f"## {title}", "", *rows]
    return "\n".join(lines) + "\n"


def store(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{result['machine']['date']}-gpu-update"
    (folder / f"{name}.md").write_text(markdown(result))
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def sizes_that_fit(sizes: Sequence[float]) -> list[int]:
    """Those that leave room for arrays, and a copy of them."""
    free, _ = cupy.cuda.runtime.memGetInfo()
    fitting = []
    for size in map(int, sizes):
        if size * 64 > free:
            print(f"{size:.0e} elements are left out: {free / 2**30:.0f} GiB are free", flush=True)
        else:
            fitting.append(size)
    return fitting


Measure = tuple[str, int, Callable[[], dict[str, Any]]]


def in_order(sizes: Sequence[int], dry: bool) -> Iterator[Measure]:
    """What is measured, what tells most first: the table, the place in it, and the measurement."""
    how = called_twice if dry else seconds
    count, steps = (12, 2) if dry else (200, 30)
    middle, largest = max((n for n in sizes if n <= 1e8), default=sizes[0]), sizes[-1]

    def updates(size: int) -> Iterator[Measure]:
        for index, name in enumerate(RULES):
            place = sizes.index(size) * len(RULES) + index
            yield "updates", place, functools.partial(fused, name, size, how)

    yield from itertools.islice(updates(middle), 1)
    for index, name in enumerate(RULES):
        yield "many", index, functools.partial(many, name, count, steps)
        for turn, kind in enumerate(KINDS):
            place = index * len(KINDS) + turn
            yield "gradients", place, functools.partial(by_gradients, name, kind, middle, how)
        for turn, ranks in enumerate(RANKS):
            place = index * len(RANKS) + turn
            yield "parts", place, functools.partial(part, name, ranks, largest, how)
        if index == 0:
            for turn, dtype in enumerate((np.dtype(np.float32), BFLOAT16)):
                yield "others", turn, functools.partial(packing, dtype, middle, how)
            yield "others", 2, functools.partial(norm, middle, how)
            yield from itertools.islice(updates(middle), 1, None)
    for size in sizes:
        if size > middle:
            yield from updates(size)
    if not dry:
        yield "memory", 0, lambda: {}
    for size in sizes:
        if size < middle:
            yield from updates(size)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 1e7, 1e8, 1e9])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    result: dict[str, Any] = {"machine": describe()}
    print("\n".join(f"{key}: {value}" for key, value in result["machine"].items()), flush=True)
    sizes = sizes_that_fit(sorted(options.sizes))
    if not sizes:
        parser.error("none of the sizes fits")
    pool = cupy.get_default_memory_pool()
    found: dict[str, dict[int, dict[str, Any]]] = {}
    left_out: list[str] = []
    failure: CaseError | None = None
    for key, place, measure in in_order(sizes, options.dry_run):
        needed = MEMORY_S if key == "memory" else 0
        if found and time.monotonic() - began > options.seconds - needed:
            left_out.append(key)
            continue
        if key == "memory":
            try:
                result[key] = gpu_memory.compare(cupy.cuda.runtime.getDeviceCount())
                store(result, options.output)
            except CaseError as error:
                # What is left is measured all the same.
                failure = error
                print(error, flush=True)
            continue
        row = measure()
        pool.free_all_blocks()
        print(line(key, row), flush=True)
        found.setdefault(key, {})[place] = row
        result[key] = [of_place for _, of_place in sorted(found[key].items())]
        # What has been measured is kept, whatever becomes of what comes now.
        store(result, options.output)
    if left_out:
        told = (f"{left_out.count(key)} of {TABLES[key]!r}" for key in dict.fromkeys(left_out))
        print(f"left out after {options.seconds:g} s: {', '.join(told)}", flush=True)
    print(markdown(result))
    if failure is not None:
        sys.exit("memory has not been compared")


if __name__ == "__main__":
    main()
