"""``smorms3-dist checkpoint export``, and the way back: trainings go on by Chainer and by us."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from smorms3_dist import load_checkpoint, save_checkpoint

import chainer
import models
import numpy as np
import pytest
from chainer import serializers
from chainer.optimizers import MSVAG, SMORMS3, Adam
from converting import (
    Net,
    Tied,
    chainer_trainer,
    fail,
    go_on,
    save_trainer,
    sharded_trainer,
    succeed,
)
from rank_threads import ThreadCollectives, run_ranks
from resuming import (
    FIRST,
    LAST,
    SETTINGS,
    assert_same_states,
    assert_same_training,
    dynamic,
    facts,
    half_model,
    load,
    make,
    masters,
    save,
    train,
    whole_rule,
)


def states_of_rules(model: chainer.Link) -> dict[str, dict[str, np.ndarray]]:
    return {
        name: {key: np.asarray(value).reshape(-1) for key, value in param.update_rule.state.items()}
        for name, param in model.namedparams()
    }


def kept_by(trainer: Any) -> dict[str, Any]:
    """What a trainer has that goes on, beside parameters and states."""
    optimizer = trainer.updater.get_optimizer("main")
    iterator = trainer.updater.get_iterator("main")
    return {
        "counts": (trainer.updater.iteration, optimizer.t, optimizer.epoch),
        "iterator": (iterator.epoch, iterator.current_position, iterator._state.order.tolist()),
        "norm": [optimizer.target.norm.avg_mean.tolist(), int(optimizer.target.norm.N)],
        "log": [
            each.get("main/loss", each["iteration"])
            for each in trainer.get_extension("LogReport").log
        ],
    }


def load_npz(path: Path, trainer: Any) -> None:
    """As Chainer's, but for the warning that a trigger was not in the snapshot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The previous value of", UserWarning)
        serializers.load_npz(str(path), trainer)


def load_plain(path: Path, optimizer: Any) -> Any:
    """Loads an optimizer and its model from a snapshot of a trainer, by Chainer."""
    serializers.load_npz(str(path), optimizer, path="updater/optimizer:main/")
    serializers.load_npz(str(path), optimizer.target, path="updater/model:main/")
    return optimizer


class NotStarted:
    """A Trainer that has not run: Chainer cannot save the time that it has taken."""

    def __init__(self, optimizers: Any) -> None:
        iterator = chainer.iterators.SerialIterator(list(range(8)), 2)
        self.updater = chainer.training.updaters.StandardUpdater(iterator, optimizers)

    def serialize(self, serializer: Any) -> None:
        self.updater.serialize(serializer["updater"])


@pytest.mark.parametrize(("world_size", "options"), [(1, []), (3, ["--compress"])])
def test_plain_and_sharded_trainers_load_an_export(
    tmp_path: Path, world_size: int, options: list[str]
) -> None:
    saved = save_trainer(tmp_path / "ck", world_size, iterations=8)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz", *options)
    optimizers = [each.updater.get_optimizer("main") for each in saved]

    def resume(collectives: ThreadCollectives) -> Any:
        trainer, _ = sharded_trainer(collectives, tmp_path / "other", seed=1)
        load_npz(tmp_path / "o.npz", trainer)
        return trainer

    trainer = chainer_trainer(tmp_path, seed=1)
    load_npz(tmp_path / "o.npz", trainer)
    for each in (trainer, *run_ranks(2, resume)):
        assert kept_by(each) == kept_by(saved[0])
        models.assert_same_bits(each.updater.get_optimizer("main").target, optimizers[0].target)
    ours = trainer.updater.get_optimizer("main").target
    assert_same_states(states_of_rules(ours), models.gathered_states(optimizers))
    assert {p.update_rule.t for p in ours.params()} == {optimizers[0].t}

    model = Net(seed=1)
    serializers.load_npz(str(tmp_path / "o.npz"), model, path="updater/model:main/")
    models.assert_same_bits(model, optimizers[0].target)
    assert model.norm.avg_mean.tolist() == optimizers[0].target.norm.avg_mean.tolist()
    # And it can train.
    go_on(trainer, 12)


def no_rule(optimizer: Any) -> None:
    optimizer.target.c.update_rule = None


