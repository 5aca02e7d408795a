"""Checkpoints of ranks that are threads: states at any world size, and what is refused."""

from __future__ import annotations

import functools
import json
import logging
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from smorms3_dist.checkpoint import saving
from smorms3_dist.checkpoint.files import CheckpointDirectory
from smorms3_dist.checkpoint.files.steps import step_name
from smorms3_dist.collectives.threads import ThreadCollectives, run_ranks

import chainer
import models
import numpy as np
import pytest
from chainer.optimizers import SMORMS3, Adam
from checkpoints import sealed
from resuming import (
    FIRST,
    LAST,
    SETTINGS,
    WORLD_SIZES,
    assert_same_states,
    dynamic,
    facts,
    half_model,
    hooked,
    make,
    masters,
    nothing,
    train,
)


@pytest.mark.parametrize(("configure", "make_model", "kind"), SETTINGS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_training_goes_on_as_if_never_interrupted(
    tmp_path: Path, world_size: int, configure: Any, make_model: Any, kind: Any
) -> None:
    def uninterrupted(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, make_model, kind)
        optimizer.update()
        train(optimizer, FIRST, collectives.rank)
        optimizer.new_epoch()
        save_checkpoint(tmp_path, optimizer)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    def resumed(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, make_model, kind, seed=9)
        manifest = load_checkpoint(tmp_path, optimizer)
        assert (manifest.step, manifest.t) == (3, 3)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    expected, ours = run_ranks(world_size, uninterrupted), run_ranks(world_size, resumed)
    for one, other in zip(ours, expected, strict=True):
        assert facts(one) == facts(other)
        models.assert_same_bits(one.target, other.target)
    assert_same_states(models.gathered_states(ours), models.gathered_states(expected))


@pytest.mark.parametrize("after", WORLD_SIZES)
@pytest.mark.parametrize("before", WORLD_SIZES)
def test_any_world_size_goes_on_from_any_other(tmp_path: Path, before: int, after: int) -> None:
    def save(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, dynamic, half_model)
        optimizer.update()
        # Alike on all ranks: then two, and four, do exactly what one does.
        train(optimizer, FIRST)
        save_checkpoint(tmp_path, optimizer)
        return optimizer

    def load(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, dynamic, half_model, seed=9)
        load_checkpoint(tmp_path, optimizer)
        return optimizer

    def go_on(optimizers: list[Any], collectives: ThreadCollectives) -> None:
        optimizer = optimizers[collectives.rank]
        optimizer.communicator = collectives
        train(optimizer, LAST)

    saved, loaded = run_ranks(before, save), run_ranks(after, load)
    assert_same_states(models.gathered_states(loaded), models.gathered_states(saved))
    for optimizer in loaded:
        assert facts(optimizer) == facts(saved[0])
        models.assert_same_bits(optimizer.target, saved[0].target)
    run_ranks(before, functools.partial(go_on, saved))
    run_ranks(after, functools.partial(go_on, loaded))
    assert facts(loaded[0]) == facts(saved[0])
    if {before, after} <= {1, 2, 4}:
        models.assert_same_bits(loaded[0].target, saved[0].target)
    for name, array in models.arrays(loaded[0].target).items():
        expected = models.arrays(saved[0].target)[name].astype("d")
        np.testing.assert_allclose(array.astype("d"), expected, rtol=2e-3, atol=2e-3)


def test_whole_rules_and_what_links_keep_go_along(tmp_path: Path) -> None:
    class Momentum(chainer.optimizers.momentum_sgd.MomentumSGDRule):
        is_elementwise = False

    class Net(models.Model):
        def __init__(self) -> None:
            super().__init__()
            self.add_persistent("seen", np.zeros(3))
            self.add_persistent("count", 0)

    def configure(optimizer: Any) -> None:
        rule = Momentum()
        rule.hyperparam.lr, rule.hyperparam.momentum = 0.1, 0.9
        optimizer.target.c.update_rule = rule

    def save(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, Net)
        optimizer.update()
        train(optimizer, FIRST)
        optimizer.target.seen += collectives.rank + 1
        optimizer.target.count = 7
        save_checkpoint(tmp_path, optimizer)
        train(optimizer, LAST)
        return optimizer

    def load(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, Net, seed=9)
        load_checkpoint(tmp_path, optimizer)
        assert optimizer.target.count == 7
        assert optimizer.target.seen.tolist() == [collectives.rank % 2 + 1] * 3
        train(optimizer, LAST)
        return optimizer

    expected = run_ranks(2, save)
    for world_size in (2, 4):
        for optimizer in run_ranks(world_size, load):
            models.assert_same_bits(optimizer.target, expected[0].target)


def test_whole_rules_keep_their_masters(tmp_path: Path) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.use_fp32_update()
        # A hook that wants the whole fp32 parameter.
        optimizer.target.a.update_rule.add_hook(lambda rule, param: None, name="looks")

    def save(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, half_model)
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(tmp_path, optimizer)
        train(optimizer, LAST)
        return optimizer

    def load(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, half_model, seed=9)
        load_checkpoint(tmp_path, optimizer)
        assert list(optimizer.sharded_model.whole_groups)
        train(optimizer, LAST)
        return optimizer

    expected = run_ranks(2, save)
    for optimizer in run_ranks(4, load):
        models.assert_same_bits(optimizer.target, expected[0].target)


class Lazy(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.linear = chainer.links.Linear(None, 3, initialW=0.5)


def test_parameters_that_are_not_yet_initialized_are_made(tmp_path: Path) -> None:
    def save(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, make_model=Lazy)
        optimizer.target.linear(np.ones((2, 5), np.float32))
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(tmp_path, optimizer)
        train(optimizer, LAST)
        return optimizer

    def load(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, make_model=Lazy)
        load_checkpoint(tmp_path, optimizer)
        train(optimizer, LAST)
        return optimizer

    expected = run_ranks(2, save)
    for optimizer in run_ranks(4, load):
        models.assert_same_bits(optimizer.target, expected[0].target)


def test_saving_before_the_first_update_changes_nothing(tmp_path: Path) -> None:
    def run(save: bool, collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives)
        if save:
            save_checkpoint(tmp_path, optimizer, step=0)
        models.set_gradients(optimizer.target, collectives.rank, 1)
        optimizer.update()
        assert optimizer.t == 0
        train(optimizer, FIRST, collectives.rank)
        return optimizer

    ours, theirs = (run_ranks(2, functools.partial(run, save)) for save in (True, False))
    models.assert_same_bits(ours[0].target, theirs[0].target)

    def load(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, seed=9)
        load_checkpoint(tmp_path, optimizer)
        train(optimizer, FIRST, collectives.rank)
        return optimizer

    for optimizer in run_ranks(2, load):
        assert optimizer.t == 3
        models.assert_same_bits(optimizer.target, theirs[0].target)


def test_several_optimizers_are_one_checkpoint(tmp_path: Path) -> None:
    def both(collectives: ThreadCollectives, seed: int | None = None) -> dict[str, Any]:
        return {
            "generator": make(collectives, seed=seed),
            "critic": make(collectives, kind=Adam, seed=seed),
        }

    def save(collectives: ThreadCollectives) -> Any:
        optimizers = both(collectives)
        for optimizer in optimizers.values():
            optimizer.update()
        train(optimizers["generator"], FIRST)
        train(optimizers["critic"], LAST)
        save_checkpoint(tmp_path, optimizers, step=5)
        return optimizers

    def load(collectives: ThreadCollectives) -> Any:
        optimizers = both(collectives, seed=9)
        load_checkpoint(tmp_path, optimizers)
        return optimizers

    saved, loaded = run_ranks(2, save), run_ranks(3, load)
    for name in saved[0]:
        assert facts(loaded[0][name]) == facts(saved[0][name])
        models.assert_same_bits(loaded[2][name].target, saved[0][name].target)
        assert_same_states(
            models.gathered_states([each[name] for each in loaded]),
            models.gathered_states([each[name] for each in saved]),
        )


def test_random_states_go_along_at_the_same_world_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        random.seed(3)
        np.random.seed(4)
        save_checkpoint(tmp_path, optimizer, step=0)
        drawn = random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist()
        random.seed(5)
        np.random.seed(6)
        load_checkpoint(tmp_path, optimizer)
        again = random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist()
        assert again == drawn

    run_ranks(1, run)
    with caplog.at_level(logging.WARNING, "smorms3_dist"):
        run_ranks(2, lambda collectives: load_checkpoint(tmp_path, make(collectives)))
    (record,) = caplog.records
    assert record.message.startswith("the checkpoint is of 1 ranks, and there are 2 now")


def save_one(tmp_path: Path, make_model: Any = models.Model, **options: Any) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, make_model=make_model, **options)
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(tmp_path, optimizer)

    run_ranks(2, run)


def different_model() -> models.Model:
    shapes = {**models.SHAPES, "g": (500, 60), "new": (3,)}
    del shapes["a"]
    return models.Model(shapes, dtypes={"c": "float64"})


def test_another_model_is_refused_with_all_differences(tmp_path: Path) -> None:
    save_one(tmp_path)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, make_model=different_model)
        optimizer.update()
        before = facts(optimizer), {n: a.copy() for n, a in models.arrays(optimizer.target).items()}
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path, optimizer)
        for words in (
            "/a is in the checkpoint, but not in the model",
            "/c is float64 (7,) in the model, float32 (7,) in the file",
            "/g is float32 (500, 60) in the model, float32 (500, 61) in the file",
            "/new is in the model, but not in the checkpoint",
            "With strict=False",
        ):
            assert words in str(caught.value)
        assert facts(optimizer) == before[0]
        for name, array in models.arrays(optimizer.target).items():
            assert array.tobytes() == before[1][name].tobytes()

    run_ranks(3, run)


