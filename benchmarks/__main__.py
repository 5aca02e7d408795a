"""The whole benchmark, and the page of what it has measured.

python -m benchmarks [--quick] [--only PART ...] [--rounds N] [--torch-python PATH] [--output FILE]
python -m benchmarks page

What is measured, and how to read it, is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.cases import PARTS, RESULTS, ROOT, can_import_torch, cases
from smorms3_dist.bench import summary
from smorms3_dist.bench.commands import add_arguments, measured, store


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["page"]:
        # It draws: only here matplotlib is needed.
        from benchmarks import page

        return page.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure this project beside its peers. 'python -m benchmarks page' makes "
        "docs/benchmarks.md of what is stored.",
        allow_abbrev=False,
    )
    add_arguments(parser, PARTS)
    add = parser.add_argument
    add("--torch-python", metavar="PATH", help="an interpreter that has PyTorch and NumPy")
    add(
        "--directory",
        type=Path,
        default=ROOT / ".cache",
        help="where checkpoints are written for a while (4 GB): choose the file system to measure",
    )
    options = parser.parse_args(arguments)
    python = options.torch_python or sys.executable
    has_torch = can_import_torch(python)
    if options.torch_python and not has_torch:
        parser.error(f"{python} cannot import torch and numpy")
    if not has_torch:
        print("PyTorch is left out: this interpreter does not have it; see --torch-python")
    options.directory.mkdir(parents=True, exist_ok=True)
    result = measured(options, cases(python if has_torch else None), ROOT)
    print("\n" + summary.text(result, PARTS))
    whole = not (options.quick or options.only)
    date = str(result["machine"]["started"]).partition(" ")[0]
    path = options.output or (RESULTS / f"{date}-suite.json" if whole else None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        store(result, path)
        print(f"stored {path}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