@pytest.mark.parametrize(
    ("configure", "make_model", "kind"),
    [
        *SETTINGS,
        pytest.param(whole_rule, models.Model, SMORMS3, id="whole rule"),
        pytest.param(no_rule, models.Model, SMORMS3, id="no rule"),
    ],
)
def test_an_export_has_all_states(
    tmp_path: Path, configure: Any, make_model: Any, kind: Any
) -> None:
    """Trained on from it and from the checkpoint, everything becomes the same."""
    options = {"configure": configure, "make_model": make_model, "kind": kind}

    def from_export(collectives: ThreadCollectives) -> Any:
        optimizer = load_plain(tmp_path / "o.npz", make(collectives, seed=9, **options))
        train(optimizer, LAST)
        return optimizer

    save(tmp_path / "ck", 3, **options)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    for world_size in (1, 2):
        expected = load(tmp_path / "ck", world_size, LAST, **options)
        assert_same_training(run_ranks(world_size, from_export), expected)
    if kind is SMORMS3 and make_model is models.Model:
        plain = SMORMS3().setup(models.Model(seed=1))
        configure(plain)
        train(load_plain(tmp_path / "o.npz", plain), LAST)
        models.assert_same_bits(plain.target, expected[0].target)


# Snapshots of Chainer's become checkpoints


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_snapshot_of_chainer_goes_on_at_any_world_size(tmp_path: Path, shuffle: bool) -> None:
    plain = chainer_trainer(tmp_path, shuffle=shuffle)
    go_on(plain, 6)
    serializers.save_npz(str(tmp_path / "snapshot"), plain)
    plain = chainer_trainer(tmp_path, seed=3, shuffle=shuffle)
    load_npz(tmp_path / "snapshot", plain)
    go_on(plain, 8)
    theirs = plain.updater.get_optimizer("main")

    def become(collectives: ThreadCollectives) -> None:
        trainer, _ = sharded_trainer(collectives, tmp_path / "ck", 1, shuffle)
        load_npz(tmp_path / "snapshot", trainer)
        go_on(trainer, 8)

    def resume(collectives: ThreadCollectives) -> Any:
        trainer, checkpoint = sharded_trainer(collectives, tmp_path / "ck", 2, shuffle)
        assert checkpoint.maybe_load(trainer) == 8
        return trainer

    run_ranks(1, become)
    for world_size in (1, 3):
        loaded = run_ranks(world_size, resume)
        optimizers = [each.updater.get_optimizer("main") for each in loaded]
        assert_same_states(models.gathered_states(optimizers), states_of_rules(theirs.target))
        for trainer, optimizer in zip(loaded, optimizers, strict=True):
            models.assert_same_bits(optimizer.target, theirs.target)
            assert (optimizer.t, trainer.updater.iteration) == (8, 8)
            assert optimizer.target.norm.avg_var.tolist() == theirs.target.norm.avg_var.tolist()
            iterator = trainer.updater.get_iterator("main")
            assert iterator.epoch_detail == pytest.approx(8 / 6, abs=world_size / 24)
            assert len(trainer.get_extension("LogReport").log) == 8


@pytest.mark.parametrize("kind", [SMORMS3, Adam, MSVAG])
def test_a_snapshot_with_masters_to_be_made_goes_on_as_by_chainer(
    tmp_path: Path, kind: Any
) -> None:
    snapshot = tmp_path / "snapshot"
    plain, again = (kind().setup(half_model()) for _ in range(2))
    for optimizer in (plain, again):
        optimizer.use_fp32_update()
    train(plain, FIRST)
    serializers.save_npz(str(snapshot), NotStarted(plain))
    train(load_plain(snapshot, again), LAST)

    def become(collectives: ThreadCollectives) -> None:
        optimizer = load_plain(snapshot, make(collectives, masters, half_model, kind, seed=8))
        save_checkpoint(tmp_path / "ck", optimizer)

    run_ranks(4, become)
    options = {"configure": masters, "make_model": half_model, "kind": kind}
    for optimizer in load(tmp_path / "ck", 2, LAST, **options):
        models.assert_same_bits(optimizer.target, again.target)


# What a model or a trainer may have besides


