"""Promise 6: what is not supported is refused, with a remedy, before anything is changed."""

from __future__ import annotations

from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import chainer.links as L
import models
import numpy as np
import pytest
from chainer.backend import CpuDevice
from chainer.optimizers import SMORMS3
from rank_threads import ThreadCollectives, run_ranks


class Elsewhere:
    """The device of an array that is not NumPy's, as far as messages show it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name


class Placed(chainer.Parameter):
    """A parameter that says that it is on some device."""

    place: Any = CpuDevice()

    @property
    def device(self) -> Any:
        return self.place


def placed(**places: str) -> chainer.Link:
    """A link with a parameter on each of the devices, by name."""
    link = chainer.Link()
    with link.init_scope():
        for name, place in places.items():
            param = Placed(np.ones(3, "f"))
            param.place = CpuDevice() if place == "@numpy" else Elsewhere(place)
            setattr(link, name, param)
    return link


UNSUPPORTED_MODELS = [
    (lambda: object(), TypeError, "optimization target must be a link, not object"),
    (lambda: chainer.Chain(), ValueError, "the link Chain has no parameters to update; pass"),
    (
        lambda: placed(a="@numpy", b="@cupy:0"),
        ValueError,
        r"several devices: /a on @numpy, /b on @cupy:0\. Move the whole model to one with",
    ),
    (
        lambda: placed(a="native:0"),
        TypeError,
        r"parameter /a is on device native:0; .* Move the model with model\.to_device",
    ),
    (
        lambda: models.Model({"a": (2,)}, {"a": "int32"}),
        TypeError,
        "parameter /a has dtype int32; .* Register it as a persistent value instead",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), UNSUPPORTED_MODELS)
def test_promise_6_setup_refuses_the_model_and_changes_nothing(
    make: Any, error: type[Exception], message: str
) -> None:
    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, 0, range(2))
        before = optimizer.target
        rules = {name: param.update_rule for name, param in before.namedparams()}
        with pytest.raises(error, match=message):
            optimizer.setup(make())
        assert (optimizer.target, optimizer.t) == (before, 1)
        for name, param in before.namedparams():
            assert param.update_rule is rules[name]
        models.train(optimizer, 0, [2])
        assert optimizer.t == 2
        if error is not TypeError or "link" not in message:
            # Nor is an optimizer wrapped that has such a model.
            actual = SMORMS3().setup(make())
            with pytest.raises(error, match=message):
                create_multi_node_optimizer(actual, optimizer.communicator)

    models.on_ranks(1, body)


def test_promise_6_a_model_that_goes_where_nothing_is_supported_after_setup_is_refused() -> None:
    class OtherArray(np.ndarray):
        """Stands for an array of another library."""

    def body(optimizer: Any, rank: int) -> None:
        link = optimizer.target
        link.a.grad = np.ones(3, "f")
        optimizer.update()
        link.a.array = np.ones(3, "f").view(OtherArray)
        link.a.place = Elsewhere("native:0")
        with pytest.raises(TypeError, match="parameter /a is on device native:0"):
            optimizer.update()

    models.on_ranks(1, body, make_model=lambda: placed(a="@numpy"))


class NoGradientMethod(chainer.Optimizer):
    pass


@pytest.mark.parametrize(
    ("actual", "options", "error", "message"),
    [
        (object, {}, TypeError, r"object cannot be sharded: it is no chainer\.Grad"),
        (NoGradientMethod, {}, TypeError, "NoGradientMethod cannot be sharded"),
        (SMORMS3, {"communicator": None}, TypeError, "is not a communicator"),
        (SMORMS3, {"gradients": "some"}, ValueError, "must be one of auto, replicated, sharded"),
        (
            *(SMORMS3, {"communication_dtype": "float64"}, ValueError),
            "communication_dtype must be None or one of float32, float16, bfloat16, not 'float64'",
        ),
        (SMORMS3, {"gather_dtype": "int8"}, ValueError, "gather_dtype must be None or one of"),
    ],
)
def test_promise_6_the_factory_refuses_wrong_arguments(
    actual: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        with pytest.raises(error, match=message):
            create_multi_node_optimizer(actual(), **{"communicator": collectives, **options})
        sharded = create_multi_node_optimizer(SMORMS3(), collectives)
        with pytest.raises(TypeError, match=r"already; pass it to smorms3_dist\.shard\(\)"):
            create_multi_node_optimizer(sharded, collectives)

    run_ranks(1, run)


def test_promise_6_update_before_setup_is_refused() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(SMORMS3(), collectives)
        with pytest.raises(RuntimeError, match=r"call setup\(link\) before update\(\)"):
            optimizer.update()

    run_ranks(1, run)


def test_a_model_with_nothing_but_uninitialized_parameters_can_be_set_up() -> None:
    def body(optimizer: Any, rank: int) -> int:
        for _ in range(3):
            optimizer.update(lambda: chainer.functions.sum(optimizer.target(np.ones((2, 4), "f"))))
        return optimizer.t

    assert models.on_ranks(2, body, make_model=lambda: L.Linear(None, 3)) == [2, 2]
