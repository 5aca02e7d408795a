"""Chainer's own snapshot extension on rank 0 alone, as scripts for ChainerMN have it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smorms3_dist

import chainer
import chainermn
import models
import numpy as np
import pytest
from chainer import training
from chainer.iterators import SerialIterator
from chainer.serializers import load_npz
from chainer.training import extensions, triggers
from chainer.training.extensions import snapshot_writers
from chainer.training.updaters import StandardUpdater
from rank_threads import ThreadCollectives, run_ranks

EACH = (3, "iteration")


def new_optimizer(collectives: ThreadCollectives) -> Any:
    def initializer(array: np.ndarray) -> None:
        array[...] = np.random.RandomState(3).standard_normal(array.shape)

    link = chainer.links.Linear(3, 2, initialW=initializer)
    optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
    return optimizer.setup(chainer.links.Classifier(link))


def trainer_of(optimizer: Any, until: int, out: Path) -> training.Trainer:
    rng = np.random.RandomState(optimizer.collectives.rank)
    xs, ys = rng.standard_normal((12, 3)).astype("f"), rng.randint(0, 2, 12).astype("i")
    data = chainer.datasets.TupleDataset(xs, ys)
    updater = StandardUpdater(SerialIterator(data, 2, shuffle=False), optimizer)
    return training.Trainer(updater, (until, "iteration"), str(out))


def run(
    collectives: ThreadCollectives,
    extend: Callable[[training.Trainer, int], object],
    out: Path,
    until: int = 7,
) -> training.Trainer:
    trainer = trainer_of(new_optimizer(collectives), until, out)
    extend(trainer, collectives.rank)
    trainer.run(show_loop_exception_msg=False)
    return trainer


def plain(trainer: training.Trainer, rank: int, trigger: Any = EACH, **options: Any) -> None:
    if rank == 0:
        trainer.extend(extensions.snapshot(**options), trigger=trigger)


def ours(trainer: training.Trainer, rank: int, trigger: Any = EACH, **options: Any) -> None:
    trainer.extend(smorms3_dist.extensions.snapshot(**options), trigger=trigger)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def contents(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=True) as file:
        return {key: file[key] for key in file if "elapsed" not in key}


@pytest.mark.parametrize(
    ("trigger", "iterations"),
    [
        (EACH, [3, 6]),
        ((1, "epoch"), [6]),
        (triggers.ManualScheduleTrigger([2, 7], "iteration"), [2, 7]),
        # Not alike by itself: rank 0 tells the others.
        (lambda trainer: trainer.updater.iteration in (1, 4), [1, 4]),
        (triggers.MaxValueTrigger("main/loss", (7, "iteration")), [7]),
    ],
)
def test_it_writes_what_the_package_s_own_writes_on_all_ranks(
    trigger: Any, iterations: list[int], tmp_path: Path
) -> None:
    for make, out in ((plain, "plain"), (ours, "ours")):
        given = functools.partial(make, trigger=trigger)
        if make is ours:
            given = functools.partial(ours, trigger=lambda t: t.updater.iteration in iterations)
        run_ranks(3, lambda c, g=given, o=out: run(c, g, tmp_path / o))
    assert names(tmp_path / "plain") == [f"snapshot_iter_{i}" for i in iterations]
    for name in names(tmp_path / "plain"):
        mine, theirs = contents(tmp_path / "plain" / name), contents(tmp_path / "ours" / name)
        assert [k for k in mine if "trigger" not in k] == [k for k in theirs if "trigger" not in k]
        for key, value in mine.items():
            if "trigger" not in key:
                np.testing.assert_array_equal(value, theirs[key], key)
    assert any(key.endswith("/W/mem") for key in mine)


def test_plain_chainer_goes_on_from_it(tmp_path: Path) -> None:
    extend = functools.partial(plain, trigger=(7, "iteration"))
    trainer = run_ranks(2, lambda c: run(c, extend, tmp_path))[0]
    link = chainer.links.Classifier(chainer.links.Linear(3, 2))
    optimizer = chainer.optimizers.SMORMS3().setup(link)
    updater = StandardUpdater(SerialIterator([0] * 12, 2, shuffle=False), optimizer)
    alone = training.Trainer(updater, (9, "iteration"), str(tmp_path))
    load_npz(tmp_path / "snapshot_iter_7", alone)
    models.assert_same_bits(link, trainer.updater.get_optimizer("main").target)
    assert (updater.iteration, updater.get_optimizer("main").t) == (7, 6)
    assert np.any(link.predictor.W.update_rule.state["mem"])


# The ranks are threads here, which Python does not like at a fork.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("writer", ["ThreadWriter", "ThreadQueueWriter", "ProcessWriter"])
def test_its_writer_and_condition_are_kept(writer: str, tmp_path: Path) -> None:
    asked = []

    def condition() -> bool:
        asked.append(1)
        return len(asked) != 2

    def extend(trainer: training.Trainer, rank: int) -> None:
        made = getattr(snapshot_writers, writer)()
        plain(trainer, rank, (2, "iteration"), writer=made, condition=condition, n_retains=9)

    run_ranks(2, lambda c: run(c, extend, tmp_path))
    assert names(tmp_path) == ["snapshot_iter_2", "snapshot_iter_6"]
    assert len(asked) == 3


def test_several_with_other_priorities_beside_a_checkpoint(tmp_path: Path) -> None:
    def extend(trainer: training.Trainer, rank: int) -> None:
        trainer.extend(smorms3_dist.ShardedCheckpoint(tmp_path / "ck", every=(2, "iteration")))
        if rank == 0:
            trainer.extend(extensions.snapshot(filename="early"), trigger=EACH, priority=400)
            trainer.extend(extensions.snapshot(filename="late"), trigger=EACH, priority=-400)
            # Models are whole on every rank.
            trainer.extend(extensions.snapshot_object(trainer.updater, "updater"), trigger=EACH)
            model = trainer.updater.get_optimizer("main").target
            trainer.extend(
                extensions.snapshot_object(model, "model"), trigger=triggers.TimeTrigger(0)
            )

    run_ranks(2, lambda c: run(c, extend, tmp_path / "out"))
    assert names(tmp_path / "out") == ["early", "late", "model", "updater"]


def test_ranks_come_to_it_in_the_order_of_rank_0_s_extensions(tmp_path: Path) -> None:
    def extend(trainer: training.Trainer, rank: int) -> None:
        for name in ("a", "b", "c"):
            plain(trainer, rank, filename=f"before_{name}")
            if rank == 1:
                trainer.extend(lambda trainer: None, "mine", EACH, -100)
            trainer.extend(smorms3_dist.ShardedCheckpoint(tmp_path / name, every=EACH))
        plain(trainer, rank, filename="last")

    run_ranks(3, lambda c: run(c, extend, tmp_path / "out"))
    assert names(tmp_path / "out") == ["before_a", "before_b", "before_c", "last"]
    for name in ("a", "b", "c"):
        assert smorms3_dist.latest_step(tmp_path / name) == 6


def test_autoload_loads_on_all_ranks(tmp_path: Path) -> None:
    def go(until: int, out: Path) -> training.Trainer:
        extend = functools.partial(plain, trigger=(4, "iteration"), autoload=True)
        return run_ranks(2, lambda c: run(c, extend, out, until))

    whole = go(7, tmp_path / "whole")
    go(4, tmp_path / "parts")
    for resumed, uninterrupted in zip(go(7, tmp_path / "parts"), whole, strict=True):
        optimizers = [t.updater.get_optimizer("main") for t in (resumed, uninterrupted)]
        models.assert_same_bits(*(optimizer.target for optimizer in optimizers))
        assert [optimizer.t for optimizer in optimizers] == [6, 6]


def on_all(trainer: training.Trainer, rank: int) -> None:
    trainer.extend(extensions.snapshot())


def on_rank_1(trainer: training.Trainer, rank: int) -> None:
    if rank == 1:
        trainer.extend(extensions.snapshot(), name="mine")


def of_replica_sets(
    trainer: training.Trainer,
    rank: int,
    sets: Any = (0,),
    make: Callable[..., Any] = extensions.snapshot,
    trigger: Any = EACH,
    **options: Any,
) -> None:
    comm = trainer.updater.get_optimizer("main").collectives
    inner = make(**options)
    trainer.extend(chainermn.extensions.multi_node_snapshot(comm, inner, sets), trigger=trigger)


def of_one_rank(trainer: training.Trainer, rank: int) -> None:
    if rank == 1:
        of_replica_sets(trainer, rank)


def ours_on_rank_1(trainer: training.Trainer, rank: int) -> None:
    if rank == 1:
        ours(trainer, rank)


def of_optimizer(trainer: training.Trainer, rank: int) -> None:
    plain(trainer, rank, target=trainer.updater.get_optimizer("main"), autoload=True)


@pytest.mark.parametrize(
    ("extend", "words"),
    [
        (on_all, "the extension '_Snapshot' of rank 1 .*on rank 0 alone. .*on all ranks"),
        (on_rank_1, "the extension 'mine' of rank 1 .*on rank 0 alone. .*on all ranks"),
        (
            functools.partial(plain, snapshot_on_error=True),
            "of rank 0 .*snapshot_on_error=True .*ShardedCheckpoint",
        ),
        (of_optimizer, "of rank 0 .*autoload=True.*smorms3_dist.extensions.snapshot"),
        (ours_on_rank_1, "'Snapshot' of rank 1 .*rank 0 has none .*on all ranks"),
        (of_one_rank, "'_MultiNodeSnapshot' of rank 1 .*rank 0 has none .*on all ranks"),
        (
            functools.partial(of_replica_sets, snapshot_on_error=True),
            "of rank 0 .*snapshot_on_error=True .*ShardedCheckpoint",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_iteration(
    extend: Any, words: str, tmp_path: Path
) -> None:
    def refused(collectives: ThreadCollectives) -> int:
        trainer = trainer_of(new_optimizer(collectives), 3, tmp_path)
        extend(trainer, collectives.rank)
        with pytest.raises(RuntimeError, match=words):
            trainer.run(show_loop_exception_msg=False)
        return trainer.updater.iteration

    assert run_ranks(2, refused) == [0, 0]


def test_a_model_is_saved_for_each_replica_set(tmp_path: Path) -> None:
    def extend(trainer: training.Trainer, rank: int) -> None:
        model = trainer.updater.get_optimizer("main").target
        of_replica_sets(trainer, rank, target=model, filename="whole")

    run_ranks(3, lambda c: run(c, extend, tmp_path))
    assert names(tmp_path) == ["whole.0", "whole.1"]


@pytest.mark.parametrize("make", [extensions.snapshot, smorms3_dist.extensions.snapshot])
@pytest.mark.parametrize(
    ("world_size", "sets", "masters"),
    [
        (1, [0], [0]),
        (3, [0], [0, 1]),
        (3, [], [0]),
        (3, range(3), [0, 1, 2]),
        (3, [[1, 2]], [0, 1]),
    ],
)
def test_each_replica_set_has_whole_states_and_goes_on_from_them(
    world_size: int, sets: Any, masters: list[int], make: Any, tmp_path: Path
) -> None:
    def go(out: Path, until: int, world_size: int = world_size) -> list[training.Trainer]:
        trigger = (4, "iteration")
        extend = functools.partial(
            of_replica_sets, sets=sets, make=make, trigger=trigger, autoload=True
        )
        return run_ranks(world_size, lambda c: run(c, extend, out, until))

    whole = go(tmp_path / "whole", 7)
    go(tmp_path / "parts", 4)
    files = [f"snapshot_iter_4.{master}" for master in masters]
    assert names(tmp_path / "parts") == files
    resumed = go(tmp_path / "parts", 7)
    for trainers in zip(resumed, whole, strict=True):
        one, other = (trainer.updater.get_optimizer("main") for trainer in trainers)
        assert (one.t, trainers[0].updater.iteration) == (6, 7)
        models.assert_same_bits(one.target, other.target)
    for file in files:
        found = contents(tmp_path / "parts" / file)
        assert "updater/optimizer:main/smorms3_dist/world_size" not in found
        assert np.any(found["updater/optimizer:main/predictor/W/mem"])


def test_a_replica_set_without_a_snapshot_of_its_own_is_refused(tmp_path: Path) -> None:
    def go(world_size: int) -> list[training.Trainer]:
        extend = functools.partial(of_replica_sets, sets=range(world_size), autoload=True)
        return run_ranks(world_size, lambda c: run(c, extend, tmp_path, 3))

    go(2)
    with pytest.raises(RuntimeError, match=r"rank 2 has no snapshot in .* rank 0 has .*as many"):
        go(3)


@pytest.mark.parametrize("alone", [True, False])
def test_the_package_s_own_takes_the_name_of_chainer_s(
    alone: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As one line of a script for ChainerMN makes it."""
    monkeypatch.setattr(extensions, "snapshot", smorms3_dist.extensions.snapshot)

    def extend(trainer: training.Trainer, rank: int) -> None:
        if rank == 0 or not alone:
            trainer.extend(extensions.snapshot(), trigger=EACH)

    run_ranks(2, lambda c: run(c, extend, tmp_path))
    assert names(tmp_path) == ["snapshot_iter_3", "snapshot_iter_6"]
    assert np.any(contents(tmp_path / "snapshot_iter_6")["updater/optimizer:main/predictor/W/mem"])


def test_one_rank_and_plain_chainer_are_left_alone(tmp_path: Path) -> None:
    def extend(trainer: training.Trainer, rank: int) -> None:
        trainer.extend(extensions.snapshot(snapshot_on_error=True), trigger=EACH)

    (trainer,) = run_ranks(1, lambda c: run(c, extend, tmp_path / "one"))
    assert type(trainer.get_extension("_Snapshot")) is type(extensions.snapshot())
    link = chainer.links.Linear(3, 2)
    data = chainer.datasets.TupleDataset(np.ones((6, 3), "f"))
    optimizer = chainer.optimizers.SMORMS3().setup(link)
    updater = StandardUpdater(
        SerialIterator(data, 2), optimizer, loss_func=lambda x: chainer.functions.sum(link(x))
    )
    alone = training.Trainer(updater, (3, "iteration"), str(tmp_path / "chainer"))
    extend(alone, 0)
    alone.run()
    assert names(tmp_path / "one") == ["snapshot_iter_3", "snapshot_iter_6"]
    assert names(tmp_path / "chainer") == ["snapshot_iter_3"]