def test_parameters_without_arrays_stay_so(tmp_path: Path) -> None:
    class Lazy(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                self.used = models.Model({"a": (3, 5)})
                self.unused = chainer.links.Linear(None, 3)

    save(tmp_path / "ck", 2, make_model=Lazy)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    with np.load(tmp_path / "o.npz", allow_pickle=True) as found:
        assert found["updater/model:main/unused/W"].shape == ()
        assert found["updater/model:main/unused/W"].item() is None
    model = Lazy()
    serializers.load_npz(str(tmp_path / "o.npz"), model, path="updater/model:main/")
    assert model.unused.W.array is None


def test_tied_parameters_go_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = save(tmp_path / "ck", 2, make_model=Tied)
    error = fail(capsys, "export", tmp_path / "ck", tmp_path / "o.npz")
    assert "Say it: --tied /twin/g=PATH" in error
    error = fail(capsys, "export", tmp_path / "ck", tmp_path / "o.npz", "--tied", "/twin/g=/x")
    assert "has no parameter '/x'" in error
    succeed("export", tmp_path / "ck", tmp_path / "o.npz", "--tied", "/twin/g=/inner/g")
    plain = load_plain(tmp_path / "o.npz", SMORMS3().setup(Tied()))
    models.assert_same_bits(plain.target, saved[0].target)


def test_several_optimizers_go_through_sharded_or_not(tmp_path: Path) -> None:
    def new(collectives: ThreadCollectives, seed: int) -> tuple[dict[str, Any], Any]:
        optimizers = {
            "main": make(collectives, seed=seed),
            "critic": make(collectives, dynamic, half_model, Adam, seed=seed),
        }
        plain = {"plain": Adam().setup(models.Model({"x": (5,)}, seed=seed))}
        return optimizers, NotStarted({**optimizers, **plain})

    def save_all(collectives: ThreadCollectives) -> Any:
        optimizers, trainer = new(collectives, seed=1)
        for optimizer in optimizers.values():
            optimizer.update()
        every = trainer.updater.get_all_optimizers()
        for optimizer in every.values():
            train(optimizer, FIRST)
        save_checkpoint(tmp_path / "ck", optimizers, step=11, objects={"trainer": trainer})
        return every

    def load_all(collectives: ThreadCollectives) -> Any:
        optimizers, trainer = new(collectives, seed=9)
        serializers.load_npz(str(tmp_path / "o.npz"), trainer)
        for optimizer in optimizers.values():
            optimizer.lay_out()
        return trainer.updater.get_all_optimizers()

    def load_sharded(collectives: ThreadCollectives) -> Any:
        optimizers, _ = new(collectives, seed=9)
        load_checkpoint(tmp_path / "ck", optimizers)
        return optimizers

    saved = run_ranks(2, save_all)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    loaded = run_ranks(3, load_all)
    for ranks in (loaded, run_ranks(3, load_sharded)):
        for name in ("main", "critic"):
            assert_same_training([each[name] for each in ranks], [each[name] for each in saved])
    assert_same_states(*(states_of_rules(each[0]["plain"].target) for each in (loaded, saved)))
    assert [facts(each["plain"]) for each in loaded] == [facts(saved[0]["plain"])] * 3
    models.assert_same_bits(loaded[2]["plain"].target, saved[0]["plain"].target)


class Strange:
    """Keeps all that a rank's file can hold."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {
            "half": np.arange(3, dtype="f2"),
            "flags": np.array([[True], [False]]),
            "bytes": np.zeros((2, 0), "u1"),
            "text": np.array("gr\xfc\xdfe"),
            "texts": np.array([["a", ""], ["ccc", "d"]]),
            "empty": np.array(""),
            "nothing": None,
            "number": 7,
        }

    def serialize(self, serializer: Any) -> None:
        for key, value in self.values.items():
            self.values[key] = serializer(key, value)


def test_everything_that_objects_keep_goes_through(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer, theirs = make(collectives), Strange()
        save_checkpoint(tmp_path / "ck", optimizer, objects={"mine": theirs})
        succeed("export", tmp_path / "ck", tmp_path / "o.npz")
        for fill in (
            lambda mine: load_checkpoint(tmp_path / "ck", optimizer, objects={"mine": mine}),
            lambda mine: serializers.load_npz(str(tmp_path / "o.npz"), mine, path="mine/"),
        ):
            mine = Strange()
            mine.values = dict.fromkeys(theirs.values)
            fill(mine)
            for key, value in theirs.values.items():
                np.testing.assert_array_equal(mine.values[key], value)
        with np.load(tmp_path / "o.npz") as found:
            assert found["mine/flags"].dtype == bool

    run_ranks(1, run)
