"""``smorms3-dist checkpoint export`` and ``import``: trainings go on, whichever way they came."""

from __future__ import annotations

import functools
import random
import warnings
from pathlib import Path
from typing import Any

from smorms3_dist import (
    create_multi_node_optimizer,
    load_checkpoint,
    save_checkpoint,
)
from smorms3_dist.checkpoint import trainer_state
from smorms3_dist.checkpoint.files import CheckpointDirectory
from smorms3_dist.checkpoint.tools import npz_keys
from smorms3_dist.collectives.threads import ThreadCollectives, run_ranks
from smorms3_dist.extensions import snapshot as snapshot_extension
from smorms3_dist.optimizer import serialization

import chainer
import models
import numpy as np
import pytest
from chainer import serializers
from chainer.optimizers import MSVAG, SMORMS3, Adam
from converting import (
    Net,
    NotStarted,
    Tied,
    chainer_trainer,
    fail,
    go_on,
    rank_file,
    save_chainer,
    save_trainer,
    sharded_trainer,
    succeed,
)
from test_resume import (
    FIRST,
    LAST,
    SETTINGS,
    assert_same_states,
    dynamic,
    facts,
    half_model,
    make,
    masters,
    train,
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
            each["main/loss"] if "main/loss" in each else each["iteration"]
            for each in log_of(trainer)
        ],
    }


def log_of(trainer: Any) -> list[dict[str, Any]]:
    return trainer.get_extension("LogReport").log


