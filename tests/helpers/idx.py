"""Writes small files in the form of Fashion-MNIST's."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def write(path: Path, values: np.ndarray) -> None:
    """Writes an array of bytes as a gzipped IDX file."""
    head = struct.pack(f">BBBB{values.ndim}i", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


def write_images(directory: Path, train: int, validation: int) -> Path:
    """Writes the four files with so many random images into a new directory."""
    directory.mkdir()
    rng = np.random.RandomState(0)
    for prefix, count in [("train", train), ("t10k", validation)]:
        images = rng.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = rng.randint(0, 10, count).astype(np.uint8)
        write(directory / f"{prefix}-images-idx3-ubyte.gz", images)
        write(directory / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return directory
