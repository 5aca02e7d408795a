"""docs/the-step.md: forty lines of NumPy that give the bits of the real optimizer."""

from __future__ import annotations

from typing import Any

import smorms3_dist

import chainer
import numpy as np
import pages
import pytest
from rank_threads import ThreadCollectives, run_ranks

STEPS = 6
SHAPES = {"/a": (3, 5), "/b": (1,), "/c/W": (33, 2), "/c/b": (0, 4), "/d": (200, 61)}


def values(name: str, rank: int, step: int) -> np.ndarray:
    rng = np.random.RandomState([*name.encode(), rank, step])
    magnitudes = 10.0 ** rng.randint(-4, 2, SHAPES[name])
    return (rng.standard_normal(SHAPES[name]) * magnitudes).astype(np.float32)


def train_by_the_page(world_size: int) -> dict[str, np.ndarray]:
    page: dict[str, Any] = {}
    exec("\n".join(pages.blocks(pages.read("the-step.md"), "python")), page)
    places, length = page["lay_out"](SHAPES, world_size)
    ranks = range(world_size)
    start = {name: values(name, 0, 0) for name in SHAPES}
    params = [page["pack"](start, places, length) for _ in ranks]
    shards = [page["Shard"](rank, world_size, length) for rank in ranks]
    for step in range(1, STEPS):
        grads = [{name: values(name, rank, step) for name in SHAPES} for rank in ranks]
        page["step"](params, [page["pack"](g, places, length) for g in grads], shards)
    assert len({flat.tobytes() for flat in params}) == 1
    return {name: params[0][place].reshape(SHAPES[name]) for name, place in places.items()}


def train_by_the_optimizer(collectives: ThreadCollectives) -> dict[str, np.ndarray]:
    model = chainer.Chain(c=chainer.Link())
    for name, shape in SHAPES.items():
        link = model.c if name.startswith("/c/") else model
        with link.init_scope():
            array = np.zeros(shape, np.float32) if collectives.rank else values(name, 0, 0)
            setattr(link, name.rpartition("/")[2], chainer.Parameter(array))
    optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
    optimizer.setup(model)
    for step in range(STEPS):
        for name, param in model.namedparams():
            param.grad = values(name, collectives.rank, step)
        optimizer.update()
    assert (optimizer.gradient_mode, optimizer.t) == ("sharded", STEPS - 1)
    return {name: param.array for name, param in model.namedparams()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_page_gives_the_bits_of_the_optimizer(world_size: int) -> None:
    expected = train_by_the_page(world_size)
    for found in run_ranks(world_size, train_by_the_optimizer):
        assert found.keys() == expected.keys() == SHAPES.keys()
        for name, array in found.items():
            assert array.tobytes() == expected[name].tobytes(), name
            assert not array.size or array.tobytes() != values(name, 0, 0).tobytes(), name
