"""Reduction during the backward pass: the same bits as after it, whatever happens."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

from smorms3_dist import NoMoreBatches, create_multi_node_optimizer
from smorms3_dist.collectives.base import AbandonedError
from smorms3_dist.optimizer import overlap
from smorms3_dist.step.agreement import NO_FLAGS, Flag

import chainer
import chainer.functions as F
import chainer.links as L
import mpirun
import numpy as np
import pytest
from chainer import optimizer_hooks
from models import arrays, assert_alike, assert_same_bits, on_ranks
from rank_threads import ThreadCollectives, ThreadSideChannel, run_ranks

STEPS = 6

Body = Callable[[Any, int], Any]


def batch(rank: int, step: int, *shape: int) -> np.ndarray:
    return np.random.RandomState([rank, step]).standard_normal(shape).astype(np.float32)


class Net(chainer.Chain):
    """A model with initial values that depend on its parameters' names and shapes alone."""

    def __init__(self, **links: chainer.Link) -> None:
        super().__init__()
        with self.init_scope():
            for name, link in links.items():
                setattr(self, name, link)

    def fill(self) -> Net:
        rng = np.random.RandomState(1)
        for _, param in sorted(self.namedparams(include_uninit=False)):
            param.array[...] = rng.standard_normal(param.shape) * 0.3
        return self

    def loss(self, rank: int, step: int) -> Any:
        raise NotImplementedError


class Mlp(Net):
    def __init__(self) -> None:
        super().__init__(a=L.Linear(13, 37), b=L.Linear(37, 29), c=L.Linear(29, 3))
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        h = F.tanh(self.b(F.tanh(self.a(batch(rank, step, 7, 13)))))
        return F.sum(F.square(self.c(h)))


class ConvNet(Net):
    def __init__(self) -> None:
        super().__init__(a=L.Convolution2D(1, 4, 3), b=L.BatchNormalization(4), c=L.Linear(None, 3))

    def loss(self, rank: int, step: int) -> Any:
        h = F.relu(self.b(self.a(batch(rank, step, 5, 1, 6, 6))))
        fresh = self.c.W.array is None
        y = self.c(F.max_pooling_2d(h, 2))
        if fresh:
            self.fill()
        return F.sum(F.square(y))


class Rnn(Net):
    """Weights that are used at each step; their number differs by rank."""

    def __init__(self) -> None:
        super().__init__(lstm=L.StatelessLSTM(5, 6), out=L.Linear(6, 2), unused=L.Linear(3, 3))
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        c = h = None
        for turn in range(2 + (rank + step) % 3):
            c, h = self.lstm(c, h, batch(rank, step * 10 + turn, 4, 5))
        return F.sum(F.square(self.out(h)))


class Dynamic(Net):
    """Layers in an order that differs by rank and step; some are left out."""

    def __init__(self) -> None:
        super().__init__(**{name: L.Linear(9, 9) for name in "abcde"})
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        order = np.random.RandomState([rank, step, 7]).permutation(list("abcde"))
        h = batch(rank, step, 4, 9)
        for name in order[: 1 + (rank + 2 * step) % 5]:
            h = F.tanh(self[name](h))
        return F.sum(F.square(h)) + F.sum(self.a.W * self.a.W)


class Mixed(Net):
    """float16 with masters in float32, beside parameters of float32."""

    def __init__(self) -> None:
        with chainer.using_config("dtype", np.float16):
            super().__init__(a=L.Linear(13, 17), b=L.Linear(17, 5))
        with self.init_scope():
            self.scale = L.Scale(1, (5,))
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        h = F.tanh(self.a(batch(rank, step, 7, 13).astype(np.float16)))
        return F.sum(F.square(self.scale(F.cast(self.b(h), np.float32))))