def test_what_differs_is_left_as_it_is_without_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_one(tmp_path)
    caplog.set_level(logging.WARNING, "smorms3_dist")

    def reference(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives)
        optimizer.update()
        train(optimizer, FIRST)
        return optimizer

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, make_model=different_model, seed=9)
        load_checkpoint(tmp_path, optimizer, strict=False)
        return optimizer

    saved, loaded = run_ranks(2, reference), run_ranks(2, run)
    ours, theirs = models.arrays(loaded[0].target), models.arrays(saved[0].target)
    for name in ("/b", "/e"):
        assert ours[name].tobytes() == theirs[name].tobytes()
    for name in ("/c", "/g", "/new"):
        assert (ours[name] == 9).all()
    assert sum("/g is float32 (500, 60)" in record.message for record in caplog.records) == 1
    states = models.gathered_states(saved)["/b"]["mem"]
    assert models.gathered_states(loaded)["/b"]["mem"].tobytes() == states.tobytes()


def test_another_rule_is_refused(tmp_path: Path) -> None:
    save_one(tmp_path, kind=Adam)

    def run(collectives: ThreadCollectives) -> None:
        with pytest.raises(CheckpointError, match=r"/a has the states g \(float32\), g2 .* m \("):
            load_checkpoint(tmp_path, make(collectives))

    run_ranks(2, run)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "rank-00000.safetensors"])
