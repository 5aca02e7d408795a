"""docs/checkpoints.md: its lines make a checkpoint of Chainer's snapshot, with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import smorms3_dist
from smorms3_dist import cli

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pages
import pytest
from chainer import training
from rank_threads import ThreadCollectives, run_ranks

SAVED, ITERATIONS = 5, 7
WITH, WITHOUT = pages.blocks(
    pages.section(pages.read("checkpoints.md"), "### A snapshot becomes a checkpoint"), "python"
)


class Net(chainer.Chain):
    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.RandomState(seed)
        with self.init_scope():
            self.l1 = L.Linear(6, 17, initialW=rng.standard_normal((17, 6)) * 0.3)
            self.norm = L.BatchNormalization(17)
            self.l2 = L.Linear(17, 3, initialW=rng.standard_normal((3, 17)) * 0.3)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        return F.softmax_cross_entropy(self.l2(F.tanh(self.norm(self.l1(x)))), y)


def trainer_of(optimizer: Any, out: Path, iterations: int = SAVED) -> training.Trainer:
    rng = np.random.RandomState(7)
    data = [(x.astype("f"), np.int32(i % 3)) for i, x in enumerate(rng.standard_normal((12, 6)))]
    iterator = chainer.iterators.SerialIterator(data, 4, shuffle=False)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    return training.Trainer(updater, (iterations, "iteration"), out=str(out))


def sharded(collectives: ThreadCollectives, seed: int = 1) -> Any:
    optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
    return optimizer.setup(Net(seed))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of a training by plain Chainer."""
    path = tmp_path_factory.mktemp("chainer") / "snapshot_iter_100"
    trainer = trainer_of(chainer.optimizers.SMORMS3().setup(Net(0)), path.parent)
    trainer.run()
    chainer.serializers.save_npz(str(path), trainer)
    return path


def run_lines(lines: str, snapshot: Path, directory: Path, **names: Any) -> None:
    """Runs lines of the page with the paths of this test."""
    assert '"snapshot_iter_100"' in lines and '"checkpoints"' in lines
    lines = lines.replace('"snapshot_iter_100"', repr(str(snapshot)))
    lines = lines.replace('"checkpoints"', repr(str(directory)) + names.pop("options", ""))
    exec(lines, {"chainer": chainer, "smorms3_dist": smorms3_dist, **names})


@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 3), (3, 1)])
def test_without_a_trainer_parameters_and_states_are_those_of_the_snapshot(
    snapshot: Path, tmp_path: Path, saving: int, loading: int
) -> None:
    def save(collectives: ThreadCollectives) -> None:
        optimizer = sharded(collectives)
        names = {"model": optimizer.target, "optimizer": optimizer}
        run_lines(WITHOUT, snapshot, tmp_path / "checkpoints", **names)

    def load(collectives: ThreadCollectives) -> None:
        optimizer = sharded(collectives, seed=2)
        manifest = smorms3_dist.load_checkpoint(tmp_path / "checkpoints", optimizer)
        assert (manifest.step, optimizer.t) == (SAVED, SAVED)
        optimizer.consolidate()
        if collectives.rank == 0:
            chainer.serializers.save_npz(str(tmp_path / "loaded"), optimizer)

    run_ranks(saving, save)
    run_ranks(loading, load)
    exported = str(tmp_path / "exported.npz")
    assert cli.main(["checkpoint", "export", str(tmp_path / "checkpoints"), exported]) == 0
    with np.load(snapshot, allow_pickle=True) as old, np.load(exported, allow_pickle=True) as new:
        keys = [k for k in old if k.startswith(("updater/model:main/", "updater/optimizer:main/"))]
        assert len(keys) > 20
        for key in keys:
            assert new[key].tobytes() == old[key].tobytes(), key
        with np.load(tmp_path / "loaded") as loaded:
            for key in (k for k in keys if "optimizer" in k):
                mine = loaded[key.removeprefix("updater/optimizer:main/")]
                assert mine.tobytes() == old[key].tobytes(), key


def test_with_a_trainer_the_next_save_is_the_checkpoint(snapshot: Path, tmp_path: Path) -> None:
    def go_on(collectives: ThreadCollectives) -> None:
        trainer = trainer_of(sharded(collectives), tmp_path / f"{collectives.rank}", ITERATIONS)
        options = ", every=(1, 'iteration')"
        run_lines(WITH, snapshot, tmp_path / "checkpoints", trainer=trainer, options=options)

    def load(collectives: ThreadCollectives) -> int | None:
        trainer = trainer_of(sharded(collectives, seed=2), tmp_path / "out")
        checkpoint = smorms3_dist.ShardedCheckpoint(tmp_path / "checkpoints")
        trainer.extend(checkpoint)
        return checkpoint.maybe_load(trainer)

    run_ranks(1, go_on)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
        f"step-{step:010}" for step in range(SAVED + 1, ITERATIONS + 1)
    ]
    assert run_ranks(2, load) == [ITERATIONS, ITERATIONS]


def test_what_is_done_with_a_step_uploads_and_evaluates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = pages.section(pages.read("checkpoints.md"), "### What is done with a step")
    upload, weights = pages.blocks(section, "python")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "rclone").write_text('#!/bin/sh\nexec cp -r "$2" "${3##*/}"\n')
    (programs / "rclone").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "chainer": chainer,
        "smorms3_dist": smorms3_dist,
        "subprocess": subprocess,
        "sys": sys,
        "Net": lambda: Net(2),
        "accuracy_of": lambda model: float(model.l1.W.array.sum()),
    }
    exec(upload, names)
    exec(weights, names)

    def save(collectives: ThreadCollectives) -> float:
        optimizer = sharded(collectives)
        for step, after_save in enumerate([names["upload"], names["weights"]]):
            directory = tmp_path / "checkpoints"
            smorms3_dist.save_checkpoint(directory, optimizer, step=step, after_save=after_save)
        return float(optimizer.target.l1.W.array.sum())

    (total, _) = run_ranks(2, save)
    assert (tmp_path / "step-0000000000" / "manifest.json").is_file()
    assert f"accuracy {total}\n" in capsys.readouterr().out


def test_pytorch_gives_the_same_with_the_weights_as_the_page_names_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    def save(collectives: ThreadCollectives) -> chainer.Chain:
        optimizer = sharded(collectives)
        smorms3_dist.save_checkpoint(tmp_path, optimizer)
        return optimizer.target

    model, _ = run_ranks(2, save)
    path = str(tmp_path / "digits.pt")
    assert cli.main(["checkpoint", "export", str(tmp_path), path]) == 0
    net = torch.nn.Sequential()
    net.add_module("l1", torch.nn.Linear(6, 17))
    net.add_module("norm", torch.nn.BatchNorm1d(17, eps=model.norm.eps))
    net.add_module("tanh", torch.nn.Tanh())
    net.add_module("l2", torch.nn.Linear(17, 3))
    section = pages.section(pages.read("checkpoints.md"), "### Weights for other libraries")
    (lines,) = pages.blocks(section, "python")
    exec(lines.replace('"digits.pt"', repr(path)), {"torch": torch, "net": net})
    x = np.random.RandomState(0).standard_normal((5, 6)).astype("f")
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        expected = model.l2(F.tanh(model.norm(model.l1(x)))).array
    with torch.no_grad():
        found = net.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