class Penalized(Net):
    """A loss with a gradient in it."""

    def __init__(self) -> None:
        super().__init__(a=L.Linear(4, 5), b=L.Linear(5, 1))
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        x = chainer.Variable(batch(rank, step, 6, 4))
        y = self.b(F.tanh(self.a(x)))
        (slope,) = chainer.grad([y], [x], enable_double_backprop=True)
        return F.sum(F.square(slope)) + F.sum(y)


MODELS = [Mlp, ConvNet, Rnn, Dynamic, Mixed, Penalized]


def train(optimizer: Any, rank: int, steps: int = STEPS) -> None:
    for step in range(steps):
        optimizer.update(optimizer.target.loss, rank, step)


def orders_of(optimizer: Any) -> list[Any]:
    """The orders of the reductions that have begun during a backward pass."""
    channel = optimizer._overlap._channel
    return channel.orders if isinstance(channel, ThreadSideChannel) else []


def reductions(optimizer: Any) -> int:
    """How many these are."""
    return len(orders_of(optimizer))


def same_bits(
    world: int, body: Body, make_model: Callable[[], chainer.Link] = Mlp, **options: Any
) -> tuple[list[Any], list[Any]]:
    """Runs a body with overlap and without; fails unless models are the same bit for bit.

    Returns what the bodies returned with overlap, by rank, and the optimizers.
    """

    def run(optimizer: Any, rank: int) -> tuple[Any, Any]:
        return body(optimizer, rank), optimizer

    late = on_ranks(world, run, make_model=make_model, overlap=False, **options)
    early = on_ranks(world, run, make_model=make_model, overlap=True, **options)
    for (_, with_overlap), (_, without) in zip(early, late, strict=True):
        assert_same_bits(with_overlap.target, without.target)
    assert_alike([optimizer.target for _, optimizer in early])
    assert optimizer_has_moved(early[0][1], make_model)
    return [result for result, _ in early], [optimizer for _, optimizer in early]


def optimizer_has_moved(optimizer: Any, make_model: Callable[[], chainer.Link]) -> bool:
    before = arrays(make_model())
    return any(np.any(array != before.get(n, 0)) for n, array in arrays(optimizer.target).items())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_models_of_all_kinds_come_out_the_same(model: type[Net], world: int) -> None:
    def body(optimizer: Any, rank: int) -> None:
        if model is Mixed:
            optimizer.use_fp32_update()
        train(optimizer, rank)

    _, optimizers = same_bits(world, body, model)
    # The first update learns the order; each later one reduces both dtypes.
    each = 2 if model is Mixed else 1
    assert [reductions(o) for o in optimizers] == [each * (STEPS - 1)] * world


@pytest.mark.parametrize(
    "hooks",
    [
        [optimizer_hooks.WeightDecay(0.1)],
        [optimizer_hooks.WeightDecay(0.1), optimizer_hooks.GradientClipping(0.01)],
        [optimizer_hooks.Lasso(0.1), optimizer_hooks.GradientHardClipping(-0.1, 0.1)],
        [optimizer_hooks.GradientLARS()],
    ],
    ids=lambda hooks: ",".join(type(hook).__name__ for hook in hooks),
)
def test_hooks_see_what_they_see_without(hooks: list[Any]) -> None:
    def body(optimizer: Any, rank: int) -> None:
        for hook in hooks:
            optimizer.add_hook(hook)
        train(optimizer, rank)

    _, optimizers = same_bits(2, body)
    assert reductions(optimizers[0]) == STEPS - 1


@pytest.mark.filterwarnings("ignore:the mean gradient of")
def test_loss_scales_and_gradients_that_are_kept() -> None:
    def body(optimizer: Any, rank: int) -> list[bytes]:
        optimizer.loss_scaling(interval=2, scale=2.0**110)
        optimizer.keep_gradients = True
        train(optimizer, rank, 1)
        optimizer.set_loss_scale(2.0**140)
        grads = []
        for step in range(1, STEPS):
            with np.errstate(all="ignore"):
                optimizer.update(optimizer.target.loss, rank, step)
            optimizer.gather_gradients()
            grads.append(optimizer.target.b.W.grad.tobytes())
        return [*grads, repr(optimizer._loss_scale).encode()]

    def run(wanted: bool) -> list[Any]:
        return on_ranks(2, body, make_model=Mlp, overlap=wanted)

    early, late = run(True), run(False)
    assert early == late
    assert early[0] == early[1]