def test_damaged_data_never_enters_a_training(
    tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "smorms3_dist")

    def save(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives)
        optimizer.update()
        for step in (1, 2):
            train(optimizer, range(step, step + 1))
            save_checkpoint(tmp_path, optimizer)
        return optimizer

    run_ranks(2, save)
    path = CheckpointDirectory(tmp_path).path_of(2) / file
    flip(path, path.stat().st_size - 5)

    def load(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, seed=9)
        with pytest.raises(CheckpointError, match=rf"{file}: is damaged.*\(of rank \d on host"):
            load_checkpoint(tmp_path, optimizer, step=2)
        assert optimizer.t == 0
        assert all((param.array == 9).all() for param in optimizer.target.params())
        assert load_checkpoint(tmp_path, optimizer).step == 1
        assert optimizer.t == 1

    run_ranks(3, load)
    assert any("step 2 cannot be used" in record.message for record in caplog.records)


def test_a_directory_without_a_whole_step_is_no_fresh_start(tmp_path: Path) -> None:
    def nowhere(collectives: ThreadCollectives) -> None:
        with pytest.raises(CheckpointError, match="has no checkpoint"):
            load_checkpoint(tmp_path / "none", make(collectives))

    run_ranks(2, nowhere)
    save_one(tmp_path)
    (CheckpointDirectory(tmp_path).path_of(3) / "shard-00000.safetensors").unlink()

    def damaged(collectives: ThreadCollectives) -> None:
        message = r"has no whole step.* step 3: .*shard-00000\.safetensors: is missing"
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path, make(collectives))

    run_ranks(2, damaged)


