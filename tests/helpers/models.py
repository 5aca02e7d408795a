"""Models of odd shapes, deterministic gradients, and the same training by Chainer's own classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import numpy as np
from chainer.backends import cuda
from rank_threads import ThreadCollectives, run_ranks

Shape = tuple[int, ...]

SHAPES: dict[str, Shape] = {
    "a": (3, 5),
    "b": (1,),
    "c": (7,),
    # Chainer's update of 0-dimensional arrays is in float64 with NumPy 1, and not here.
    "d": () if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else (1,),
    "e": (33, 2),
    "f": (0, 4),
    "g": (500, 61),
}


class Model(chainer.Link):
    """A link with parameters of given shapes and dtypes; which values depends on the seed alone."""

    def __init__(
        self, shapes: dict[str, Shape] = SHAPES, dtypes: dict[str, str] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        rng = np.random.RandomState(seed)
        with self.init_scope():
            for name, shape in shapes.items():
                dtype = (dtypes or {}).get(name, "float32")
                array = np.asarray(rng.standard_normal(shape)).astype(dtype)
                setattr(self, name, chainer.Parameter(array))
        self.cleargrads()


class Tied(chainer.Chain):
    """A model to one of whose parameters two paths lead."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.inner = Model()
            self.twin = Model()
            self.twin.g = self.inner.g


def gradient(name: str, param: chainer.Parameter, rank: int, step: int) -> np.ndarray:
    """The gradient of a parameter, different for each rank and step; of many magnitudes."""
    return _gradient(name, param.shape, rank, step).astype(param.dtype)


@functools.lru_cache(maxsize=4096)
def _gradient(name: str, shape: Shape, rank: int, step: int) -> np.ndarray:
    rng = np.random.RandomState([ord(c) for c in name] + [rank, step])
    return np.asarray(rng.standard_normal(shape) * 10.0 ** rng.randint(-4, 2, shape))


def optimizer_for(model: chainer.Link, collectives: ThreadCollectives, **options: Any) -> Any:
    """A sharded SMORMS3, set up with a model."""
    actual = chainer.optimizers.SMORMS3()
    return create_multi_node_optimizer(actual, collectives, **options).setup(model)


def on_ranks(
    world_size: int,
    body: Callable[[Any, int], Any],
    make: Callable[[], chainer.GradientMethod] = chainer.optimizers.SMORMS3,
    make_model: Callable[[], chainer.Link] = Model,
    **options: Any,
) -> list[Any]:
    """Runs ``body(optimizer, rank)`` on every rank with a sharded optimizer that is set up."""

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = create_multi_node_optimizer(make(), collectives, **options)
        return body(optimizer.setup(make_model()), collectives.rank)

    return run_ranks(world_size, run)


def train(optimizer: Any, rank: int, steps: Iterable[int]) -> None:
    """Makes an update of any optimizer for each step, with the gradients of a rank."""
    for step in steps:
        set_gradients(optimizer.target, rank, step)
        with np.errstate(all="ignore"):
            optimizer.update()


def set_gradients(model: chainer.Link, rank: int, step: int) -> None:
    """Gives every initialized parameter its gradient."""
    for name, param in model.namedparams(include_uninit=False):
        param.grad = param.device.send(gradient(name, param, rank, step))


def loss_with_gradients(model: chainer.Link, rank: int, step: int) -> chainer.Variable:
    """A loss that has the gradients of `set_gradients`."""
    F = chainer.functions
    products = (
        F.cast(F.sum(param * param.device.send(gradient(name, param, rank, step))), np.float32)
        for name, param in sorted(model.namedparams(include_uninit=False))
    )
    return sum(products, start=chainer.Variable(model.device.send(np.zeros((), np.float32))))


