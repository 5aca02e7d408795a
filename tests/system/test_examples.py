"""The other examples: interrupted and resumed, each ends with the parameters of ChainerMN's own."""

from __future__ import annotations

import re
from pathlib import Path

import idx
import pytest
from mpirun import command, environment
from process import run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

PICTURES = {"loss.png", "compare.png"}
NUMBER = r"\d+(\.\d+)?"


def train(name: str, *arguments: str | Path, cwd: Path) -> str:
    """Runs an example on two ranks; returns all output."""
    script = EXAMPLES / name / f"train_{name}.py"
    job = command(2, "-W", "error", "-m", "smorms3_dist", script, *arguments)
    code, output = run(*job, env=environment(), cwd=cwd, limit=120)
    assert code == 0, output
    return output


def resumed(name: str, *arguments: str | Path, epochs: tuple[int, int], cwd: Path) -> str:
    """Trains for some epochs, and in a second run for the others; returns the second's output.

    ChainerMN's optimizer trains for all of them at once, from the same seed.
    """
    first, last = (["--epoch", str(number)] for number in epochs)
    train(name, *arguments, *first, "--checkpoint", "checkpoints", cwd=cwd)
    output = train(name, *arguments, *last, "--checkpoint", "checkpoints", "--compare", cwd=cwd)
    assert re.search(r"^smorms3_dist: going on from step \d+ of checkpoints$", output, re.M), output
    assert re.search(r"^largest parameter difference on any rank: 0\.0$", output, re.M), output
    return output


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.mpi
def test_a_resnet_with_workers_that_augment_images(tmp_path: Path) -> None:
    images = idx.write_images(tmp_path / "images", 64, 16)
    arguments = ["--data-dir", images, "--width", "4", "--batchsize", "8"]
    output = resumed("resnet", *arguments, epochs=(1, 2), cwd=tmp_path)
    assert "fashion-mnist: 64 images to train, 16 to validate\n" in output
    assert re.search(rf"^validation accuracy: {NUMBER}%$", output, re.M), output
    made = {"log", "chainermn", "accuracy.png", "snapshot_iter_8", *PICTURES}
    assert files(tmp_path / "result") == made
    steps = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    assert steps == {"step-0000000004", "step-0000000008"}


@pytest.mark.mpi
def test_a_language_model_that_remembers_across_batches_and_runs(tmp_path: Path) -> None:
    # The rows of a rank have nine windows: an epoch ends in the middle of a memory.
    arguments = ["--subset", "1900", "--unit", "16", "--prompt", "this license"]
    output = resumed("language_model", *arguments, epochs=(1, 2), cwd=tmp_path)
    assert re.search(rf"^validation perplexity: {NUMBER}$", output, re.M), output
    assert re.search(r"^a sample: this license\b", output, re.M), output
    assert files(tmp_path / "result") == {"log", "chainermn", *PICTURES}


@pytest.mark.mpi
def test_a_dcgan_with_two_optimizers(tmp_path: Path) -> None:
    images = idx.write_images(tmp_path / "images", 40, 1)
    arguments = ["--dataset", "fashion-mnist", "--data-dir", images, "--channels", "8"]
    output = resumed("dcgan", *arguments, "--batchsize", "5", epochs=(1, 2), cwd=tmp_path)
    assert re.search(r"^samples: result/samples_002.png$", output, re.M), output
    made = {"samples_001.png", "samples_002.png"}
    assert files(tmp_path / "result") == {"log", "chainermn", *made, *PICTURES}
    ours, theirs = tmp_path / "result", tmp_path / "result" / "chainermn"
    for name in made:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.mpi
def test_a_transformer_in_float16_with_fp32_masters_and_warm_up(tmp_path: Path) -> None:
    arguments = [
        "--dtype",
        "mixed16",
        "--pairs",
        "100",
        "--unit",
        "8",
        "--layers",
        "1",
        "--warmup",
        "2",
    ]
    output = resumed("seq2seq", *arguments, "-b", "10", epochs=(1, 2), cwd=tmp_path)
    assert "100 dates to train, 10 to validate\n" in output
    assert len(re.findall(r"^ *\w.* ->  .* instead of \d{4}-\d\d-\d\d$", output, re.M)) == 5, output
    assert re.search(rf"^wholly right: {NUMBER}%$", output, re.M), output
    assert files(tmp_path / "result") == {"log", "chainermn", *PICTURES}
