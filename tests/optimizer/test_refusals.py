"""Promise 6: what is not supported is refused, with a remedy, before anything is changed."""

from __future__ import annotations

from typing import Any

from smorms3_dist import create_multi_node_optimizer, shard

import chainer
import chainer.links as L
import models
import numpy as np
import pytest
from chainer.backend import CpuDevice
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
    def run(collectives: ThreadCollectives) -> None:
        before = models.Model()
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.setup(before).update()
        models.set_gradients(before, 0, 1)
        optimizer.update()
        rules = {name: param.update_rule for name, param in before.namedparams()}
        with pytest.raises(error, match=message):
            optimizer.setup(make())
        assert (optimizer.target, optimizer.t) == (before, 1)
        for name, param in before.namedparams():
            assert param.update_rule is rules[name]
        models.set_gradients(before, 0, 2)
        optimizer.update()
        assert optimizer.t == 2

    run_ranks(1, run)


@pytest.mark.parametrize(("make", "error", "message"), UNSUPPORTED_MODELS[1:])
def test_promise_6_wrapping_refuses_the_model_of_an_optimizer_that_is_set_up(
    make: Any, error: type[Exception], message: str
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        actual = chainer.optimizers.SMORMS3().setup(make())
        with pytest.raises(error, match=message):
            create_multi_node_optimizer(actual, collectives)

    run_ranks(1, run)


def test_promise_6_a_model_that_goes_where_nothing_is_supported_after_setup_is_refused() -> None:
    class OtherArray(np.ndarray):
        """Stands for an array of another library."""

    def run(collectives: ThreadCollectives) -> None:
        link = placed(a="@numpy")
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.setup(link)
        link.a.grad = np.ones(3, "f")
        optimizer.update()
        link.a.array = np.ones(3, "f").view(OtherArray)
        link.a.place = Elsewhere("native:0")
        with pytest.raises(TypeError, match="parameter /a is on device native:0"):
            optimizer.update()

    run_ranks(1, run)


class NoGradientMethod(chainer.Optimizer):
    pass


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda c: (object(), c), TypeError, r"object cannot be sharded: it is no chainer\.Grad"),
        (lambda c: (NoGradientMethod(), c), TypeError, "NoGradientMethod cannot be sharded"),
        (lambda c: (chainer.optimizers.SMORMS3(), None), TypeError, "is not a communicator"),
        (
            lambda c: (create_multi_node_optimizer(chainer.optimizers.SMORMS3(), c), c),
            TypeError,
            r"is a multi-node optimizer already; pass it to smorms3_dist\.shard\(\)",
        ),
        (
            lambda c: (chainer.optimizers.SMORMS3(), c, True),
            ValueError,
            r"double_buffering=True is not supported: .* Leave it out",
        ),
    ],
)
def test_promise_6_the_factory_refuses_wrong_arguments(
    make: Any, error: type[Exception], message: str
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        with pytest.raises(error, match=message):
            create_multi_node_optimizer(*make(collectives))

    run_ranks(1, run)


def test_promise_6_a_gradient_mode_that_is_none_is_refused() -> None:
    def run(collectives: ThreadCollectives) -> None:
        with pytest.raises(ValueError, match="gradients must be one of auto, replicated, sharded"):
            create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives, gradients="some")
        with pytest.raises(ValueError, match="gradients must be one of"):
            shard(
                create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives), gradients=""
            )

    run_ranks(1, run)


def test_promise_6_a_communication_dtype_without_nccl_is_refused() -> None:
    def run(collectives: ThreadCollectives) -> None:
        with pytest.raises(ValueError, match="communication_dtype must be None, 'float16' or"):
            create_multi_node_optimizer(
                chainer.optimizers.SMORMS3(), collectives, communication_dtype="float32"
            )
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, communication_dtype="float16"
        ).setup(models.Model())
        with pytest.raises(ValueError, match="is for NCCL, but the model is in host memory"):
            optimizer.update()

    run_ranks(1, run)


def test_promise_6_update_before_setup_is_refused() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        with pytest.raises(RuntimeError, match=r"call setup\(link\) before update\(\)"):
            optimizer.update()

    run_ranks(1, run)


def test_a_model_with_nothing_but_uninitialized_parameters_can_be_set_up() -> None:
    def run(collectives: ThreadCollectives) -> int:
        model = L.Linear(None, 3)
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.setup(model)
        for _ in range(3):
            optimizer.update(lambda: chainer.functions.sum(model(np.ones((2, 4), "f"))))
        return optimizer.t

    assert run_ranks(2, run) == [2, 2]
