"""``smorms3-dist checkpoint export`` for other libraries: weights under their names."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

from smorms3_dist import create_multi_node_optimizer, save_checkpoint
from smorms3_dist.checkpoint.files import CheckpointDirectory

import chainer
import checkpoints
import converting
import models
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from chainer.optimizers import SMORMS3
from rank_threads import ThreadCollectives, run_ranks
from resuming import half_model, make

Arrays = dict[str, np.ndarray]


def as_chainer_saves(model: chainer.Link, path: Path) -> Arrays:
    chainer.serializers.save_npz(str(path), model)
    with np.load(path, allow_pickle=True) as file:
        arrays = {name: file[name] for name in file}
    path.unlink()
    return {name: array for name, array in arrays.items() if array.dtype != object}


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name


def stand_in_for_torch() -> Any:
    """What of PyTorch is used, to see what it is given."""
    torch: Any = types.ModuleType("torch")
    torch.from_numpy = lambda array: array
    torch.save = lambda tensors, file: pickle.dump(tensors, file)
    return torch


def loaded(path: Path) -> Arrays:
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    return dict(pickle.loads(path.read_bytes()))


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", stand_in_for_torch())


@pytest.mark.usefixtures("torch")
def test_the_weights_are_those_that_chainer_saves_with_what_links_keep_besides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (trainer, *_) = converting.save_trainer(tmp_path / "ck", 3)
    expected = as_chainer_saves(trainer.updater.get_optimizer("main").target, tmp_path / "model")
    assert {"l1/W", "norm/gamma", "norm/avg_mean", "norm/N"} <= expected.keys()
    for name in ("o.safetensors", "o.pt"):
        converting.succeed("export", tmp_path / "ck", tmp_path / name)
        assert f"weights of step 4 of {tmp_path / 'ck'} are in" in capsys.readouterr().out
        assert_same(loaded(tmp_path / name), expected)
    # The name says nothing then, and the file's own header has the step.
    converting.succeed("export", tmp_path / "ck", tmp_path / "o", "--format", "safetensors")
    with safetensors.safe_open(tmp_path / "o", "np") as file:
        assert file.metadata() == {"step": "4"}
    assert (tmp_path / "o").read_bytes() == (tmp_path / "o.safetensors").read_bytes()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_weights_of_a_loop_of_odd_shapes_and_dtypes(tmp_path: Path, world_size: int) -> None:
    def run(collectives: ThreadCollectives) -> chainer.Link:
        optimizer = make(collectives, make_model=half_model)
        save_checkpoint(tmp_path / "ck", optimizer)
        return optimizer.target

    expected = as_chainer_saves(run_ranks(world_size, run)[0], tmp_path / "model")
    converting.succeed("export", tmp_path / "ck", tmp_path / "o.safetensors")
    assert_same(loaded(tmp_path / "o.safetensors"), expected)


def test_weights_of_several_optimizers_with_two_paths_and_uninitialized_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Noted(converting.Net):
        def __init__(self) -> None:
            super().__init__()
            self.note = "by hand"
            self.register_persistent("note")

    def run(collectives: ThreadCollectives) -> list[chainer.Link]:
        links = [Noted(), converting.Tied()]
        optimizers = {
            name: create_multi_node_optimizer(SMORMS3(), collectives).setup(link)
            for name, link in zip(("main", "gen"), links, strict=True)
        }
        save_checkpoint(tmp_path / "ck", optimizers)
        return links

    main, gen = run_ranks(2, run)[0]
    out, tied = tmp_path / "o.safetensors", ("--tied", "gen:/twin/g=gen:/inner/g")
    assert "to which gen:/twin/g is a second path" in converting.fail(
        capsys, "export", tmp_path / "ck", out
    )
    converting.succeed("export", tmp_path / "ck", out, *tied)
    assert capsys.readouterr().err == "left out, because it is text: note\n"
    expected = as_chainer_saves(main, tmp_path / "model")
    assert "l1/W" not in expected and expected.pop("note") == "by hand"
    more = {f"gen{name}": param.array for name, param in gen.namedparams()}
    assert {"gen/inner/g", "gen/inner/a"} <= more.keys()
    assert_same(loaded(out), expected | more | {"gen/twin/g": gen.inner.g.array})


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("name", ["o.safetensors", "o.pth"])
def test_what_fails_leaves_no_file_of_weights(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    converting.save_trainer(tmp_path / "ck", 2, iterations=1)
    (tmp_path / name).write_text("mine")
    error = converting.fail(capsys, "export", tmp_path / "ck", tmp_path / name)
    assert f"{name}: exists already" in error and (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    with pytest.raises(SystemExit):
        converting.command("export", tmp_path / "ck", tmp_path / name, "--compress")
    assert "--compress is for npz" in capsys.readouterr().err

    def full(tensors: Any, file: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed")

    if name == "o.pth":
        monkeypatch.setattr(sys.modules["torch"], "save", full)
        error = converting.fail(capsys, "export", tmp_path / "ck", tmp_path / name)
        assert "cannot be written: PytorchStreamWriter failed" in error
    path = CheckpointDirectory(tmp_path / "ck").path_of(1) / "shard-00001.safetensors"
    checkpoints.flip(path, path.stat().st_size - 3)
    error = converting.fail(capsys, "export", tmp_path / "ck", tmp_path / name)
    assert "shard-00001.safetensors: is damaged: wrong checksum" in error
    assert os.listdir(tmp_path) == ["ck"]


def test_without_pytorch_it_is_said_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    converting.save_trainer(tmp_path / "ck", 1, iterations=1)
    monkeypatch.setitem(sys.modules, "torch", None)
    error = converting.fail(capsys, "export", tmp_path / "ck", tmp_path / "o.pt")
    assert "o.pt: cannot be written without PyTorch" in error
    assert "smorms3-dist[torch]" in error and "--format safetensors" in error


def test_pytorch_loads_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    (trainer, *_) = converting.save_trainer(tmp_path / "ck", 2)
    model = trainer.updater.get_optimizer("main").target
    converting.succeed("export", tmp_path / "ck", tmp_path / "o.pt")
    tensors = torch.load(tmp_path / "o.pt", weights_only=True)
    expected = as_chainer_saves(model, tmp_path / "model")
    assert_same({name: tensor.numpy() for name, tensor in tensors.items()}, expected)


def test_a_model_of_weights_alone_loads_by_chainer(tmp_path: Path) -> None:
    (trainer, *_) = converting.save_trainer(tmp_path / "ck", 2)
    converting.succeed("export", tmp_path / "ck", tmp_path / "o.safetensors")
    model = converting.Net(seed=3)
    chainer.serializers.NpzDeserializer(loaded(tmp_path / "o.safetensors")).load(model)
    models.assert_same_bits(model, trainer.updater.get_optimizer("main").target)