def test_batches_of_two_optimizers_go_through_each_others_models() -> None:
    """A generator and its critic."""

    def run(wanted: bool) -> list[Any]:
        def body(optimizer: Any, rank: int) -> Any:
            generator = optimizer.target
            critic = Net(a=L.Linear(3, 11), b=L.Linear(11, 1)).fill()
            other = create_multi_node_optimizer(
                chainer.optimizers.SMORMS3(), optimizer.collectives, overlap=wanted
            ).setup(critic)

            def score(x: Any) -> Any:
                return critic.b(F.tanh(critic.a(x)))

            def fake(step: int) -> Any:
                h = F.tanh(generator.a(batch(rank, step, 7, 13)))
                return generator.c(F.tanh(generator.b(h)))

            for step in range(STEPS):
                other.update(lambda s=step: F.sum(score(fake(s)) - score(batch(rank, s, 7, 3))))
                optimizer.update(lambda s=step: -F.sum(score(fake(s))))
            if wanted:
                assert reductions(optimizer) == reductions(other) == STEPS - 1
            return generator, critic

        return on_ranks(2, body, make_model=Mlp, overlap=wanted)

    for early, late in zip(run(True), run(False), strict=True):
        for one, other in zip(early, late, strict=True):
            assert_same_bits(one, other)


def test_the_order_is_that_of_the_first_backward_pass_and_fixed() -> None:
    def body(optimizer: Any, rank: int) -> Any:
        train(optimizer, rank)
        return [
            [[[s.slot.name for s in piece.segments] for piece in of_rank] for of_rank in order]
            for order in orders_of(optimizer)
        ]

    orders, _ = same_bits(3, body, Dynamic)
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == STEPS - 1
    assert all(order == orders[0][0] for order in orders[0])

    class Long(Mlp):
        """Layers that are larger than a piece."""

        def __init__(self) -> None:
            Net.__init__(self, a=L.Linear(13, 700), b=L.Linear(700, 900), c=L.Linear(900, 3))
            self.fill()

    orders, _ = same_bits(2, body, Long)
    for of_rank in orders[0][0]:
        large = [names[0] for names in of_rank if len(names) == 1]
        assert large == sorted(large, reverse=True)


class Held(Mlp):
    """Its first layer's backward pass waits until something has come from the other rank."""

    optimizer: Any = None

    def loss(self, rank: int, step: int) -> Any:
        early = self.optimizer._overlap

        class Waiting(chainer.FunctionNode):
            def forward(self, inputs: Any) -> Any:
                return (inputs[0].copy(),)

            def backward(self, indexes: Any, grads: Any) -> Any:
                if early._begun is not None:
                    (part,) = early._begun._parts
                    with part._changed:
                        assert part._changed.wait_for(lambda: part.arrived > 0, 60)
                return grads

        (h,) = Waiting().apply((self.a(batch(rank, step, 7, 13)),))
        return F.sum(F.square(self.c(F.tanh(self.b(F.tanh(h))))))


def test_the_last_layers_arrive_while_the_first_ones_backward_pass_is_still_to_come() -> None:
    class Long(Held):
        def __init__(self) -> None:
            Net.__init__(self, a=L.Linear(13, 1500), b=L.Linear(1500, 800), c=L.Linear(800, 3))
            self.fill()

    def body(optimizer: Any, rank: int) -> None:
        optimizer.target.optimizer = optimizer
        train(optimizer, rank, 3)

    _, optimizers = same_bits(2, body, Long)
    assert reductions(optimizers[0]) == 2