def mean_gradient(grads: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over ranks, formed as ChainerMN's naive communicator does; float16 in float32."""
    wide = np.float32 if grads[0].dtype == np.float16 else grads[0].dtype.type
    total = grads[0].astype(wide)
    for grad in grads[1:]:
        total = total + grad.astype(wide)
    return np.asarray(total * wide(1.0 / len(grads))).astype(grads[0].dtype)


def set_mean_gradients(model: chainer.Link, world_size: int, step: int) -> None:
    """Gives every initialized parameter the mean of the ranks' gradients."""
    for name, param in model.namedparams(include_uninit=False):
        grads = [gradient(name, param, rank, step) for rank in range(world_size)]
        param.grad = param.device.send(mean_gradient(grads))


def train_with_chainer(
    model: chainer.Link,
    world_size: int,
    steps: Iterable[int],
    configure: Callable[[Any], None] = lambda optimizer: None,
    make: Callable[..., chainer.GradientMethod] = chainer.optimizers.SMORMS3,
    before_step: Callable[[Any, int], None] = lambda optimizer, step: None,
    **hyperparameters: float,
) -> Any:
    """Trains by Chainer's own optimizer on the mean gradients of all ranks, in one process."""
    optimizer = make(**hyperparameters).setup(model)
    configure(optimizer)
    for step in steps:
        before_step(optimizer, step)
        set_mean_gradients(model, world_size, step)
        with np.errstate(all="ignore"):
            optimizer.update()
    return optimizer


def train_sharded(
    world_size: int,
    make_model: Callable[[], chainer.Link],
    steps: Iterable[int],
    configure: Callable[[Any], None] = lambda optimizer: None,
    gradients: str = "auto",
    make: Callable[..., chainer.GradientMethod] = chainer.optimizers.SMORMS3,
    before_step: Callable[[Any, int], None] = lambda optimizer, step: None,
    finish: Callable[[Any], None] = lambda optimizer: None,
    share_parameters: bool = False,
    **hyperparameters: float,
) -> list[Any]:
    """Trains by the sharded optimizer on ranks that are threads; returns their optimizers.

    ``finish`` is called after the last step, where ranks can communicate.
    """

    def run(collectives: ThreadCollectives) -> Any:
        model = make_model()
        optimizer = create_multi_node_optimizer(
            make(**hyperparameters),
            collectives,
            gradients=gradients,
            share_parameters=share_parameters,
        ).setup(model)
        configure(optimizer)
        optimizer.update()
        for step in steps:
            before_step(optimizer, step)
            set_gradients(model, collectives.rank, step)
            with np.errstate(all="ignore"):
                optimizer.update()
        finish(optimizer)
        return optimizer

    return run_ranks(world_size, run)


class OwnOptimizer(chainer.GradientMethod):
    """A gradient method with a given rule."""

    def __init__(self, rule: Callable[[], Any]) -> None:
        super().__init__()
        self.rule = rule

    def create_update_rule(self) -> Any:
        """A new rule."""
        return self.rule()


class NormalizedRule(chainer.UpdateRule):
    """A rule that is not elementwise."""

    def init_state(self, param: Any) -> None:
        """Starts from zeros."""
        self.state["v"] = np.zeros_like(param.array)

    def update_core_cpu(self, param: Any) -> None:
        """Looks at the whole gradient."""
        v = self.state["v"]
        v *= 0.5
        v += param.grad
        param.array -= 0.01 * v / (np.abs(v).sum() + 1)


def arrays(model: chainer.Link) -> dict[str, np.ndarray]:
    """The parameters' arrays by name."""
    return {name: p.array for name, p in sorted(model.namedparams(include_uninit=False))}


def bits(array: np.ndarray) -> bytes:
    """The bytes of an array, with all nans alike: hardware is free to choose their payload."""
    return np.where(np.isnan(array), np.array(np.nan, array.dtype), array).tobytes()


def assert_same_bits(ours: chainer.Link, theirs: chainer.Link) -> None:
    """Fails, naming the parameter, unless two models are equal bit for bit."""
    mine, expected = arrays(ours), arrays(theirs)
    assert mine and mine.keys() == expected.keys()
    for name, array in mine.items():
        assert array.dtype == expected[name].dtype, name
        assert bits(array) == bits(expected[name]), (
            name,
            np.max(np.abs(array - expected[name])),
        )


def assert_alike(links: Sequence[chainer.Link]) -> None:
    """Fails unless the models of several ranks are equal bit for bit."""
    first, *others = links
    assert others
    for link in others:
        assert_same_bits(link, first)


def gathered_states(optimizers: Sequence[Any]) -> dict[str, dict[str, np.ndarray]]:
    """Puts the states of all ranks together, by parameter and name of the state."""
    states: dict[str, dict[str, np.ndarray]] = {}
    for optimizer in optimizers:
        for update in optimizer.sharded_model.sharded_groups:
            for segment in update.shard.segments:
                slot = segment.slot
                whole = states.setdefault(slot.name, {})
                for name, shard in update.states.items():
                    if name not in whole:
                        whole[name] = np.full(slot.size, np.nan, shard.dtype)
                    mine = shard[segment.start_s : segment.stop_s]
                    whole[name][segment.range_p] = cuda.to_cpu(mine)
    return states


def assert_same_training(optimizers: Sequence[Any], theirs: chainer.Link) -> None:
    """Fails unless all ranks have the parameters, counts and states of a model Chainer has trained.

    The kernels keep the dtype of 0-dimensional states, which Chainer does not: these are left out.
    """
    names = {id(param): name for name, param in sorted(theirs.namedparams(), reverse=True)}
    states = gathered_states(optimizers)
    for optimizer in optimizers:
        assert_same_bits(optimizer.target, theirs)
    for path, param in theirs.namedparams():
        rule = param.update_rule
        rules = [dict(o.target.namedparams())[path].update_rule for o in optimizers]
        if rule is None:
            assert rules == [None] * len(rules), path
            continue
        assert [ours.t for ours in rules] == [rule.t] * len(rules), path
        if rule.state is None or not param.size or not param.ndim:
            continue
        expected = dict(rule.state)
        if rule._fp32_param is not None:
            expected["fp32_param"] = rule._fp32_param.array
        mine = states.get(names[id(param)], {})
        assert mine.keys() == expected.keys(), path
        for name, values in expected.items():
            assert bits(mine[name]) == bits(np.ravel(values)), (path, name)


def assert_equals_chainer(
    world_size: int,
    gradients: str,
    make: Callable[..., chainer.GradientMethod] = chainer.optimizers.SMORMS3,
    configure: Callable[[Any], None] = lambda optimizer: None,
    make_model: Callable[[], chainer.Link] = Model,
) -> list[Any]:
    """Trains both ways and compares everything; returns the sharded optimizers."""
    steps = range(1, 6)
    theirs = make_model()
    train_with_chainer(theirs, world_size, steps, configure, make=make)
    ours = train_sharded(world_size, make_model, steps, configure, gradients, make=make)
    assert [optimizer.gradient_mode for optimizer in ours] == [gradients] * world_size
    assert_same_training(ours, theirs)
    return ours
