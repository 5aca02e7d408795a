"""Loading by ranks that are threads: states at any world size, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist import (
    CheckpointError,
    DamagedCheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from smorms3_dist.checkpoint.files import CheckpointDirectory, manifest_json
from smorms3_dist.checkpoint.files.steps import step_name

import chainer
import models
import numpy as np
import pytest
from chainer.optimizers import Adam
from checkpoints import flip, sealed
from rank_threads import ThreadCollectives, run_ranks
from resuming import (
    FIRST,
    LAST,
    SETTINGS,
    WORLD_SIZES,
    assert_same_training,
    dynamic,
    facts,
    half_model,
    load,
    make,
    nothing,
    save,
    train,
    whole_rule,
)


@pytest.mark.parametrize(("configure", "make_model", "kind"), SETTINGS)
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_training_goes_on_as_if_never_interrupted(
    tmp_path: Path, world_size: int, configure: Any, make_model: Any, kind: Any
) -> None:
    """Also where each rank has gradients of its own, and where the same optimizer goes back."""

    def uninterrupted(collectives: ThreadCollectives, path: Path = tmp_path) -> Any:
        optimizer = make(collectives, configure, make_model, kind)
        optimizer.update()
        train(optimizer, FIRST, collectives.rank)
        optimizer.new_epoch()
        save_checkpoint(path, optimizer)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    def went_back(collectives: ThreadCollectives) -> Any:
        optimizer = uninterrupted(collectives, tmp_path / "again")
        # What it has seen of the states that are replaced now must not be used any more.
        load_checkpoint(tmp_path / "again", optimizer)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    def resumed(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, make_model, kind, seed=9)
        manifest = load_checkpoint(tmp_path, optimizer)
        assert (manifest.step, manifest.t) == (3, 3)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    expected = run_ranks(world_size, uninterrupted)
    assert_same_training(run_ranks(world_size, resumed), expected)
    assert_same_training(run_ranks(world_size, went_back), expected)


@pytest.mark.parametrize("before", WORLD_SIZES)
def test_any_world_size_goes_on_from_any_other(tmp_path: Path, before: int) -> None:
    options = {"configure": dynamic, "make_model": half_model}
    saved = save(tmp_path, before, **options)
    trained = save(tmp_path / "other", before, LAST, **options)
    for after in WORLD_SIZES:
        assert_same_training(load(tmp_path, after, **options), saved)
        loaded = load(tmp_path, after, LAST, **options)
        assert facts(loaded[0]) == facts(trained[0])
        if {before, after} <= {1, 2, 4}:
            models.assert_same_bits(loaded[0].target, trained[0].target)
        for name, array in models.arrays(loaded[0].target).items():
            expected = models.arrays(trained[0].target)[name].astype("d")
            np.testing.assert_allclose(array.astype("d"), expected, rtol=2e-3, atol=2e-3)


def test_whole_rules_and_what_links_keep_go_along(tmp_path: Path) -> None:
    class Net(models.Model):
        def __init__(self) -> None:
            super().__init__()
            self.add_persistent("seen", np.zeros(3))
            self.add_persistent("count", 0)

    def configure(optimizer: Any) -> None:
        whole_rule(optimizer)
        optimizer.target.seen += optimizer.collectives.rank + 1
        optimizer.target.count = 7

    def forgetful(optimizer: Any) -> None:
        configure(optimizer)
        optimizer.target.seen[...] = optimizer.target.count = 0

    expected = save(tmp_path, 2, LAST, configure=configure, make_model=Net)
    for world_size in (2, 4):
        loaded = load(tmp_path, world_size, LAST, configure=forgetful, make_model=Net)
        for rank, optimizer in enumerate(loaded):
            models.assert_same_bits(optimizer.target, expected[0].target)
            assert optimizer.target.count == 7
            assert optimizer.target.seen.tolist() == [rank % 2 + 1] * 3


def with_a_hook_on_whole_parameters(optimizer: Any) -> None:
    optimizer.use_fp32_update()
    optimizer.target.a.update_rule.add_hook(lambda rule, param: None, name="looks")


class Lazy(chainer.Chain):
    """Is initialized where it sees data, or by loading."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.linear = chainer.links.Linear(None, 3, initialW=0.5)


def see_data(optimizer: Any) -> None:
    optimizer.target.linear(np.ones((2, 5), np.float32))