def test_the_update_waits_for_what_has_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str | None] = []
    inner = ThreadSideChannel.reduce_in_order

    def late(self: ThreadSideChannel, *args: Any) -> None:
        # Only once the rank has nothing else to do.
        assert self.hurried.wait(60)
        waits.append(self._host.wait.at)
        inner(self, *args)

    monkeypatch.setattr(ThreadSideChannel, "reduce_in_order", late)
    same_bits(2, train)
    assert len(waits) == 2 * (STEPS - 1)


# What is handed over, and not used


def manual(optimizer: Any, rank: int, step: int) -> None:
    """A step of a loop that computes gradients itself, and changes them."""
    model = optimizer.target
    loss = model.loss(rank, step)
    model.cleargrads()
    loss.backward()
    model.b.W.grad *= 0.5
    model.a.b.grad = None
    optimizer.update()


def test_gradients_of_the_users_own_are_reduced_as_the_user_leaves_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def body(optimizer: Any, rank: int) -> None:
        for step in range(STEPS):
            manual(optimizer, rank, step)

    with caplog.at_level(logging.INFO):
        _, optimizers = same_bits(2, body)
    assert reductions(optimizers[0]) == 0
    (told,) = (r for r in caplog.records if "(overlap)" in r.getMessage())
    assert told.levelno == logging.WARNING
    assert "update(lossfun, ...) has not computed them" in told.getMessage()


@pytest.mark.parametrize("which", ["all", "one"])
def test_such_steps_may_alternate_with_others(which: str) -> None:
    def body(optimizer: Any, rank: int) -> None:
        for step in range(3 * STEPS):
            if step % 4 == 3 and (which == "all" or rank == 1):
                manual(optimizer, rank, step)
            else:
                optimizer.update(optimizer.target.loss, rank, step)

    same_bits(2, body)


def test_micro_batches_are_added_up_first() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 4)
        with optimizer.accumulate():
            train(optimizer, rank, 2)
        train(optimizer, rank, 3)

    _, optimizers = same_bits(2, body)
    assert reductions(optimizers[0]) == 3 + 3


@pytest.mark.parametrize("model", [Dynamic, Mixed])
def test_the_last_micro_batch_hands_over_the_means_of_all(model: type[Net]) -> None:
    def body(optimizer: Any, rank: int) -> None:
        # float16 is added up in float32; parameters that only some micro-batches use.
        train(optimizer, rank, 9)

    _, optimizers = same_bits(2, body, model, accumulate=3)
    assert reductions(optimizers[0]) == 2 * (2 if model is Mixed else 1)


@pytest.mark.parametrize("sent", ["bfloat16", "float16"])
def test_gradients_and_parameters_in_a_narrow_dtype(sent: str) -> None:
    options = {"communication_dtype": sent, "gather_dtype": sent}
    _, optimizers = same_bits(3, train, **options)
    assert reductions(optimizers[0]) == STEPS - 1
    wide = same_bits(3, train)[1][0]
    assert optimizers[0].collectives.bytes_sent["reduce_scatter"] == (
        wide.collectives.bytes_sent["reduce_scatter"] / 2
    )


def test_rules_on_whole_arrays_and_parameters_without_an_update() -> None:
    class Whole(chainer.optimizers.sgd.SGDRule):
        is_elementwise = False

        def update_core_cpu(self, param: Any) -> None:
            param.array -= self.hyperparam.lr * np.sign(param.grad) * np.abs(param.grad).max()

    def body(optimizer: Any, rank: int) -> None:
        optimizer.target.a.W.update_rule = Whole(lr=0.01)
        optimizer.target.c.disable_update()
        train(optimizer, rank)

    _, optimizers = same_bits(2, body)
    assert reductions(optimizers[0]) == STEPS - 1


