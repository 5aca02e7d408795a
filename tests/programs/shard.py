"""Takes over ChainerMN's optimizer at different moments of a training, on MPI ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import smorms3_dist

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from chainer import optimizer_hooks as hooks
from mpirun import in_worlds

UPDATES = 12
MIDDLE = 5


class Net(chainer.Chain):
    """Layers of odd sizes, created lazily, and a parameter of one element."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        weights = chainer.initializers.LeCunNormal(dtype=dtype)
        with chainer.using_config("dtype", np.dtype(dtype)), self.init_scope():
            self.l1 = L.Linear(None, 47, initialW=weights)
            self.l2 = L.Linear(None, 5, initialW=weights)
            self.scale = chainer.Parameter(np.ones(1, dtype))

    def __call__(self, x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        h = F.tanh(self.l1(x)) * F.broadcast_to(self.scale, (x.shape[0], 47))
        return F.softmax_cross_entropy(self.l2(h), y)


def users_hook(optimizer: Any) -> None:
    """Looks at whole gradients, and changes them."""
    for param in optimizer.target.params():
        param.grad *= 1 + 0.5 ** int(np.argmax(param.grad))


def leave_as_it_is(optimizer: Any) -> None:
    pass


def with_masters(optimizer: Any) -> None:
    optimizer.use_fp32_update()
    optimizer.set_loss_scale(128.0)


def with_hooks(optimizer: Any) -> None:
    optimizer.add_hook(hooks.WeightDecay(0.01))
    optimizer.add_hook(hooks.GradientClipping(0.5))
    optimizer.target.l1.W.update_rule.add_hook(hooks.GradientHardClipping(-0.01, 0.01))
    optimizer.target.l2.W.update_rule.hyperparam.lr = 0.05
    optimizer.eps = 1e-12


def with_a_users_hook(optimizer: Any) -> None:
    optimizer.add_hook(users_hook)


class Case(NamedTuple):
    make: Callable[[], chainer.GradientMethod]
    configure: Callable[[Any], None] = leave_as_it_is
    dtype: str = "float32"
    mode: str = "sharded"


SMORMS3 = functools.partial(chainer.optimizers.SMORMS3, lr=0.01)
CASES = {
    "SMORMS3": Case(SMORMS3),
    "Adam": Case(chainer.optimizers.Adam),
    "float16 with masters": Case(SMORMS3, with_masters, "float16"),
    "hooks": Case(SMORMS3, with_hooks),
    "a user's hook": Case(SMORMS3, with_a_users_hook, mode="replicated"),
}
MOMENTS = {"before setup": -1, "after setup": 0, "after the broadcast": 1, "in the middle": MIDDLE}


def train(
    comm: Any, case: Case, moment: int | None, gradients: str = "auto"
) -> tuple[Any, dict[str, Any]]:
    """Trains by ChainerMN's optimizer, sharded before the given update, or never."""
    np.random.seed(comm.rank)
    optimizer = chainermn.create_multi_node_optimizer(case.make(), comm)
    kept = {}
    if moment == -1:
        optimizer = smorms3_dist.shard(optimizer, gradients=gradients)
    model = Net(case.dtype)
    optimizer.setup(model)
    case.configure(optimizer)
    rng = np.random.RandomState(100 + comm.rank)
    for step in range(UPDATES):
        if step == moment:
            before, names = settings(optimizer), hook_names(optimizer)
            states = {name: p.update_rule.state for name, p in model.namedparams()}
            old, optimizer = optimizer, smorms3_dist.shard(optimizer, gradients=gradients)
            kept = {
                "settings": settings(optimizer) == before,
                "hooks": hook_names(optimizer) == names,
                # They move at the first update.
                "states": all(
                    p.update_rule.state is states[name] for name, p in model.namedparams()
                ),
                "optimizer": optimizer.actual_optimizer is old.actual_optimizer,
                "communicator": optimizer.communicator is comm,
            }
        x = rng.standard_normal((6, 9)).astype(case.dtype)
        y = rng.randint(0, 5, 6).astype("i")
        optimizer.update(model, x, y)
        if step % 4 == 3:
            optimizer.new_epoch()
        if step == moment and step > 0:
            kept["a step each update"] = optimizer.t == step
    return optimizer, kept


def settings(optimizer: Any) -> list[Any]:
    rules = [param.update_rule for _, param in sorted(optimizer.target.namedparams())]
    return [
        (optimizer.t, optimizer.epoch, optimizer.hyperparam.get_dict(), optimizer._loss_scale),
        [(rule.t, rule.hyperparam.get_dict(), rule._use_fp32_update) for rule in rules],
    ]


def hook_names(optimizer: Any) -> list[list[str]]:
    owners = [optimizer, *(param.update_rule for param in optimizer.target.params())]
    return [list(owner._hookable._pre_update_hooks) for owner in owners]


def flattened(model: chainer.Link) -> np.ndarray:
    return np.concatenate([param.array.reshape(-1) for _, param in sorted(model.namedparams())])


def same_states(optimizer: Any, model: chainer.Link) -> bool:
    """Whether this rank's shard of states is its part of ChainerMN's states, bit for bit."""
    expected = dict(model.namedparams())
    for update in optimizer.sharded_model.sharded_groups:
        for segment in update.shard.segments:
            rule = expected[segment.slot.name].update_rule
            whole = dict(rule.state)
            if rule._fp32_param is not None:
                whole["fp32_param"] = rule._fp32_param.array
            assert whole.keys() == update.states.keys()
            for name, shard in update.states.items():
                mine = shard[segment.start_s : segment.stop_s]
                if mine.tobytes() != np.ravel(whole[name])[segment.range_p].tobytes():
                    return False
    return True


def compare(comm: Any, case: Case, moment: int, gradients: str, reference: Any) -> dict[str, Any]:
    optimizer, kept = train(comm, case, moment, gradients)
    assert {param.dtype.name for param in optimizer.target.params()} == {case.dtype}
    assert isinstance(optimizer, smorms3_dist.ShardedOptimizer)
    expected = flattened(reference.target)
    mine = flattened(optimizer.target)
    wide, wide_expected = mine.astype("d"), expected.astype("d")
    rules = [param.update_rule for param in optimizer.target.params()]
    return {
        "same_bits": mine.tobytes() == expected.tobytes(),
        "same_states": same_states(optimizer, reference.target),
        "relative": np.linalg.norm(wide - wide_expected) / np.linalg.norm(wide_expected),
        "same_settings": settings(optimizer) == settings(reference),
        "t": optimizer.t,
        "mode": optimizer.gradient_mode,
        "freed": all(rule.state is None and rule._fp32_param is None for rule in rules),
        "state_bytes": optimizer.state_bytes(),
        "parameters": int(mine.size),
        "kept": kept,
    }


def all_cases(comm: Any) -> dict[str, Any]:
    results: dict[str, Any] = {}
    trained: list[bytes] = []
    for name, case in CASES.items():
        reference, _ = train(comm, case, None)
        trained.append(flattened(reference.target).tobytes())
        assert trained.count(trained[-1]) == 1, f"{name} changes nothing"
        results[name] = {
            label: compare(comm, case, moment, "auto", reference)
            for label, moment in MOMENTS.items()
        }
        results[name]["in the middle, replicated"] = compare(
            comm, case, MIDDLE, "replicated", reference
        )
    return results


in_worlds([1, 2, 3], all_cases)
