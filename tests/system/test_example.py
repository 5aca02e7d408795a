"""examples/mnist: the training on two ranks, what it prints, and the data that it reads."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import idx
import numpy as np
import pytest
from mpirun import command, environment
from process import run

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mnist"


def train(
    *arguments: str | Path, launcher: tuple[str, ...] = (), ranks: int = 2, cwd: Path | None = None
) -> tuple[int, str]:
    """Runs the example; returns the exit code and all output."""
    script = EXAMPLE / "train_mnist.py"
    job = command(ranks, "-W", "error", "-m", "smorms3_dist", script, *arguments)
    return run(*launcher, *job, env=environment(), cwd=cwd, limit=120)


@pytest.fixture(scope="module")
def data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mnist_data", EXAMPLE / "data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A directory with small files in the form of Fashion-MNIST's."""
    return idx.write_images(tmp_path / "fashion", 100, 20)


@pytest.mark.mpi
def test_two_ranks_train_on_digits_and_match_chainermn_exactly(tmp_path: Path) -> None:
    code, output = train("--epoch", "2", "--compare", "--out", tmp_path / "result")
    assert code == 0, output
    # Nothing else reaches a pipe or a file: no warning, no escape code, nothing twice.
    number = r"\d+(\.\d+)?(e-\d+)?"
    table = rf"epoch +main/loss [^\n]*elapsed_time\n(\d +({number} +){{5}}\n){{2}}"
    expected = (
        r"mnist: 4000 images to train, 1000 to validate\n"
        rf"{table}validation accuracy: (?P<accuracy>{number})%\n"
        r"optimizer state: (?P<sharded>[\d,]+) bytes on a rank, (?P<whole>[\d,]+) unsharded\n"
        r"\nthe same training with ChainerMN's own optimizer:\n"
        rf"{table}time: {number} s, with ChainerMN's optimizer {number} s\n"
        r"largest parameter difference on any rank: 0\.0\n"
    )
    found = re.fullmatch(expected, output)
    assert found, output
    assert float(found["accuracy"]) > 85
    parameters = 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    assert found["whole"] == f"{12 * parameters:,}"
    # Shards are cut at multiples of 128 bytes, so a rank may own a little more than half.
    sharded = int(found["sharded"].replace(",", ""))
    assert 6 * parameters <= sharded <= 6 * parameters + 3 * 128
    log = json.loads((tmp_path / "result" / "log").read_text())
    assert [entry["epoch"] for entry in log] == [1, 2]


@pytest.mark.mpi
def test_a_terminal_gets_a_progress_bar_while_files_of_a_directory_are_trained_on(
    tmp_path: Path, fashion: Path
) -> None:
    terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    arguments = ["--epoch", "1", "--batchsize", "1", "--out", tmp_path / "result"]
    code, output = train(
        *["--dataset", "fashion-mnist", "--data-dir", fashion, *arguments],
        launcher=(sys.executable, "-c", terminal),
    )
    assert code == 0, output
    assert "Estimated time to finish" in output
    assert "\033[J" in output
    assert "fashion-mnist: 100 images to train, 20 to validate" in output
    assert "validation accuracy: " in output


@pytest.mark.mpi
def test_a_missing_directory_ends_all_ranks_with_the_remedy(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    code, output = train("--dataset", "fashion-mnist", "--data-dir", missing)
    assert code != 0
    assert f"{missing}/train-images-idx3-ubyte.gz does not exist" in output
    assert "--data-dir must hold the four gzipped files of Fashion-MNIST" in output


def test_digits_are_split_alike_every_time(data: ModuleType) -> None:
    train_part, validation = data.load("mnist")
    assert (len(train_part), len(validation)) == (4000, 1000)
    image, label = train_part[0]
    assert (image.shape, image.dtype, label.dtype) == ((784,), np.float32, np.int32)
    images, labels = train_part[:4000], [label for _, label in validation[:1000]]
    assert max(image.max() for image, _ in images) == 1
    assert min(image.min() for image, _ in images) == 0
    assert set(labels) == set(range(10))
    again = data.load("mnist")[0][:4000]
    assert all(a is not b and (a[0] == b[0]).all() for a, b in zip(images, again, strict=True))


def test_images_of_a_directory_keep_their_labels(data: ModuleType, tmp_path: Path) -> None:
    images = np.arange(2 * 28 * 28, dtype=np.uint16).astype(np.uint8).reshape(2, 28, 28)
    for prefix in "train", "t10k":
        idx.write(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        idx.write(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.array([7, 3], np.uint8))
    train_part, validation = data.load("fashion-mnist", tmp_path)
    for part in train_part, validation:
        assert [int(label) for _, label in part[:2]] == [7, 3]
        np.testing.assert_array_equal(part[1][0], images[1].ravel() / np.float32(255))


def test_a_damaged_file_and_images_without_labels_are_refused(
    data: ModuleType, fashion: Path
) -> None:
    path = fashion / "t10k-labels-idx1-ubyte.gz"
    good = path.read_bytes()
    odd = b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0"
    for content in (b"", b"\0\0\x08", odd, b"\0\0\x08\x01\0\0\0\x05abc"):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=f"{path} is damaged, or not an IDX file"):
            data.load("fashion-mnist", fashion)
    path.write_bytes(good)
    idx.write(fashion / "train-labels-idx1-ubyte.gz", np.zeros(99, np.uint8))
    with pytest.raises(ValueError, match="has 100 images but 99 labels for train"):
        data.load("fashion-mnist", fashion)


def test_without_files_or_network_the_remedy_is_named(
    data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable() -> None:
        raise OSError("no network")

    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    monkeypatch.setattr(data.chainer.datasets, "get_fashion_mnist", unreachable)
    with pytest.raises(FileNotFoundError, match=r"install Debian's dataset-fashion-mnist, or name"):
        data.load("fashion-mnist")


@pytest.mark.mpi
def test_the_documented_run_moves_from_four_ranks_to_two(tmp_path: Path) -> None:
    page = (EXAMPLE.parents[1] / "docs" / "checkpoints.md").read_text()
    line = r"^RANKS=(\d) bash launchers/quickstart.sh (.*--checkpoint \w+) *(?:# (.*))?$"
    runs = re.findall(line, page, re.M)
    expected = [("4", ""), ("2", "going on from step 40")]
    assert [(ranks, said) for ranks, _, said in runs] == expected
    for ranks, options, said in runs:
        code, output = train(*options.split(), ranks=int(ranks), cwd=tmp_path)
        assert code == 0, output
        assert said in output
    # The log of the first two epochs has come along.
    log = json.loads((tmp_path / "result" / "log").read_text())
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]
    assert log[-1]["validation/main/accuracy"] > 0.85