def test_a_reduction_that_fails_is_told_with_the_rank_and_the_cause() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 2)
        if rank == 1:
            optimizer._overlap._channel.fault = OSError("a cable is broken")
        cause = ("BrokenBarrierError", "OSError: a cable is broken")[rank]
        with pytest.raises(RuntimeError, match=rf"rank {rank}: the reduction.*{cause}"):
            train(optimizer, rank, 1)

    on_ranks(2, body, make_model=Mlp, overlap=True)


def test_with_double_buffering_it_is_refused() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        on_ranks(2, train, make_model=Mlp, overlap="auto", double_buffering=True)


def test_a_script_that_ends_does_not_wait_for_gradients_that_never_come() -> None:
    gave_up = threading.Event()

    def work(ranks: Any) -> None:
        assert ranks.hurried.wait(60)
        try:
            ranks.progress()
        except AbandonedError:
            gave_up.set()
            raise

    def run(collectives: Any) -> None:
        channel = collectives.open_early_channel()
        channel.start_early(work)
        # As at the end of Python.
        channel.end()
        assert not channel._thread.is_alive()

    run_ranks(1, run)
    assert gave_up.is_set()


class Failing(Mlp):
    """Its backward pass fails half-way, where it is told to."""

    fails = False

    def loss(self, rank: int, step: int) -> Any:
        model = self

        class Here(chainer.FunctionNode):
            def forward(self, inputs: Any) -> Any:
                return (inputs[0].copy(),)

            def backward(self, indexes: Any, grads: Any) -> Any:
                if model.fails:
                    raise FloatingPointError("half-way")
                return grads

        (h,) = Here().apply((self.a(batch(rank, step, 7, 13)),))
        return F.sum(F.square(self.c(F.tanh(self.b(F.tanh(h))))))


@pytest.mark.parametrize("again", ["the same batch", "another batch", "gradients of its own"])
def test_a_rank_may_catch_what_fails_in_its_backward_pass(again: str) -> None:
    def body(optimizer: Any, rank: int) -> None:
        for step in range(2 * STEPS):
            if rank == 1 and step in (3, 4, 8):
                optimizer.target.fails = True
                with pytest.raises(FloatingPointError):
                    optimizer.update(optimizer.target.loss, rank, step)
                optimizer.target.fails = False
                if again == "gradients of its own":
                    manual(optimizer, rank, step)
                    continue
            now = step + 100 * (again == "another batch" and rank == 1)
            optimizer.update(optimizer.target.loss, rank, now)

    _, optimizers = same_bits(2, body, Failing)
    assert reductions(optimizers[0]) > STEPS


def test_a_rank_may_catch_what_fails_between_its_backward_pass_and_the_agreement() -> None:
    class Once:
        fails = False

        def flags(self) -> Flag:
            if self.fails:
                self.fails = False
                raise OSError("once")
            return NO_FLAGS

        def proceed(self, flags: Flag) -> None:
            """Nothing goes on."""

    def body(optimizer: Any, rank: int) -> None:
        work = Once()
        optimizer.ask_before_each_step(work)
        for step in range(STEPS):
            if rank == 1 and step in (2, 3):
                work.fails = True
                with pytest.raises(OSError, match="once"):
                    optimizer.update(optimizer.target.loss, rank, step + 50)
                if step == 3:
                    # Without a backward pass.
                    for param in optimizer.target.params():
                        param.grad = np.full_like(param.array, 0.25)
                    optimizer.update()
                    continue
            optimizer.update(optimizer.target.loss, rank, step)

    same_bits(2, body)


class Forgetful(Mlp):
    """Within the pass there is another one, of which nobody knows before."""

    def loss(self, rank: int, step: int) -> Any:
        x = batch(rank, step, 7, 13)
        h = F.forget(lambda x: F.tanh(self.a(x)), chainer.Variable(x))
        return F.sum(F.square(self.c(F.tanh(self.b(h))))) + F.sum(self.a.W)