@pytest.mark.parametrize(
    ("make_model", "before", "after"),
    [
        (half_model, with_a_hook_on_whole_parameters, with_a_hook_on_whole_parameters),
        (Lazy, see_data, nothing),
    ],
    ids=["masters of whole rules", "not yet initialized"],
)
def test_what_a_model_may_have_besides_goes_along(
    tmp_path: Path, make_model: Any, before: Any, after: Any
) -> None:
    expected = save(tmp_path, 2, LAST, configure=before, make_model=make_model)
    for optimizer in load(tmp_path, 4, LAST, configure=after, make_model=make_model):
        assert bool(list(optimizer.sharded_model.whole_groups)) == (make_model is half_model)
        models.assert_same_bits(optimizer.target, expected[0].target)


# What does not fit


def different_model() -> models.Model:
    shapes = {**models.SHAPES, "g": (500, 60), "new": (3,)}
    del shapes["a"]
    return models.Model(shapes, dtypes={"c": "float64"})


def test_another_model_is_refused_with_all_differences(tmp_path: Path) -> None:
    save(tmp_path, 2)

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
    with pytest.raises(CheckpointError, match=r"/a has the states m \(.* g \(float32\), g2 "):
        load(tmp_path, 2, kind=Adam)


def test_what_differs_is_left_as_it_is_without_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save(tmp_path, 2)
    caplog.set_level(logging.WARNING, "smorms3_dist")

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, make_model=different_model, seed=9)
        load_checkpoint(tmp_path, optimizer, strict=False)
        return optimizer

    loaded = run_ranks(2, run)
    ours, theirs = models.arrays(loaded[0].target), models.arrays(saved[0].target)
    for name in ("/b", "/e"):
        assert ours[name].tobytes() == theirs[name].tobytes()
    for name in ("/c", "/g", "/new"):
        assert (ours[name] == 9).all()
    assert sum("/g is float32 (500, 60)" in record.message for record in caplog.records) == 1
    states = models.gathered_states(saved)["/b"]["mem"]
    assert models.gathered_states(loaded)["/b"]["mem"].tobytes() == states.tobytes()


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "rank-00000.safetensors"])
def test_damaged_data_never_enters_a_training(
    tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "smorms3_dist")

    def save_two(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        for step in (1, 2):
            train(optimizer, range(step, step + 1))
            save_checkpoint(tmp_path, optimizer)

    run_ranks(2, save_two)
    path = CheckpointDirectory(tmp_path).path_of(2) / file
    flip(path, path.stat().st_size - 5)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, seed=9)
        with pytest.raises(CheckpointError, match=rf"{file}: is damaged.*\(of rank \d on host"):
            load_checkpoint(tmp_path, optimizer, step=2)
        assert optimizer.t == 0
        assert all((param.array == 9).all() for param in optimizer.target.params())
        assert load_checkpoint(tmp_path, optimizer).step == 1
        assert optimizer.t == 1

    run_ranks(3, run)
    assert any("step 2 cannot be used" in record.message for record in caplog.records)


def test_of_many_steps_only_the_manifest_that_is_loaded_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        for step in range(1, 5):
            train(optimizer, range(step, step + 1), collectives.rank)
            save_checkpoint(tmp_path, optimizer, step=step)

    run_ranks(2, body)
    flip(next((tmp_path / step_name(4)).glob("shard-*")), -1)
    read: list[Path] = []
    real = manifest_json.read
    monkeypatch.setattr(manifest_json, "read", lambda path: read.append(path) or real(path))
    loaded = run_ranks(2, lambda collectives: load_checkpoint(tmp_path, make(collectives)))
    assert [manifest.step for manifest in loaded] == [3, 3]
    # What is damaged is found by its checksums, and then the one before is taken.
    assert sorted(path.parent.name for path in read) == [step_name(n) for n in (3, 3, 4, 4)]


def test_a_directory_without_a_whole_step_is_no_fresh_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load(tmp_path / "none", 2)
    save(tmp_path, 2)
    (CheckpointDirectory(tmp_path).path_of(3) / "shard-00000.safetensors").unlink()
    message = r"has no whole step.* step 3: .*shard-00000\.safetensors: is missing"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, 2)


