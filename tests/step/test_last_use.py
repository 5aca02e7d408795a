"""When gradients are final, and that Chainer computes the same ones while it is watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist.step.last_use import watching

import chainer
import chainer.functions as F
import numpy as np
import pytest

Graph = Callable[[chainer.Parameter, chainer.Parameter, chainer.Parameter], chainer.Variable]


def penalized(a: Any, b: Any, c: Any) -> Any:
    """A loss that has a gradient in it."""
    x = chainer.Variable(np.ones((3, 3), np.float32))
    y = F.sum(F.tanh(x @ a) @ b)
    (slope,) = chainer.grad([y], [x], enable_double_backprop=True)
    return F.sum(F.square(slope)) + F.sum(y * c)


def looped(a: Any, b: Any, c: Any) -> Any:
    """A loss of a network that takes the same way several times."""
    h = F.tanh(c)
    for _ in range(4):
        h = F.tanh(h @ a + b)
    return F.sum(h)


GRAPHS: dict[str, tuple[Graph, str]] = {
    "a chain": (lambda a, b, c: F.sum(F.tanh(F.tanh(a @ b) @ c)), "cba"),
    "shared": (lambda a, b, c: F.sum((F.tanh(a @ b) @ a) @ c), "cba"),
    "twice in the function that comes last": (lambda a, b, c: F.sum(F.matmul(a, a) @ b @ c), "cb"),
    "twice in one that comes before": (lambda a, b, c: F.sum(F.matmul(a, a) @ F.tanh(a) * b), "ab"),
    "unused": (lambda a, b, c: F.sum(a @ b), "ab"),
    "a gradient in the loss": (penalized, "cba"),
    "looped": (looped, "bac"),
    "a parameter as loss": (lambda a, b, c: F.sum(a), "a"),
    "not differentiable": (lambda a, b, c: F.sum(F.sign(a) @ b), "b"),
}


def parameters() -> list[chainer.Parameter]:
    rng = np.random.RandomState(0)
    return [chainer.Parameter(rng.randn(3, 3).astype(np.float32)) for _ in "abc"]


@pytest.mark.parametrize("of", GRAPHS)
def test_gradients_are_chainers_bit_for_bit_and_final_when_they_are_said_to_be(of: str) -> None:
    graph, expected = GRAPHS[of]
    plain, watched = parameters(), parameters()
    graph(*plain).backward()
    names = dict(zip(map(id, watched), "abc", strict=True))
    final: dict[str, Any] = {}
    for _ in range(2):
        # The second time gradients are added to those that are there.
        final.clear()
        loss = graph(*watched)
        with watching(loss, watched, lambda p, g: final.update({names[id(p)]: g})):
            loss.backward()
        for one, other in zip(plain, watched, strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or one.grad.tobytes() == other.grad.tobytes()
        assert sorted(final) == sorted(expected)
        for name, param in zip("abc", watched, strict=True):
            assert name not in final or param.grad is final[name]
        graph(*plain).backward()


def test_they_become_final_in_the_order_of_the_backward_pass_and_before_its_end() -> None:
    a, b, c = parameters()
    came: list[Any] = []
    graph, _ = GRAPHS["a chain"]

    class Noting(chainer.FunctionHook):
        def backward_postprocess(self, function: Any, in_data: Any, out_grad: Any) -> None:
            came.append(function.label.lower())

    loss = graph(a, b, c)
    names = {id(a): "a", id(b): "b", id(c): "c"}
    with watching(loss, [a, b, c], lambda p, g: came.append(names[id(p)])), Noting():
        loss.backward()
    assert [each for each in came if each in "abc"] == ["c", "a", "b"]
    assert came.index("c") < came.index("matmul") < came.index("a")


def test_functions_are_left_as_they_were_even_if_one_fails() -> None:
    a, b, _ = parameters()

    class Failing(chainer.FunctionNode):
        def forward(self, inputs: Any) -> Any:
            return (inputs[0].copy(),)

        def backward(self, indexes: Any, grads: Any) -> Any:
            raise FloatingPointError("here")

    product = a @ b
    (y,) = Failing().apply((product,))
    loss = F.sum(y)
    assert product.creator is not None
    with pytest.raises(FloatingPointError), watching(loss, [a, b], lambda p, g: None):
        assert "backward_accumulate" in vars(product.creator)
        loss.backward()
    assert "backward_accumulate" not in vars(product.creator)


def test_lazy_sums_and_functions_that_run_backward_themselves_are_passed_over() -> None:
    a, b, c = parameters()
    final: list[chainer.Parameter] = []
    with chainer.using_config("lazy_grad_sum", True):
        loss = F.sum(F.tanh(a @ b) @ a @ c)
        with watching(loss, [a, b, c], lambda p, g: final.append(p)):
            loss.backward()
    assert not final
    loss = F.sum(F.forget(lambda x: x @ a, b) @ c)
    with watching(loss, [a, b, c], lambda p, g: final.append(p)):
        loss.backward()
    assert a.grad is not None
    assert [id(param) for param in final] == [id(c), id(b)]