class Changing(Mlp):
    """A loss whose own backward pass halves a gradient at its end, in some steps of a rank."""

    def loss(self, rank: int, step: int) -> Any:
        loss = super().loss(rank, step)
        backward = loss.backward

        def halving(**kwds: Any) -> None:
            backward(**kwds)
            if rank == 1 and step % 3 == 2:
                self.b.W.grad = self.b.W.grad * 0.5

        loss.backward = halving
        return loss


@pytest.mark.parametrize("model", [Forgetful, Changing])
def test_gradients_that_change_within_the_pass_are_handed_over_again(model: type[Net]) -> None:
    same_bits(2, train, model)


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_model_or_its_hooks_may_change_between_steps(ranks: tuple[int, ...]) -> None:
    class Looking:
        """Needs whole gradients."""

        name = "Looking"
        timing = "pre"

        def __call__(self, optimizer: Any) -> None:
            assert all(p.grad is not None for p in optimizer.target.params())

    class Growing(Mlp):
        extra: Any = None

        def loss(self, rank: int, step: int) -> Any:
            loss = super().loss(rank, step)
            return loss if step < 4 else loss + F.sum(self.more.W * self.a.b)

    def body(optimizer: Any, rank: int) -> None:
        model = optimizer.target
        for step in range(2 * STEPS):
            if step == 4:
                with model.init_scope():
                    model.more = L.Linear(37, 1, initialW=np.ones((1, 37), np.float32))
            if step == 7 and rank in ranks:
                optimizer.add_hook(Looking())
            if step == 9 and rank in ranks:
                optimizer.remove_hook("Looking")
            optimizer.update(model.loss, rank, step)

    _, optimizers = same_bits(2, body, Growing)
    # 1 to 3; not in the step of the new parameter, nor in the next, which learns the order; in vain
    # with the hook, of which no other rank may know, and not in the next; learned again without it.
    assert reductions(optimizers[0]) == 3 + 1 + 1 + 2


def test_a_model_that_only_one_rank_replaces_arrays_of() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        if rank == 1:
            for param in optimizer.target.params():
                param.array = param.array.copy()
        train(optimizer, rank, 3)

    _, optimizers = same_bits(2, body)
    assert reductions(optimizers[0]) == 5


def test_gradients_that_are_not_finite_are_named_before_anything_is_updated() -> None:
    def body(optimizer: Any, rank: int) -> None:
        model = optimizer.target
        train(optimizer, rank, 3)
        before = {name: array.copy() for name, array in arrays(model).items()}
        with np.errstate(all="ignore"), pytest.raises(RuntimeError, match=r"/c/b.*rank 1"):
            optimizer.update(lambda: F.sum(model.c.b * np.float32([1, np.inf][rank])))
        assert all(np.array_equal(array, before[n]) for n, array in arrays(model).items())
        train(optimizer, rank, 3)

    same_bits(2, body, check_finite="error")


# What ranks must have alike, and how it ends


def test_ranks_must_be_told_alike() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank)

    def run(collectives: Any) -> None:
        actual = chainer.optimizers.SMORMS3()
        optimizer = create_multi_node_optimizer(
            actual, collectives, overlap=("auto", True)[collectives.rank]
        ).setup(Mlp())
        body(optimizer, collectives.rank)

    with pytest.raises(RuntimeError, match="overlap: auto on rank 0, True on rank 1"):
        run_ranks(2, run)
    told = r"rank 0 is in lay_out\(\) \(overlap=auto\), rank 1 is in lay_out\(\) \(overlap=True\)"
    with pytest.raises(RuntimeError, match=told):
        run_ranks(
            2,
            lambda c: (
                create_multi_node_optimizer(
                    chainer.optimizers.SMORMS3(), c, overlap=("auto", True)[c.rank]
                )
                .setup(Mlp())
                .lay_out()
            ),
        )


