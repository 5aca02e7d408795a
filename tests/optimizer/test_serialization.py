"""Chainer's serializers: shards at the same world size, whole states at any, and no lost states."""

from __future__ import annotations

import logging
import pathlib
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.optimizer.serialization import VERSION

import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks, serializers
from chainer.optimizers import MSVAG, SMORMS3, Adam
from rank_threads import ThreadCollectives, run_ranks

FIRST, LAST = range(1, 4), range(4, 8)
HALF = {"a": "float16", "b": "float16", "g": "float16"}
# Small, since they are compressed and read again.
SHAPES = {**models.SHAPES, "g": (50, 61)}

_reading = threading.Lock()


def model() -> models.Model:
    return models.Model(SHAPES)


def half_model() -> models.Model:
    return models.Model(SHAPES, HALF)


def load_npz(path: pathlib.Path, target: Any) -> None:
    """Loads in one thread at a time: CPython 3.11 does not parse the head of an array in two."""
    with _reading:
        serializers.load_npz(str(path), target)


def nothing(optimizer: Any) -> None:
    pass


def masters(optimizer: Any) -> None:
    optimizer.use_fp32_update()


def dynamic(optimizer: Any) -> None:
    optimizer.use_fp32_update()
    optimizer.loss_scaling(interval=2)


def hooked(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))
    optimizer.target.g.update_rule.add_hook(optimizer_hooks.WeightDecay(0.1))


def make(
    collectives: Any,
    configure: Callable[[Any], None] = nothing,
    make_model: Callable[[], chainer.Link] = model,
    kind: Any = SMORMS3,
    gradients: str = "auto",
    seed: int | None = None,
) -> Any:
    link = make_model()
    if seed is not None:
        for param in link.params():
            param.array[...] = seed
    optimizer = create_multi_node_optimizer(kind(), collectives, gradients=gradients).setup(link)
    configure(optimizer)
    return optimizer


def train(optimizer: Any, steps: range, rank: int = 0) -> None:
    for step in steps:
        scale = optimizer._loss_scale
        models.set_gradients(optimizer.target, rank, step)
        for param in optimizer.target.params():
            param._loss_scale = scale
            if scale is not None:
                with np.errstate(over="ignore"):
                    param.grad *= param.dtype.type(scale)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            optimizer.update()


def begun(collectives: Any, *arguments: Any) -> Any:
    """An optimizer that has made the first steps, as `make` makes it."""
    optimizer = make(collectives, *arguments)
    optimizer.update()
    train(optimizer, FIRST, collectives.rank)
    return optimizer


def train_chainer(optimizer: Any, steps: range, world_size: int) -> None:
    for step in steps:
        models.set_mean_gradients(optimizer.target, world_size, step)
        with np.errstate(all="ignore"):
            optimizer.update()


def facts(optimizer: Any) -> tuple[Any, ...]:
    rules = {name: param.update_rule.t for name, param in optimizer.target.namedparams()}
    scaling = optimizer._loss_scale, getattr(optimizer, "_loss_scaling_isnan_ever", None)
    return optimizer.t, optimizer.epoch, rules, scaling


@pytest.mark.parametrize(
    ("configure", "make_model", "kind"),
    [
        (nothing, model, SMORMS3),
        (masters, half_model, SMORMS3),
        (dynamic, half_model, SMORMS3),
        (hooked, model, SMORMS3),
        (masters, half_model, Adam),
        (nothing, model, MSVAG),
    ],
    ids=["plain", "masters", "dynamic", "hooks", "adam", "msvag"],
)
@pytest.mark.parametrize(("world_size", "gradients"), [(1, "auto"), (3, "auto"), (2, "replicated")])
def test_shards_resume_as_if_never_interrupted(
    tmp_path: pathlib.Path,
    world_size: int,
    configure: Callable[[Any], None],
    make_model: Callable[[], chainer.Link],
    kind: Any,
    gradients: str,
) -> None:
    def uninterrupted(collectives: ThreadCollectives) -> Any:
        optimizer = begun(collectives, configure, make_model, kind, gradients)
        optimizer.new_epoch()
        serializers.save_npz(str(tmp_path / f"{collectives.rank}.optimizer"), optimizer)
        serializers.save_npz(str(tmp_path / f"{collectives.rank}.model"), optimizer.target)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    def resumed(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, make_model, kind, gradients, seed=9)
        # In the order of Chainer's updaters: the optimizer before its model.
        load_npz(tmp_path / f"{collectives.rank}.optimizer", optimizer)
        load_npz(tmp_path / f"{collectives.rank}.model", optimizer.target)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    expected, ours = run_ranks(world_size, uninterrupted), run_ranks(world_size, resumed)
    assert ours[0].t == len(FIRST) + len(LAST)
    for one, other in zip(ours, expected, strict=True):
        assert facts(one) == facts(other)
        models.assert_same_bits(one.target, other.target)
    assert_same_states(models.gathered_states(ours), models.gathered_states(expected))