def test_a_step_of_a_newer_version_is_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 2)
    path = CheckpointDirectory(tmp_path).path_of(3)
    newer = path.with_name(step_name(9))
    shutil.copytree(path, newer)
    fields = json.loads((newer / "manifest.json").read_bytes())
    (newer / "manifest.json").write_bytes(sealed({**fields, "version": 3, "step": 9}))

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, seed=9)
        with pytest.raises(CheckpointError, match=r"newer smorms3_dist.*version 3.*move that one"):
            load_checkpoint(tmp_path, optimizer)
        assert all((param.array == 9).all() for param in optimizer.target.params())
        # What is asked for by its number is loaded.
        assert load_checkpoint(tmp_path, optimizer, step=3).step == 3

    run_ranks(2, run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update(t="3"), "has '3' as t, which cannot be"),
        (lambda f: f.update(epoch=-1), "has -1 as epoch"),
        (lambda f: f.update(local=0), "has 0 as local"),
        (lambda f: f["groups"][0].update(rule_t=[1.5]), r"has \(1.5,\) as rule_t of parameters"),
        (lambda f: f["files"][0].update(rank=2), "has 2 as rank of shard-00000.safetensors"),
        (lambda f: f["notes"]["optimizers"]["main"].update(t=[]), "as t of the optimizer main"),
        (
            lambda f: f["notes"]["optimizers"]["main"].update(loss_scale="x"),
            "has 'x' as loss_scale of the optimizer main",
        ),
        (
            lambda f: f["notes"]["optimizers"]["main"].update(progress={"/a": {"x": None}}),
            "has None as x of the update rule of /a",
        ),
        (
            lambda f: f["notes"]["positions"].update(it=-0.5),
            "has -0.5 as the position of the iterator it",
        ),
        (lambda f: f["notes"].update(positions=None), "has None as its positions"),
        (lambda f: f["notes"].update(optimizers=["main"]), r"has \['main'\] as its optimizers"),
        (
            lambda f: f["notes"]["optimizers"].update(main=True),
            "has True as the notes of the optimizer main",
        ),
        (
            lambda f: f["notes"]["optimizers"]["main"].update(progress=[]),
            r"has \[\] as progress of the optimizer main",
        ),
        (
            lambda f: f["notes"]["optimizers"]["main"].update(progress={"/a": 3}),
            "has 3 as progress of the update rule of /a",
        ),
    ],
)
def test_a_manifest_with_what_cannot_be_changes_nothing(
    change: Callable[[Any], object], words: str, tmp_path: Path
) -> None:
    """Also where it is sealed anew, by hand."""
    save(tmp_path, 2)
    path = CheckpointDirectory(tmp_path).path_of(3) / "manifest.json"
    fields = json.loads(path.read_bytes())
    del fields["checksum"]
    change(fields)
    path.write_bytes(sealed(fields))

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, seed=9)
        with pytest.raises(DamagedCheckpointError, match=words):
            load_checkpoint(tmp_path, optimizer)
        assert all((param.array == 9).all() for param in optimizer.target.params())
        assert optimizer.t == 0

    run_ranks(2, run)


def test_cupy_without_a_gpu_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Runtime:
        @staticmethod
        def getDeviceCount() -> int:
            raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=Runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    save(tmp_path, 2)
    assert load(tmp_path, 2)[0].t == 3


class Counter:
    """An object that can be saved, and refuses to be loaded if it is told to."""

    def __init__(self, count: int, refuses: bool = False) -> None:
        self.count = count
        self._refuses = refuses

    def serialize(self, serializer: Any) -> None:
        self.count = int(serializer("count", self.count))
        if self._refuses and isinstance(serializer, chainer.Deserializer):
            raise ValueError("it does not fit")


def test_an_updater_and_what_goes_with_it_stay_as_they_are_if_one_rank_cannot_load(
    tmp_path: Path,
) -> None:
    def objects_of(optimizer: Any, count: int, refuses: bool = False) -> dict[str, Any]:
        iterator = chainer.iterators.SerialIterator([1, 2, 3], 1)
        updater = chainer.training.StandardUpdater(iterator, optimizer)
        updater.iteration = count
        counters = {"counter": Counter(count), "last": Counter(count, refuses)}
        return {"updater": updater, **counters}

    def saved(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, nothing)
        optimizer.update()
        save_checkpoint(tmp_path, optimizer, objects=objects_of(optimizer, 5))

    def refused(collectives: ThreadCollectives) -> list[int]:
        optimizer = make(collectives, nothing)
        objects = objects_of(optimizer, 1, refuses=collectives.rank == 1)
        with pytest.raises(CheckpointError, match="it does not fit"):
            load_checkpoint(tmp_path, optimizer, objects=objects)
        return [objects["updater"].iteration, objects["counter"].count, objects["last"].count]

    run_ranks(2, saved)
    assert run_ranks(2, refused)[0] == [1, 1, 1]