def test_a_step_of_a_newer_version_is_not_passed_over(tmp_path: Path) -> None:
    save_one(tmp_path)
    path = CheckpointDirectory(tmp_path).path_of(3)
    newer = path.with_name(step_name(9))
    shutil.copytree(path, newer)
    fields = json.loads((newer / "manifest.json").read_bytes())
    fields |= {"version": 2, "step": 9}
    (newer / "manifest.json").write_bytes(sealed(fields))

    def load(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, seed=9)
        with pytest.raises(CheckpointError, match=r"newer smorms3_dist.*version 2.*move that one"):
            load_checkpoint(tmp_path, optimizer)
        assert all((param.array == 9).all() for param in optimizer.target.params())
        # What is asked for by its number is loaded.
        assert load_checkpoint(tmp_path, optimizer, step=3).step == 3

    run_ranks(2, load)


class Slow:
    """Makes the writing of shards wait until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        write = saving.write_shard

        def slow(*arguments: Any, **options: Any) -> Any:
            assert self.go.wait(30)
            return write(*arguments, **options)

        monkeypatch.setattr(saving, "write_shard", slow)


def test_training_goes_on_while_a_step_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    directory = CheckpointDirectory(tmp_path)

    def save(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives)
        optimizer.update()
        train(optimizer, FIRST)
        before = models.arrays(optimizer.target)["/g"].copy()
        saver = save_checkpoint(tmp_path, optimizer, asynchronous=True)
        train(optimizer, LAST)
        assert saver.saving == 3
        assert directory.steps() == []
        collectives.all_gather_object(None)
        slow.go.set()
        # As many steps as it takes: each one looks.
        while saver.saving is not None:
            train(optimizer, range(1, 2))
        assert directory.steps() == [3]
        return before

    before = run_ranks(2, save)[0]

    def load(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, seed=9)
        load_checkpoint(tmp_path, optimizer)
        assert models.arrays(optimizer.target)["/g"].tobytes() == before.tobytes()

    run_ranks(3, load)


@pytest.mark.parametrize("kind", [SMORMS3, Adam])
@pytest.mark.parametrize("configure", [nothing, masters, dynamic, hooked])
def test_a_training_goes_back_to_what_it_has_saved(
    tmp_path: Path, kind: Any, configure: Callable[[Any], None]
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, configure, half_model, kind)
        optimizer.update()
        train(optimizer, FIRST, collectives.rank)
        save_checkpoint(tmp_path, optimizer)
        train(optimizer, LAST, collectives.rank)
        expected = bits_of(optimizer)
        # What it has seen of the states that are replaced now must not be used any more.
        load_checkpoint(tmp_path, optimizer)
        train(optimizer, LAST, collectives.rank)
        assert bits_of(optimizer) == expected

    def bits_of(optimizer: Any) -> dict[str, bytes]:
        return {name: models.bits(a) for name, a in models.arrays(optimizer.target).items()}

    run_ranks(2, run)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_only_a_save_in_the_background_copies(
    tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_shard
    written: dict[int, list[np.ndarray]] = {}

    def note(directory: Path, rank: int, host: str, parts: Any, *more: Any) -> Any:
        written[rank] = [part.values for part in parts]
        return write(directory, rank, host, parts, *more)

    monkeypatch.setattr(saving, "write_shard", note)

    def save(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, masters, half_model)
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(tmp_path, optimizer, asynchronous=asynchronous).wait()
        own = []
        for update in optimizer.sharded_model.sharded_groups:
            own += [update.buffers.flat, *update.states.values()]
        values = written[collectives.rank]
        assert len(values) > 3
        for part in values:
            in_place = any(np.shares_memory(part, array) for array in own)
            assert in_place is not asynchronous

    run_ranks(2, save)


def test_ctrl_c_while_a_step_is_written_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_shard
    stopped = []

    def stop(directory: Path, rank: int, *more: Any) -> Any:
        if rank == 1 and not stopped:
            stopped.append(rank)
            raise KeyboardInterrupt
        return write(directory, rank, *more)

    monkeypatch.setattr(saving, "write_shard", stop)

    def save(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        expected = (CheckpointError, KeyboardInterrupt)[collectives.rank]
        with pytest.raises(expected) as raised:
            save_checkpoint(tmp_path, optimizer)
        if collectives.rank == 0:
            assert "KeyboardInterrupt() (rank 1 on " in str(raised.value)
        # Nothing is left of it: the next save is like any other.
        save_checkpoint(tmp_path, optimizer)

    run_ranks(2, save)
    assert len(CheckpointDirectory(tmp_path).steps()) == 1


def test_one_save_is_in_flight_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)

    def save(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        first = save_checkpoint(tmp_path, optimizer, step=1, asynchronous=True)
        timer = threading.Timer(0.2, slow.go.set)
        timer.start()
        second = save_checkpoint(tmp_path, optimizer, step=2, asynchronous=True)
        assert first is second
        assert second.waited_s > 0.1
        assert CheckpointDirectory(tmp_path).steps() == [1]
        second.wait()
        timer.join()

    run_ranks(2, save)
    assert CheckpointDirectory(tmp_path).steps() == [1, 2]


@pytest.mark.parametrize("when", ["update", "save", "wait"])
def test_what_fails_in_the_background_reaches_all_ranks(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_shard

    def fail(directory: Path, rank: int, *arguments: Any, **options: Any) -> Any:
        if rank == 1:
            raise CheckpointError(directory / "shard", "cannot be written: no space left")
        return write(directory, rank, *arguments, **options)

    def save(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        if collectives.rank == 0:
            monkeypatch.setattr(saving, "write_shard", fail)
        collectives.all_gather_object(None)
        saver = save_checkpoint(tmp_path, optimizer, step=1, asynchronous=True)
        with pytest.raises(CheckpointError, match=r"no space left \(rank 1 on "):
            if when == "update":
                while True:
                    train(optimizer, range(1, 2))
            elif when == "save":
                save_checkpoint(tmp_path, optimizer, step=2)
            else:
                saver.wait()
        assert saver.saving is None
        collectives.all_gather_object(None)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        if collectives.rank == 0:
            monkeypatch.setattr(saving, "write_shard", write)
        collectives.all_gather_object(None)
        # The next one is as good as the first.
        save_checkpoint(tmp_path, optimizer, step=2)

    run_ranks(2, save)
    assert CheckpointDirectory(tmp_path).steps() == [2]


def test_retention(tmp_path: Path) -> None:
    def save(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        for step in range(1, 8):
            save_checkpoint(tmp_path, optimizer, step=step, keep_last=2, keep_every=3)
        with pytest.raises(ValueError, match="keep_last must be positive or None, not 0"):
            save_checkpoint(tmp_path, optimizer, step=9, keep_last=0)
        with pytest.raises(ValueError, match="keep_every says"):
            save_checkpoint(tmp_path, optimizer, step=9, keep_every=2)

    run_ranks(2, save)
    assert CheckpointDirectory(tmp_path).steps() == [3, 6, 7]


def test_a_second_job_is_refused_on_all_ranks(tmp_path: Path) -> None:
    with CheckpointDirectory(tmp_path) as other:
        other.lock()

        def save(collectives: ThreadCollectives) -> None:
            optimizer = make(collectives)
            optimizer.update()
            with pytest.raises(
                CheckpointError, match=r"is being written to by process .*\(rank 0 on "
            ):
                save_checkpoint(tmp_path, optimizer)

        run_ranks(2, save)


def test_what_only_pickle_could_keep_is_refused(tmp_path: Path) -> None:
    class Odd:
        def serialize(self, serializer: Any) -> None:
            serializer("odd", np.array([object()]))

    def save(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        with pytest.raises(CheckpointError, match=r"mine/odd: cannot be saved: .*only pickle"):
            save_checkpoint(tmp_path, optimizer, objects={"mine": Odd()})

    run_ranks(2, save)
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("what", ["save", "load", "consolidate", "lock"])
def test_what_only_some_ranks_do_is_an_error_on_all_and_no_hang(tmp_path: Path, what: str) -> None:
    save_one(tmp_path)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        with pytest.raises(RuntimeError, match="the ranks do different things"):
            if collectives.rank == 0:
                train(optimizer, FIRST)
            elif what == "save":
                save_checkpoint(tmp_path, optimizer)
            elif what == "load":
                load_checkpoint(tmp_path, optimizer)
            elif what == "lock":
                saving.Saver(tmp_path, {"main": optimizer}).lock()
            else:
                optimizer.consolidate()

    run_ranks(2, run)


def test_a_checkpoint_extension_on_some_ranks_only_is_named_at_the_next_step(
    tmp_path: Path,
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        if collectives.rank == 0:
            saving.Saver(tmp_path, {"main": optimizer})
        message = r"rank 0 has in the background: Saver, but rank 1 has done nothing"
        with pytest.raises(RuntimeError, match=message):
            train(optimizer, FIRST)

    run_ranks(2, run)