def assert_same_states(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, states in theirs.items():
        assert ours[name].keys() == states.keys()
        for state, values in states.items():
            assert models.bits(ours[name][state]) == models.bits(values), (name, state)


def test_a_running_training_goes_back_to_a_shard() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        optimizer = begun(collectives)
        saved = serializers.npz.serialize(optimizer)
        before = {name: array.copy() for name, array in models.arrays(optimizer.target).items()}
        ends = []
        for _ in range(2):
            train(optimizer, LAST, collectives.rank)
            ends.append({n: models.bits(a) for n, a in models.arrays(optimizer.target).items()})
            assert optimizer.t == len(FIRST) + len(LAST)
            serializers.NpzDeserializer(saved).load(optimizer)
            for name, array in models.arrays(optimizer.target).items():
                array[...] = before[name]
        assert ends[0] == ends[1]

    run_ranks(2, run)


@pytest.mark.parametrize("saved_by", [2, 5])
def test_shards_of_another_world_size_are_refused_before_anything_changes(
    tmp_path: pathlib.Path, saved_by: int
) -> None:
    def save(collectives: ThreadCollectives) -> None:
        optimizer = begun(collectives)
        serializers.save_npz(str(tmp_path / f"{collectives.rank}"), optimizer)

    def load(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        before = facts(optimizer)
        file = min(collectives.rank, saved_by - 1)
        message = (
            rf"of rank {file} of {saved_by}, but this is rank {collectives.rank} of 3\. Start "
            rf"{saved_by} ranks, .*smorms3_dist\.extensions\.snapshot"
        )
        with pytest.raises(RuntimeError, match=message):
            load_npz(tmp_path / f"{file}", optimizer)
        assert facts(optimizer) == before

    run_ranks(saved_by, save)
    run_ranks(3, load)


def test_the_shard_of_another_rank_or_model_is_refused(tmp_path: pathlib.Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = begun(collectives)
        serializers.save_npz(str(tmp_path / f"{collectives.rank}"), optimizer)
        other = 1 - collectives.rank
        collectives.all_gather_object(None)  # Both files are there.
        with pytest.raises(RuntimeError, match=f"of rank {other} of 2, but this is rank"):
            load_npz(tmp_path / f"{other}", optimizer)
        shapes = {**SHAPES, "g": (40, 61)}
        different = make(collectives, make_model=lambda: models.Model(shapes))
        different.update()
        with pytest.raises(RuntimeError, match=r"of parameter /\w+ it holds the ranges"):
            load_npz(tmp_path / f"{collectives.rank}", different)
        assert different.t == 0
        half = make(collectives, masters, lambda: models.Model(SHAPES, {"g": "float16"}))
        half.update()
        with pytest.raises(RuntimeError, match=r"use_fp32_update|it holds the ranges"):
            load_npz(tmp_path / f"{collectives.rank}", half)

    run_ranks(2, run)


@pytest.mark.parametrize(("world_size", "root"), [(2, 0), (2, 1), (5, 1)])
def test_consolidated_states_are_chainers_own(world_size: int, root: int) -> None:
    theirs = model()
    plain = models.train_with_chainer(theirs, world_size, FIRST)
    expected = serializers.npz.serialize(plain)

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = begun(collectives)
        optimizer.consolidate(root)
        saved = serializers.npz.serialize(optimizer) if collectives.rank == root else None
        train(optimizer, LAST, collectives.rank)
        return saved, optimizer.target

    results = run_ranks(world_size, run)
    saved = results[root][0]
    own = {key: value for key, value in saved.items() if not key.startswith("smorms3_dist/")}
    assert own.keys() == expected.keys() > {"t", "g/mem", "g/t"}
    for key, value in expected.items():
        if world_size <= 2 and not key.startswith("d/"):
            assert np.asarray(own[key]).tobytes() == np.asarray(value).tobytes(), key
        assert np.shape(own[key]) == np.shape(value)
    # Chainer goes on with it as the ranks do.
    continued = chainer.optimizers.SMORMS3().setup(model())
    serializers.NpzDeserializer(saved).load(continued)
    for name, param in continued.target.namedparams():
        param.array[...] = dict(theirs.namedparams())[name].array
    train_chainer(continued, LAST, world_size)
    assert continued.t == len(FIRST) + len(LAST)
    if world_size <= 2:
        models.assert_same_bits(results[0][1], continued.target)


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("when", ["before the model", "after the model", "after an update"])
@pytest.mark.parametrize("kind", [SMORMS3, Adam])
def test_snapshots_of_chainer_load_at_any_world_size(
    tmp_path: pathlib.Path, kind: Any, when: str, world_size: int
) -> None:
    theirs = model()
    plain = models.train_with_chainer(theirs, world_size, FIRST, make=kind)
    serializers.save_npz(str(tmp_path / "optimizer"), plain)
    serializers.save_npz(str(tmp_path / "model"), theirs)
    train_chainer(plain, LAST, world_size)

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, kind=kind, seed=9)
        if when == "after an update":
            optimizer.update()
            train(optimizer, range(20, 22), collectives.rank)
        if when == "after the model":
            load_npz(tmp_path / "model", optimizer.target)
        load_npz(tmp_path / "optimizer", optimizer)
        if when != "after the model":
            load_npz(tmp_path / "model", optimizer.target)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    ours = run_ranks(world_size, run)
    for optimizer in ours:
        assert optimizer.t == plain.t
        models.assert_same_bits(optimizer.target, theirs)
        # Whole states went to shards.
        assert all(param.update_rule.state is None for param in optimizer.target.params())


class Lazy(chainer.Chain):
    """A model whose first weight is made by the first forward pass, or by a snapshot."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.linear = chainer.links.Linear(None, 3, initialW=0.5)

    def use(self) -> None:
        self.linear(np.ones((2, 5), np.float32))


def test_states_of_parameters_that_are_not_yet_initialized(tmp_path: pathlib.Path) -> None:
    theirs = Lazy()
    theirs.use()
    plain = models.train_with_chainer(theirs, 2, FIRST)
    serializers.save_npz(str(tmp_path / "optimizer"), plain)
    serializers.save_npz(str(tmp_path / "model"), theirs)
    train_chainer(plain, LAST, 2)

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, make_model=Lazy)
        load_npz(tmp_path / "optimizer", optimizer)
        load_npz(tmp_path / "model", optimizer.target)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    for optimizer in run_ranks(2, run):
        models.assert_same_bits(optimizer.target, theirs)


def test_a_consolidated_snapshot_resumes_at_another_world_size_with_masters_and_scale() -> None:
    def save(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, dynamic, half_model)
        optimizer.update()
        train(optimizer, FIRST)  # Alike on all ranks, so that every world size does the same.
        optimizer.consolidate()
        saved = serializers.npz.serialize(optimizer)
        of_model = serializers.npz.serialize(optimizer.target)
        of_model = {key: np.array(value) for key, value in of_model.items()}
        train(optimizer, LAST)
        return saved, of_model, optimizer

    results = run_ranks(4, save)
    saved, saved_model, expected = results[0]

    def load(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, dynamic, half_model, seed=9)
        serializers.NpzDeserializer(saved).load(optimizer)
        serializers.NpzDeserializer(saved_model).load(optimizer.target)
        train(optimizer, LAST)
        return optimizer

    for optimizer in run_ranks(2, load):
        assert facts(optimizer) == facts(expected)
        models.assert_same_bits(optimizer.target, expected.target)


def test_a_static_scale_of_the_script_stands() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = begun(collectives, lambda optimizer: optimizer.set_loss_scale(8.0))
        saved = serializers.npz.serialize(optimizer)
        for configured, expected in [(None, 8.0), (8.0, 8.0), (16.0, 16.0)]:
            other = make(collectives)
            if configured is not None:
                other.set_loss_scale(configured)
            serializers.NpzDeserializer(saved).load(other)
            assert other._loss_scale == expected

    run_ranks(2, run)


def test_consolidation_takes_memory_on_the_root_alone() -> None:
    elements = 1_500_000

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, make_model=lambda: models.Model({"a": (elements,)}))
        optimizer.update()
        train(optimizer, range(1, 2))
        collectives.all_gather_object(None)
        if collectives.rank == 0:
            tracemalloc.start()
        collectives.all_gather_object(None)
        optimizer.consolidate()
        collectives.all_gather_object(None)
        if collectives.rank == 0:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            # Both ranks are threads of this process: whole states once, and pieces of 2 MiB.
            assert 12 * elements <= peak < 12 * elements + 12 * 2**20
        optimizer.release_consolidated()

    run_ranks(2, run)


def test_a_shard_is_a_copy_that_does_not_load_in_chainer_and_can_be_saved_again() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = begun(collectives)
        saved = serializers.npz.serialize(optimizer)
        before = {key: np.array(value).tobytes() for key, value in saved.items()}
        optimizer.consolidate()
        # Of no use after the next step.
        train(optimizer, LAST)
        assert serializers.npz.serialize(optimizer).keys() == saved.keys()
        assert {key: np.asarray(value).tobytes() for key, value in saved.items()} == before
        assert "smorms3_dist/world_size" in saved
        assert "g/mem" not in saved
        with pytest.raises(KeyError):
            serializers.NpzDeserializer(saved).load(SMORMS3().setup(model()))
        # Before the first update.
        other = make(collectives)
        serializers.NpzDeserializer(saved).load(other)
        again = serializers.npz.serialize(other)
        assert {key: np.asarray(value).tobytes() for key, value in again.items()} == before
        with pytest.raises(RuntimeError, match="wait for its first update"):
            other.consolidate()

    run_ranks(2, run)


@pytest.mark.parametrize("doing", ["saved its shard", "loaded a snapshot"])
def test_what_only_one_rank_saves_or_loads_is_noticed_at_the_next_update(doing: str) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = begun(collectives)
        saved = serializers.npz.serialize(optimizer)
        train(optimizer, FIRST)
        if collectives.rank == 1:
            if doing == "saved its shard":
                serializers.npz.serialize(optimizer)
            else:
                serializers.NpzDeserializer(saved).load(optimizer)
        message = rf"rank 0 has done nothing, but rank 1 has {doing}.*consolidate\(\) on all ranks"
        with pytest.raises(RuntimeError, match=message):
            train(optimizer, LAST)

    run_ranks(2, run)


def test_saving_a_shard_is_said_once_on_rank_0(caplog: pytest.LogCaptureFixture) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        for _ in range(2):
            train(optimizer, FIRST)
            serializers.npz.serialize(optimizer)

    with caplog.at_level(logging.WARNING, "smorms3_dist"):
        run_ranks(2, run)
    assert [record.message[:52] for record in caplog.records] == [
        "a snapshot holds this rank's shard of the optimizer "
    ]


def test_snapshots_of_later_versions_and_without_a_target_are_refused() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        saved = serializers.npz.serialize(optimizer)
        saved["smorms3_dist/version"] = np.array(VERSION + 1)
        with pytest.raises(RuntimeError, match=r"later version .* update the package"):
            serializers.NpzDeserializer(saved).load(optimizer)
        bare = create_multi_node_optimizer(SMORMS3(), collectives)
        with pytest.raises(RuntimeError, match=r"call setup\(link\) before"):
            serializers.npz.serialize(bare)

    run_ranks(1, run)


def test_a_snapshot_that_lacks_a_parameter_changes_nothing() -> None:
    plain = models.train_with_chainer(model(), 1, FIRST)
    saved = serializers.npz.serialize(plain)
    del saved["g/g2"]

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        before = facts(optimizer)
        with pytest.raises(KeyError):
            serializers.NpzDeserializer(saved).load(optimizer)
        assert facts(optimizer) == before
        assert all(param.update_rule.state is None for param in optimizer.target.params())

    run_ranks(2, run)
