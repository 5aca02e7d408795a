"""What is believed of links and their parameters is so in Chainer."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import smorms3_dist  # noqa: F401  (patches Chainer)
from smorms3_dist.chainer_internals.links import (
    NamedParameters,
    clear_gradients_of,
    gradients_of,
    without_parameters,
)

import chainer
import numpy as np
import pytest


class OwnWay(chainer.Link):
    """Gives its parameters by other names."""

    def namedparams(self, include_uninit: bool = True) -> Any:
        for path, param in super().namedparams(include_uninit):
            yield f"/own{path}", param


def tree(kind: type[chainer.Link] = chainer.Link) -> Any:
    """A chain with a parameter of its own, a link with two, and a list of a link with one."""

    def link(*names: str) -> Any:
        made = kind()
        with made.init_scope():
            for name in names:
                setattr(made, name, chainer.Parameter(np.ones(1, np.float32)))
        return made

    chain = chainer.Chain(a=link("W", "b"), rest=chainer.ChainList(link("W")))
    with chain.init_scope():
        chain.scale = chainer.Parameter(np.ones(1, np.float32))
    return chain


def replace_child(chain: Any) -> None:
    chain.a = tree().a  # in the place of what was there, without init_scope


def in_scope(name: str, value: Callable[[], Any]) -> Callable[[Any], None]:
    def change(chain: Any) -> None:
        with chain.init_scope():
            setattr(chain, name, value())

    return change


@pytest.mark.parametrize("kind", [chainer.Link, OwnWay])
@pytest.mark.parametrize(
    "change",
    [
        lambda chain: setattr(chain.a, "W", chainer.Parameter(np.ones(1, np.float32))),
        lambda chain: delattr(chain.a, "W"),
        lambda chain: delattr(chain, "a"),
        lambda chain: chain.rest.append(chain.a),
        lambda chain: chain.rest.pop(),
        lambda chain: chain.rest.insert(0, tree().a),
        lambda chain: setattr(chain.rest[0], "W", chain.scale),
        lambda chain: chain.rest[0].add_param("b", (1,)),
        lambda chain: chain.add_link("b", tree()),
        lambda chain: setattr(chain.a, "W", chain.scale),
        replace_child,
        in_scope("scale", lambda: chainer.Parameter(np.ones(1, np.float32))),
        in_scope("more", tree),
    ],
)
def test_it_is_noticed_when_a_link_gives_other_parameters(
    kind: type[chainer.Link], change: Callable[[Any], None]
) -> None:
    chain = tree(kind)
    known = NamedParameters(chain)
    before = [(path, id(param)) for path, param in known.named]
    assert before == [(path, id(param)) for path, param in chain.namedparams()]
    chain.a.W.array = np.zeros(1, np.float32)
    assert known.are_current()
    assert pickle.loads(pickle.dumps((chain, known)))[1].are_current()
    change(chain)
    assert before != [(path, id(param)) for path, param in chain.namedparams()]
    assert not known.are_current()


def test_gradients_are_those_that_the_properties_give() -> None:
    params = [chainer.Parameter(np.ones(2, np.float32)) for _ in range(3)]
    params[0].grad = np.full(2, 3, np.float32)
    params[1].grad_var = chainer.Variable(np.full(2, 4, np.float32))
    params[2].cleargrad()
    assert all(ours is param.grad for ours, param in zip(gradients_of(params), params, strict=True))
    clear_gradients_of(params)
    assert [param.grad for param in params] == [param.grad_var for param in params] == [None] * 3
    with pytest.raises(RuntimeError, match="cleargrad"):
        gradients_of([chainer.Parameter()])


def test_links_are_serialized_without_parameters_for_a_while() -> None:
    chain = tree()
    chain.rest[0].add_persistent("mean", np.full(2, 7.0))
    serializer = chainer.serializers.DictionarySerializer()
    with without_parameters([(chain, True), (chain, True)]):
        chain.serialize(serializer)
        # Who walks the model himself finds them.
        assert len(list(chain.params())) == 4
    assert list(serializer.target) == ["rest/0/mean"]
    assert "serialize" not in vars(chain)
    assert [path for path, _ in chain.namedparams()] == ["/scale", "/a/W", "/a/b", "/rest/0/W"]