@pytest.mark.parametrize("both", [True, False])
def test_ranks_that_differ_in_a_fact_go_on_when_they_do_not_any_more(both: bool) -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        optimizer.lr *= 1 + rank
        with pytest.raises(RuntimeError, match="lr of the optimizer"):
            if both or rank:
                optimizer.update(optimizer.target.loss, rank, 0)
            else:
                optimizer.update()
        optimizer.lr /= 1 + rank
        train(optimizer, rank, 3)

    _, optimizers = same_bits(2, body)
    # Two, one in vain, and two after the order has been learned again.
    assert reductions(optimizers[0]) == 2 + 1 + 2


def test_ranks_of_which_one_gives_up_go_on_without_it() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        if rank == 1:
            optimizer._overlap = overlap.Overlap(True)
        with pytest.raises(RuntimeError, match=r"overlap of reduction and backward pass: in the"):
            train(optimizer, rank, 1)
        # Both are decided and have nothing then.
        optimizer._overlap = overlap.Overlap(False)
        optimizer._overlap.wanted = True
        train(optimizer, rank, 2)

    on_ranks(2, body, make_model=Mlp, overlap=True)


def test_training_ends_well_where_the_first_rank_has_no_more_batches() -> None:
    def body(optimizer: Any, rank: int) -> int:
        try:
            train(optimizer, rank, 3 + rank)
            optimizer.no_more_batches()
        except NoMoreBatches:
            assert rank == 1
        return int(optimizer.t)

    assert on_ranks(2, body, make_model=Mlp, overlap=True, uneven="stop") == [2, 2]


def test_copies_begin_afresh() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        shallow = copy.copy(optimizer)
        train(shallow, rank, 3)
        deep = copy.deepcopy(shallow)
        train(deep, rank, 3)
        assert threading.active_count() < 50
        optimizer.setup(deep.target)

    same_bits(2, body)


# Where it is done


@pytest.mark.parametrize(
    ("hosts", "cores", "expected"),
    [
        ("ab", [{0, 1}, {0, 1}], True),
        ("aa", [{0, 1, 2, 3}, {0, 1, 2, 3}], False),
        ("ab", [{0}, {0, 1}], False),
        ("aabb", [{0, 1}] * 4, False),
        ("aabb", [{0, 1, 2}] * 4, True),
    ],
)
def test_auto_wants_several_hosts_and_cores_to_spare(
    monkeypatch: pytest.MonkeyPatch, hosts: str, cores: list[set[int]], expected: bool
) -> None:
    here = threading.local()
    monkeypatch.setattr(overlap, "running_host", lambda: hosts[here.rank])
    monkeypatch.setattr(overlap, "_cores", lambda: frozenset(cores[here.rank]))

    def body(optimizer: Any, rank: int) -> str:
        here.rank = rank
        train(optimizer, rank, 3)
        return str(optimizer._overlap.state)

    states = on_ranks(len(hosts), body, make_model=Mlp, overlap="auto")
    assert {state != "none" for state in states} == {expected}


def test_without_threads_true_says_why_not_and_auto_is_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ThreadCollectives, "obstacle", "it has no threads")
    with caplog.at_level(logging.INFO):
        for wanted in (True, "auto"):
            on_ranks(2, lambda o, r: train(o, r, 2), make_model=Mlp, overlap=wanted)
    told = [r.getMessage() for r in caplog.records if "overlap" in r.getMessage()]
    assert told == [
        "gradients are reduced after the backward pass (overlap): on rank 0 it has no threads"
    ]


@pytest.mark.mpi
def test_ranks_of_mpi() -> None:
    for values in mpirun.run_worlds(2, "overlap.py")[2]:
        assert values["same_bits"]
        assert values["alike"]
        states = [state for state in values["states"] if state != "caught"]
        assert ("caught" in values["states"]) == (values["rank"] == 1)
        ordered, learning = "in the order", "in an order "
        # What a failed update has handed over makes the next one begin again.
        assert states[:8] == [ordered] * 4 + [learning] + [ordered] * 3
        assert states[8:] == ["refused", ordered, ordered]
        # That one was made twice, and the one of the update that was refused in vain.
        assert values["sent"] == 9 + 2
