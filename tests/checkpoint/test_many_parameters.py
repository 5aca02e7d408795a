"""Models of many small parameters: what a save, a load and a comparison do for each of them."""

from __future__ import annotations

import itertools
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist import load_checkpoint, save_checkpoint
from smorms3_dist.checkpoint.trainer_state import copy_state

import chainer
import models
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks


def calls_of(body: Callable[[], object]) -> int:
    """How often Python's own functions are called in this thread."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        body()
    finally:
        sys.setprofile(before)
    return count


def test_a_save_and_a_load_call_no_functions_for_each_parameter(tmp_path: Path) -> None:
    numbers = itertools.count()

    def run(collectives: ThreadCollectives, parameters: int) -> tuple[int, int]:
        model = models.Model({f"p{index}": (3,) for index in range(parameters)})
        optimizer = models.optimizer_for(model, collectives)
        models.train(optimizer, collectives.rank, range(2))

        def save() -> None:
            save_checkpoint(tmp_path / str(parameters), optimizer, step=next(numbers))

        def load() -> None:
            load_checkpoint(tmp_path / str(parameters), optimizer)

        # What is made once, when it is first needed, does not count.
        save()
        load()
        return calls_of(save), calls_of(load)

    (few,) = run_ranks(1, lambda collectives: run(collectives, 100))
    (many,) = run_ranks(1, lambda collectives: run(collectives, 300))
    assert [(many[i] - few[i]) / 200 < 0.1 for i in range(2)] == [True, True]


class FollowsParameters(chainer.training.Extension):
    """Has a value of its own for each parameter, which it finds by a walk through the model."""

    def __init__(self, model: chainer.Link, value: float) -> None:
        self._model = model
        self.values = {name: np.full(2, value) for name, _ in model.namedparams()}

    def serialize(self, serializer: Any) -> None:
        for name, _ in self._model.namedparams():
            self.values[name] = serializer(name, self.values[name])


class OwnWay(chainer.Chain):
    """A link that writes a parameter under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.inner = models.Model({"a": (3,), "b": (2, 2)})

    def serialize(self, serializer: Any) -> None:
        super().serialize(serializer)
        serializer("again", self.inner.a.array)


@pytest.mark.parametrize("make_model", [models.Model, models.Tied, OwnWay])
def test_who_walks_the_model_finds_its_parameters(
    tmp_path: Path, make_model: Callable[[], chainer.Link]
) -> None:
    """While the model itself is saved and loaded without them."""

    def run(collectives: ThreadCollectives) -> None:
        optimizer = models.optimizer_for(make_model(), collectives)
        model = optimizer.target
        models.train(optimizer, collectives.rank, range(2))
        expected = [param.array.copy() for param in model.params()]
        extension = FollowsParameters(model, 7.0)
        objects = {"average": extension, "model": model}
        save_checkpoint(tmp_path, optimizer, objects=objects)
        extension.values = dict.fromkeys(extension.values, np.zeros(2))
        models.train(optimizer, collectives.rank, [2])
        load_checkpoint(tmp_path, optimizer, objects=objects)
        assert all((value == 7).all() for value in extension.values.values())
        for param, array in zip(model.params(), expected, strict=True):
            np.testing.assert_array_equal(param.array, array)

    run_ranks(2, run)


def test_only_parameters_of_the_models_that_are_saved_count_as_saved_elsewhere() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer, other = (models.optimizer_for(models.Model(), collectives) for _ in range(2))
        for each in optimizer, other:
            models.train(each, collectives.rank, range(2))
        with optimizer.target.init_scope():
            # The update that would notice is still to come.
            optimizer.target.late = chainer.Parameter(0)
        sharded = optimizer.lay_out()
        whole = FollowsParameters(other.target, 7.0)
        whole.values = {name: param.array for name, param in other.target.namedparams()}
        row = optimizer.target.g.array[3]
        part = types.SimpleNamespace(serialize=lambda serializer: serializer("row", row))
        objects = {"model": optimizer.target, "other": whole, "part": part}
        state = copy_state(objects, [sharded])
        elsewhere = set(json.loads(state.metadata["elsewhere"]))
        assert elsewhere == {f"model/{name}" for name in models.SHAPES}
        assert json.loads(state.metadata["values"]) == {"model/late": None}
        for name, param in other.target.namedparams():
            np.testing.assert_array_equal(state.arrays[f"other{name}"], param.array)
        np.testing.assert_array_equal(state.arrays["part/row"], row)

    run_ranks(2, run)