def load_npz(*arguments: Any, **options: Any) -> None:
    """As Chainer's, but for the warning that a trigger was not in the snapshot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The previous value of", UserWarning)
        serializers.load_npz(*arguments, **options)


@pytest.mark.parametrize("options", [[], ["--compress"]], ids=["stored", "compressed"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_plain_chainer_trainer_loads_an_export(
    tmp_path: Path, world_size: int, options: list[str]
) -> None:
    saved = save_trainer(tmp_path / "ck", world_size, iterations=8)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz", *options)

    trainer = chainer_trainer(tmp_path, seed=1)
    load_npz(str(tmp_path / "o.npz"), trainer)
    assert kept_by(trainer) == kept_by(saved[0])
    optimizers = [each.updater.get_optimizer("main") for each in saved]
    ours = trainer.updater.get_optimizer("main").target
    models.assert_same_bits(ours, optimizers[0].target)
    assert_same_states(states_of_rules(ours), models.gathered_states(optimizers))
    assert {p.update_rule.t for p in ours.params()} == {optimizers[0].t}

    model = Net(seed=1)
    serializers.load_npz(str(tmp_path / "o.npz"), model, path="updater/model:main/")
    models.assert_same_bits(model, optimizers[0].target)
    assert model.norm.avg_mean.tolist() == optimizers[0].target.norm.avg_mean.tolist()
    # And it can train.
    go_on(trainer, 12)


def test_a_plain_trainer_goes_on_exactly(tmp_path: Path) -> None:
    """From one rank, training by Chainer alone is what the training would have become."""
    save_trainer(tmp_path / "ck", 1, iterations=8)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")

    def uninterrupted(collectives: ThreadCollectives) -> Any:
        trainer, checkpoint = sharded_trainer(collectives, tmp_path / "ck", seed=1)
        assert checkpoint.maybe_load(trainer) == 8
        trainer.extend(lambda trainer: None, name="ShardedCheckpoint", trigger=(1, "iteration"))
        np.random.seed(3)
        go_on(trainer, 14)
        return trainer

    plain = chainer_trainer(tmp_path, seed=1)
    load_npz(str(tmp_path / "o.npz"), plain)
    np.random.seed(3)
    go_on(plain, 14)
    (ours,) = run_ranks(1, uninterrupted)
    models.assert_same_bits(
        plain.updater.get_optimizer("main").target, ours.updater.get_optimizer("main").target
    )
    assert kept_by(plain)["iterator"] == kept_by(ours)["iterator"]


def test_a_sharded_trainer_loads_an_export(tmp_path: Path) -> None:
    saved = save_trainer(tmp_path / "ck", 2, iterations=5)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")

    def load(collectives: ThreadCollectives) -> Any:
        trainer, _ = sharded_trainer(collectives, tmp_path / "other", seed=1)
        load_npz(str(tmp_path / "o.npz"), trainer)
        return trainer

    for trainer in run_ranks(3, load):
        assert kept_by(trainer) == kept_by(saved[0])
        models.assert_same_bits(
            trainer.updater.get_optimizer("main").target,
            saved[0].updater.get_optimizer("main").target,
        )


@pytest.mark.parametrize(("configure", "make_model", "kind"), SETTINGS)
def test_an_export_has_all_states(
    tmp_path: Path, configure: Any, make_model: Any, kind: Any
) -> None:
    """Trained on from it and from the checkpoint, everything becomes the same."""

    def save(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, configure, make_model, kind)
        optimizer.update()
        train(optimizer, FIRST, collectives.rank)
        optimizer.new_epoch()
        save_checkpoint(tmp_path / "ck", optimizer)

    def from_checkpoint(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, make_model, kind, seed=9)
        load_checkpoint(tmp_path / "ck", optimizer)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    def from_export(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, make_model, kind, seed=9)
        file = str(tmp_path / "o.npz")
        serializers.load_npz(file, optimizer, path="updater/optimizer:main/")
        serializers.load_npz(file, optimizer.target, path="updater/model:main/")
        train(optimizer, LAST, collectives.rank)
        return optimizer

    run_ranks(3, save)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    for world_size in (1, 2):
        expected, ours = run_ranks(world_size, from_checkpoint), run_ranks(world_size, from_export)
        assert facts(ours[0]) == facts(expected[0])
        models.assert_same_bits(ours[0].target, expected[0].target)
        assert_same_states(models.gathered_states(ours), models.gathered_states(expected))


@pytest.mark.parametrize("world_size", [1, 4])
def test_what_is_exported_and_imported_is_the_same(tmp_path: Path, world_size: int) -> None:
    saved = save_trainer(tmp_path / "ck", world_size, iterations=8)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    succeed("import", tmp_path / "o.npz", tmp_path / "imported")
    succeed("verify", tmp_path / "imported")
    succeed("diff", tmp_path / "ck", tmp_path / "imported")
    before = CheckpointDirectory(tmp_path / "ck").manifest(8)
    after = CheckpointDirectory(tmp_path / "imported").manifest(8)
    assert (after.step, after.t, after.epoch) == (before.step, before.t, before.epoch)
    assert after.world_size == world_size
    assert after.notes["iterators"] == before.notes["iterators"]
    theirs, texts = rank_file(tmp_path / "ck")
    ours, our_texts = rank_file(tmp_path / "imported")
    if world_size > 1:
        # What is rank 0's alone.
        theirs = {key: value for key, value in theirs.items() if not key.startswith("random/")}
    assert {key: value for key, value in ours.items() if key in theirs} == theirs
    assert all(key.startswith("models/main/norm/") for key in ours.keys() - theirs.keys())
    assert our_texts["values"] == texts["values"]

    def load(collectives: ThreadCollectives) -> Any:
        trainer, checkpoint = sharded_trainer(collectives, tmp_path / "imported", seed=1)
        assert checkpoint.maybe_load(trainer) == 8
        return trainer

    optimizers = [each.updater.get_optimizer("main") for each in saved]
    for ranks in {world_size, 2}:
        loaded = run_ranks(ranks, load)
        ours_now = [each.updater.get_optimizer("main") for each in loaded]
        models.assert_same_bits(ours_now[-1].target, optimizers[0].target)
        assert_same_states(models.gathered_states(ours_now), models.gathered_states(optimizers))
        expected = kept_by(saved[0])
        for trainer in loaded:
            ours_kept = kept_by(trainer)
            if ranks != world_size:
                # The order is drawn anew.
                assert ours_kept["iterator"][:2] == expected["iterator"][:2]
                expected["iterator"] = ours_kept["iterator"]
            assert ours_kept == expected


def test_random_states_go_through(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        random.seed(3)
        np.random.seed(4)
        save_checkpoint(tmp_path / "ck", optimizer, step=0)
        drawn = random.gauss(0, 1), np.random.standard_normal(3).tolist()
        succeed("export", tmp_path / "ck", tmp_path / "o.npz")
        succeed("import", tmp_path / "o.npz", tmp_path / "imported")
        load_checkpoint(tmp_path / "imported", optimizer)
        assert (random.gauss(0, 1), np.random.standard_normal(3).tolist()) == drawn

    run_ranks(1, run)


# Snapshots of Chainer's


@pytest.mark.parametrize("compression", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_snapshot_of_chainer_goes_on_at_any_world_size(
    tmp_path: Path, shuffle: bool, compression: bool
) -> None:
    plain = chainer_trainer(tmp_path, shuffle=shuffle)
    go_on(plain, 6)
    serializers.save_npz(str(tmp_path / "snapshot"), plain, compression=compression)
    succeed("import", tmp_path / "snapshot", tmp_path / "ck")
    succeed("verify", tmp_path / "ck")
    theirs = plain.updater.get_optimizer("main")

    def load(collectives: ThreadCollectives) -> Any:
        trainer, checkpoint = sharded_trainer(collectives, tmp_path / "ck", 1, shuffle)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The previous value of", UserWarning)
            assert checkpoint.maybe_load(trainer) == 6
        return trainer

    for world_size in (1, 2, 3):
        loaded = run_ranks(world_size, load)
        optimizers = [each.updater.get_optimizer("main") for each in loaded]
        assert_same_states(models.gathered_states(optimizers), states_of_rules(theirs.target))
        for trainer, optimizer in zip(loaded, optimizers, strict=True):
            models.assert_same_bits(optimizer.target, theirs.target)
            assert (optimizer.t, trainer.updater.iteration) == (6, 6)
            assert optimizer.target.norm.avg_var.tolist() == theirs.target.norm.avg_var.tolist()
            # At the end of an epoch, the position is known without an order.
            iterator = trainer.updater.get_iterator("main")
            assert (iterator.epoch, iterator.current_position) == (1, 0)
            assert len(log_of(trainer)) == 6


def test_one_rank_goes_on_from_a_snapshot_as_chainer_does(tmp_path: Path) -> None:
    plain = chainer_trainer(tmp_path)
    go_on(plain, 8)
    serializers.save_npz(str(tmp_path / "snapshot"), plain)
    succeed("import", tmp_path / "snapshot", tmp_path / "ck")
    ours = run_ranks(1, lambda c: continued(c, tmp_path / "ck"))[0]
    plain = chainer_trainer(tmp_path, seed=1)
    serializers.load_npz(str(tmp_path / "snapshot"), plain)
    np.random.seed(3)
    go_on(plain, 14)
    models.assert_same_bits(
        ours.updater.get_optimizer("main").target, plain.updater.get_optimizer("main").target
    )


def continued(collectives: ThreadCollectives, directory: Path) -> Any:
    trainer, checkpoint = sharded_trainer(collectives, directory, seed=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The previous value of", UserWarning)
        checkpoint.maybe_load(trainer)
        # Without a step of its own, the order of the next epoch is drawn from this.
        np.random.seed(3)
        go_on(trainer, 14)
    return trainer


def test_the_position_within_an_epoch_is_kept(tmp_path: Path) -> None:
    plain = chainer_trainer(tmp_path)
    go_on(plain, 8)
    serializers.save_npz(str(tmp_path / "snapshot"), plain)
    succeed("import", tmp_path / "snapshot", tmp_path / "ck")
    notes = CheckpointDirectory(tmp_path / "ck").manifest(8).notes
    assert notes["iterators"] == {"main": pytest.approx(32 / 24)}


def test_a_consolidated_snapshot_goes_on(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> Any:
        optimizer = create_multi_node_optimizer(SMORMS3(), collectives).setup(half_model())
        dynamic(optimizer)
        optimizer.update()
        train(optimizer, FIRST)
        iterator = chainer.iterators.SerialIterator(list(range(8)), 2)
        updater = chainer.training.updaters.StandardUpdater(iterator, optimizer)
        trainer = chainer.training.Trainer(updater, (1, "iteration"), out=str(tmp_path))
        snapshot_extension(filename="snapshot", target=NotStarted(updater))(trainer)
        return optimizer

    saved = run_ranks(3, run)
    succeed("import", tmp_path / "snapshot", tmp_path / "ck", "--step", 3, "--ranks", 3)
    assert CheckpointDirectory(tmp_path / "ck").manifest(3).loss_scale is not None
    for world_size in (2, 3):

        def load(collectives: ThreadCollectives) -> Any:
            optimizer = make(collectives, dynamic, half_model, seed=9)
            load_checkpoint(tmp_path / "ck", optimizer)
            return optimizer

        loaded = run_ranks(world_size, load)
        # The states have the fp32 masters among them.
        assert_same_states(models.gathered_states(loaded), models.gathered_states(saved))
        assert facts(loaded[0]) == facts(saved[0])


@pytest.mark.parametrize("kind", [SMORMS3, Adam, MSVAG])
def test_masters_are_made_as_chainer_makes_them(tmp_path: Path, kind: Any) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.use_fp32_update()

    save_chainer(tmp_path / "snapshot", half_model(), kind(), configure)
    succeed("import", tmp_path / "snapshot", tmp_path / "ck", "--step", 3)
    plain = kind().setup(half_model())
    configure(plain)
    serializers.load_npz(str(tmp_path / "snapshot"), plain, path="updater/optimizer:main/")
    serializers.load_npz(str(tmp_path / "snapshot"), plain.target, path="updater/model:main/")
    train(plain, LAST)

    def load(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, masters, half_model, kind, seed=9)
        load_checkpoint(tmp_path / "ck", optimizer)
        train(optimizer, LAST)
        return optimizer

    for optimizer in run_ranks(2, load):
        models.assert_same_bits(optimizer.target, plain.target)


def test_parameters_without_arrays_stay_so(tmp_path: Path) -> None:
    class Lazy(chainer.Chain):
        def __init__(self) -> None:
            super().__init__()
            with self.init_scope():
                self.used = models.Model({"a": (3, 5)})
                self.unused = chainer.links.Linear(None, 3)

    def save(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, make_model=Lazy)
        optimizer.target.cleargrads()
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(tmp_path / "ck", optimizer)

    run_ranks(2, save)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    with np.load(tmp_path / "o.npz", allow_pickle=True) as found:
        assert found["updater/model:main/unused/W"].shape == ()
        assert found["updater/model:main/unused/W"].item() is None
    model = Lazy()
    serializers.load_npz(str(tmp_path / "o.npz"), model, path="updater/model:main/")
    assert model.unused.W.array is None
    succeed("import", tmp_path / "o.npz", tmp_path / "imported")

    def load(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, make_model=Lazy)
        load_checkpoint(tmp_path / "imported", optimizer)
        assert optimizer.target.unused.W.array is None

    run_ranks(3, load)


class Momentum(chainer.optimizers.momentum_sgd.MomentumSGDRule):
    is_elementwise = False


def whole_rule(optimizer: Any) -> None:
    rule = Momentum()
    rule.hyperparam.lr, rule.hyperparam.momentum = 0.1, 0.9
    optimizer.target.c.update_rule = rule


def test_rules_on_whole_arrays_go_through(tmp_path: Path) -> None:
    def save(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, whole_rule)
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(tmp_path / "ck", optimizer)
        train(optimizer, LAST)
        return optimizer

    def load(directory: Path, collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, whole_rule, seed=9)
        load_checkpoint(directory, optimizer)
        train(optimizer, LAST)
        return optimizer

    expected = run_ranks(2, save)[0]
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    plain = SMORMS3().setup(models.Model())
    whole_rule(plain)
    serializers.load_npz(str(tmp_path / "o.npz"), plain, path="updater/optimizer:main/")
    serializers.load_npz(str(tmp_path / "o.npz"), plain.target, path="updater/model:main/")
    train(plain, LAST)
    models.assert_same_bits(plain.target, expected.target)

    succeed("import", tmp_path / "o.npz", tmp_path / "imported")
    save_chainer(tmp_path / "snapshot", models.Model(), SMORMS3(), whole_rule)
    succeed("import", tmp_path / "snapshot", tmp_path / "said", "--step", 3, "--whole", "/c")
    for name in ("imported", "said"):
        for optimizer in run_ranks(2, functools.partial(load, tmp_path / name)):
            models.assert_same_bits(optimizer.target, expected.target)


def test_parameters_without_rules_go_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(optimizer: Any) -> None:
        optimizer.target.c.update_rule = None

    def save(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, without)
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(tmp_path / "ck", optimizer)

    def load(name: str, collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, without, seed=9)
        load_checkpoint(tmp_path / name, optimizer)
        return optimizer.target

    run_ranks(2, save)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    succeed("import", tmp_path / "o.npz", tmp_path / "imported")
    save_chainer(tmp_path / "snapshot", models.Model(), SMORMS3(), without)
    succeed("import", tmp_path / "snapshot", tmp_path / "said", "--step", 3, "--fixed", "/c")
    expected = run_ranks(2, functools.partial(load, "ck"))[0]
    for name in ("imported", "said"):
        models.assert_same_bits(run_ranks(3, functools.partial(load, name))[0], expected)
    error = fail(
        capsys, "import", tmp_path / "snapshot", tmp_path / "no", "--step", 3, "--fixed", "/x"
    )
    assert "has no parameter '/x'" in error


def test_tied_parameters_go_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = ("--tied", "/twin/g=/inner/g")

    def save(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, make_model=Tied)
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(tmp_path / "ck", optimizer)
        return optimizer

    saved = run_ranks(2, save)
    error = fail(capsys, "export", tmp_path / "ck", tmp_path / "o.npz")
    assert "Say it: --tied /twin/g=PATH" in error
    succeed("export", tmp_path / "ck", tmp_path / "o.npz", *tied)
    plain = SMORMS3().setup(Tied())
    serializers.load_npz(str(tmp_path / "o.npz"), plain, path="updater/optimizer:main/")
    serializers.load_npz(str(tmp_path / "o.npz"), plain.target, path="updater/model:main/")
    models.assert_same_bits(plain.target, saved[0].target)

    save_chainer(tmp_path / "snapshot", Tied(), SMORMS3())
    for name, directory in (("o.npz", "a"), ("snapshot", "b")):
        succeed("import", tmp_path / name, tmp_path / directory, "--step", 3, *tied)
        parameters = CheckpointDirectory(tmp_path / directory).manifest(3).parameters
        assert [parameter.name for parameter in parameters] == ["/inner/a", "/inner/g"]

        def load(directory: str, collectives: ThreadCollectives) -> Any:
            optimizer = make(collectives, make_model=Tied, seed=9)
            load_checkpoint(tmp_path / directory, optimizer)
            return optimizer

        loaded = run_ranks(3, functools.partial(load, directory))
        if directory == "a":
            models.assert_same_bits(loaded[0].target, saved[0].target)
            assert_same_states(models.gathered_states(loaded), models.gathered_states(saved))

    for wrong in ("/inner/a=/inner/g", "/inner/g=/inner/a"):
        error = fail(
            capsys, "import", tmp_path / "o.npz", tmp_path / "c", "--step", 3, "--tied", wrong
        )
        assert "they are not tied" in error
    error = fail(capsys, "export", tmp_path / "ck", tmp_path / "p.npz", "--tied", "/twin/g=/x")
    assert "has no parameter '/x'" in error


def test_several_optimizers_go_through(tmp_path: Path) -> None:
    def both(collectives: ThreadCollectives, seed: int | None = None) -> dict[str, Any]:
        return {
            "main": make(collectives, seed=seed),
            "critic": make(collectives, dynamic, half_model, Adam, seed=seed),
        }

    def save(collectives: ThreadCollectives) -> dict[str, Any]:
        optimizers = both(collectives)
        for optimizer in optimizers.values():
            optimizer.update()
            train(optimizer, FIRST)
        save_checkpoint(tmp_path / "ck", optimizers, step=11)
        return optimizers

    def load(collectives: ThreadCollectives) -> dict[str, Any]:
        optimizers = both(collectives, seed=9)
        load_checkpoint(tmp_path / "imported", optimizers, step=11)
        return optimizers

    saved = run_ranks(2, save)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    succeed("import", tmp_path / "o.npz", tmp_path / "imported")
    loaded = run_ranks(3, load)
    for name in ("main", "critic"):
        assert facts(loaded[0][name]) == facts(saved[0][name])
        models.assert_same_bits(loaded[2][name].target, saved[0][name].target)
        assert_same_states(
            models.gathered_states([each[name] for each in loaded]),
            models.gathered_states([each[name] for each in saved]),
        )


def test_optimizers_that_are_not_sharded_go_through(tmp_path: Path) -> None:
    def new(collectives: ThreadCollectives, seed: int) -> tuple[Any, Any, Any]:
        sharded = make(collectives, seed=seed)
        plain = Adam().setup(models.Model({"x": (5,)}, seed=seed))
        iterator = chainer.iterators.SerialIterator(list(range(8)), 2)
        updater = chainer.training.updaters.StandardUpdater(
            iterator, {"main": sharded, "plain": plain}
        )
        return sharded, plain, NotStarted(updater)

    def save(collectives: ThreadCollectives) -> Any:
        sharded, plain, trainer = new(collectives, seed=1)
        sharded.update()
        train(sharded, FIRST)
        train(plain, FIRST)
        save_checkpoint(tmp_path / "ck", sharded, objects={"trainer": trainer})
        return plain

    def load(collectives: ThreadCollectives) -> Any:
        sharded, plain, trainer = new(collectives, seed=9)
        load_checkpoint(tmp_path / "imported", sharded, objects={"trainer": trainer})
        return plain

    saved = run_ranks(1, save)[0]
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    succeed("import", tmp_path / "o.npz", tmp_path / "imported")
    for plain in run_ranks(2, load):
        assert plain.t == 3
        models.assert_same_bits(plain.target, saved.target)
        assert plain.target.x.update_rule.state["m"].tolist() == (
            saved.target.x.update_rule.state["m"].tolist()
        )


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
    def save(collectives: ThreadCollectives) -> None:
        save_checkpoint(tmp_path / "ck", make(collectives), objects={"mine": Strange()})

    def load(collectives: ThreadCollectives) -> None:
        mine = Strange()
        expected = dict(mine.values)
        mine.values = dict.fromkeys(expected)
        load_checkpoint(tmp_path / "imported", make(collectives), objects={"mine": mine})
        for key, value in expected.items():
            np.testing.assert_array_equal(mine.values[key], value)

    run_ranks(1, save)
    succeed("export", tmp_path / "ck", tmp_path / "o.npz")
    with np.load(tmp_path / "o.npz") as found:
        assert found["mine/text"] == "gr\xfc\xdfe"
        assert found["mine/flags"].dtype == bool
    succeed("import", tmp_path / "o.npz", tmp_path / "imported")
    run_ranks(2, load)


def test_keys_are_written_as_they_are_read() -> None:
    """The modules that must not import Chainer say a few things again."""
    assert serialization.VERSION == npz_keys.VERSION
    assert serialization._OWN == npz_keys.OWN
    assert (trainer_state._VALUES, trainer_state._ELSEWHERE) == (
        npz_keys.VALUES,
        npz_keys.ELSEWHERE,
    )
