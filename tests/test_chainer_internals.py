"""What the package believes of Chainer's private attributes, seen on Chainer's own classes."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smorms3_dist  # noqa: F401  (patches Chainer)
from smorms3_dist import chainer_internals
from smorms3_dist.chainer_internals import LossScaling

import chainer
import chainermn
import models
import numpy as np
import pytest
from chainer.optimizers import SMORMS3
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater


def set_up(configure: Callable[[Any], None] = lambda optimizer: None) -> Any:
    optimizer = SMORMS3().setup(models.Model({"a": (3,)}, {"a": "float16"}))
    configure(optimizer)
    return optimizer


def dynamic(interval: int, scale: float) -> Callable[[Any], None]:
    def configure(optimizer: Any) -> None:
        optimizer.loss_scaling(interval=interval)
        optimizer._loss_scale = scale

    return configure


def backward(optimizer: Any, factor: float = 1) -> None:
    """An update by a real backward pass, of which the gradient overflows if the factor is large."""
    a = optimizer.target.a
    with np.errstate(all="ignore"):
        optimizer.update(lambda: chainer.functions.sum(a * np.full(3, factor, "float16")))


@pytest.mark.filterwarnings("ignore:Non finite number found in param.grad")
def test_a_scale_is_read_at_every_moment_and_noted_in_the_parameters_that_were_used() -> None:
    optimizer = set_up()
    assert LossScaling.of(optimizer) is None
    optimizer.set_loss_scale(8)
    assert LossScaling.of(optimizer) == LossScaling(8.0, False, False)
    assert not chainer_internals.is_loss_scale_dynamic(optimizer)
    a = optimizer.target.a
    assert chainer_internals.loss_scale_of(a) is None
    chainer.functions.sum(a).backward(loss_scale=8)
    assert chainer_internals.loss_scale_of(a) == 8
    assert a.grad.tolist() == [8, 8, 8]
    optimizer = set_up(dynamic(1, 4.0))
    assert LossScaling.of(optimizer) == LossScaling(4.0, True, False)
    backward(optimizer)
    assert LossScaling.of(optimizer) == LossScaling(8.0, True, False)
    backward(optimizer, factor=60000)
    assert LossScaling.of(optimizer) == LossScaling(4.0, True, True)


@pytest.mark.filterwarnings("ignore:Non finite number found in param.grad")
def test_what_is_restored_goes_on_as_what_was_saved() -> None:
    def train(optimizer: Any, factors: list[float]) -> list[float]:
        scales = []
        for factor in factors:
            backward(optimizer, factor)
            scales.append(optimizer._loss_scale)
        return scales

    first = set_up(dynamic(4, 1000.0))
    train(first, [1, 60000, 1])
    saved = LossScaling.of(first)
    assert saved is not None and saved.was_too_large
    second = set_up(dynamic(4, 1000.0))
    saved.restore(second)
    assert LossScaling.of(second) == saved
    assert train(second, [1, 1, 60000, 1]) == train(first, [1, 1, 60000, 1])


@pytest.mark.parametrize(
    ("saved", "configure", "expected"),
    [
        # A scale in the script counts more than one that was saved.
        (LossScaling(8.0, False, False), lambda o: None, 8.0),
        (LossScaling(8.0, False, False), lambda o: o.set_loss_scale(2.0), 2.0),
        (LossScaling(8.0, False, False), dynamic(1, 2.0), 2.0),
        (LossScaling(8.0, True, True), dynamic(1, 2.0), 8.0),
        (LossScaling(8.0, True, True), lambda o: o.set_loss_scale(2.0), 2.0),
        (LossScaling(8.0, True, True), lambda o: None, None),
    ],
)
def test_what_is_restored_under_which_settings(
    saved: LossScaling, configure: Callable[[Any], None], expected: float | None
) -> None:
    optimizer = set_up(configure)
    dynamic = chainer_internals.is_loss_scale_dynamic(optimizer)
    saved.restore(optimizer)
    assert optimizer._loss_scale == expected
    assert chainer_internals.is_loss_scale_dynamic(optimizer) == dynamic


@pytest.mark.parametrize("finite", [True, False])
def test_whether_gradients_are_finite_decides_as_chainers_own_check(finite: bool) -> None:
    ours, theirs = (set_up(dynamic(1, 4.0)) for _ in range(2))
    theirs.target.a.grad = np.array([1, 2, 3 if finite else np.inf], "float16")
    if finite:
        theirs.check_nan_in_grads()
    else:
        with pytest.warns(UserWarning, match="Non finite number"):
            theirs.check_nan_in_grads()
    chainer_internals.note_finite(ours, finite)
    for optimizer in (ours, theirs):
        assert optimizer.is_safe_to_update() is finite
        optimizer.update_loss_scale()
    assert ours._loss_scale == theirs._loss_scale == (8.0 if finite else 2.0)


def test_the_snapshot_in_one_of_replica_sets_is_known() -> None:
    comm = types.SimpleNamespace(rank=0, size=1)
    inner = extensions.snapshot()
    outer = chainermn.extensions.multi_node_snapshot(comm, inner, [])
    assert chainer_internals.snapshot_of_replica_sets(outer) is inner
    assert chainer_internals.snapshot_of_replica_sets(inner) is None


def test_whoever_is_in_a_snapshot_knows_it(tmp_path: Path) -> None:
    seen = []

    class Asks(chainer.Link):
        def serialize(self, serializer: Any) -> None:
            seen.append(chainer_internals.is_in_snapshot_extension())
            seen.append(chainer_internals.is_in_multi_node_checkpointer())

    trainer = Trainer(
        StandardUpdater(chainer.iterators.SerialIterator([1], 1), set_up()), out=str(tmp_path)
    )
    extensions.snapshot_object(Asks(), "asks")(trainer)
    chainer.serializers.save_npz(str(tmp_path / "by hand"), Asks())
    assert seen == [True, False, False, False]


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
    known = chainer_internals.NamedParameters(chain)
    before = [(path, id(param)) for path, param in known.named]
    assert before == [(path, id(param)) for path, param in chain.namedparams()]
    chain.a.W.array = np.zeros(1, np.float32)
    assert known.are_current()
    assert pickle.loads(pickle.dumps((chain, known)))[1].are_current()
    change(chain)
    assert before != [(path, id(param)) for path, param in chain.namedparams()]
    assert not known.are_current()


@pytest.mark.parametrize(
    "change",
    [
        lambda rule: setattr(rule, "enabled", False),
        lambda rule: setattr(rule.hyperparam, "lr", 0.5),
        lambda rule: rule.add_hook(chainer.optimizer_hooks.WeightDecay(0.1)),
        lambda rule: rule.add_hook(chainer.optimizer_hooks.GradientNoise(0.1), timing="post"),
    ],
)
def test_it_is_noticed_when_a_rule_gets_something_of_its_own(
    change: Callable[[Any], None],
) -> None:
    optimizer = SMORMS3().setup(models.Model({"a": (3,), "b": (2,), "c": (1,)}))
    rules = [param.update_rule for param in optimizer.target.params()]
    watch = chainer_internals.RuleWatch(rules)
    for _ in range(2):
        assert watch.are_plain() and watch.are_alike()
    change(rules[1])
    for seen in (watch, chainer_internals.RuleWatch(rules), copy.deepcopy(watch)):
        for _ in range(2):
            assert not seen.are_plain() and not seen.are_alike()
    assert chainer_internals.RuleWatch(rules[::2]).are_plain()


def test_rules_with_states_or_of_two_optimizers_are_not_alike() -> None:
    first, second = (SMORMS3().setup(models.Model({"a": (3,), "b": (2,)})) for _ in range(2))
    rules: list[Any] = [param.update_rule for param in first.target.params()]
    others = [param.update_rule for param in second.target.params()]
    watch = chainer_internals.RuleWatch(rules)
    assert watch.are_alike()
    both = chainer_internals.RuleWatch([*rules, *others])
    assert both.are_plain() and not both.are_alike()
    assert not chainer_internals.RuleWatch().are_alike()
    for states in (np.ones(3), np.ones(3)):
        # The same values in another array are no question of equality.
        rules[0]._state = {"mem": states}
        assert watch.are_plain() and not watch.are_alike()
    rules[0]._state = None
    assert watch.are_alike()


def test_counts_of_rules_go_on_together_until_one_is_set_apart() -> None:
    optimizer = SMORMS3().setup(models.Model({"a": (3,), "b": (2,), "c": (1,)}))
    rules = [param.update_rule for param in optimizer.target.params()]
    watch = chainer_internals.RuleWatch(rules)
    assert watch.add_to_counts(2) and [rule.t for rule in rules] == [2, 2, 2]
    rules[1].t = 7
    assert not watch.add_to_counts(1) and [rule.t for rule in rules] == [3, 8, 3]


class CountedByItself(chainer.UpdateRule):
    """A rule that keeps what is asked for elsewhere than other rules."""

    t = property(lambda self: self.steps, lambda self, value: setattr(self, "steps", value))
    enabled = property(lambda self: self.steps < 5, lambda self, value: None)


def test_rules_that_keep_their_attributes_elsewhere_are_looked_at_as_well() -> None:
    settings = chainer.optimizers.SGD().hyperparam
    rules = [CountedByItself(settings) for _ in range(2)]
    watch = chainer_internals.RuleWatch(rules)
    assert watch.are_alike()
    watch.add_to_counts(3)
    watch.add_to_counts(3)
    assert [rule.t for rule in rules] == [6, 6]
    assert not watch.are_plain()


def test_gradients_are_those_that_the_properties_give() -> None:
    params = [chainer.Parameter(np.ones(2, np.float32)) for _ in range(3)]
    params[0].grad = np.full(2, 3, np.float32)
    params[1].grad_var = chainer.Variable(np.full(2, 4, np.float32))
    params[2].cleargrad()
    assert all(
        ours is param.grad
        for ours, param in zip(chainer_internals.gradients_of(params), params, strict=True)
    )
    chainer_internals.clear_gradients_of(params)
    assert [param.grad for param in params] == [param.grad_var for param in params] == [None] * 3
    with pytest.raises(RuntimeError, match="cleargrad"):
        chainer_internals.gradients_of([chainer.Parameter()])


def test_links_are_serialized_without_parameters_for_a_while() -> None:
    chain = tree()
    chain.rest[0].add_persistent("mean", np.full(2, 7.0))
    serializer = chainer.serializers.DictionarySerializer()
    with chainer_internals.without_parameters([chain, chain]):
        chain.serialize(serializer)
        # Who walks the model himself finds them.
        assert len(list(chain.params())) == 4
    assert list(serializer.target) == ["rest/0/mean"]
    assert "serialize" not in vars(chain)
    assert [path for path, _ in chain.namedparams()] == ["/scale", "/a/W", "/a/b", "/rest/0/W"]
