"""Parameters gathered beside the next forward pass: nobody sees a value of before."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.optimizer import overlap
from smorms3_dist.step import parameters_in_flight
from smorms3_dist.step.agreement import NO_FLAGS, Flag

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from backward_models import MODELS, STEPS, Mixed, Mlp, Net, batch, train
from chainer import optimizer_hooks
from chainer.training import extensions
from models import NormalizedRule, OwnOptimizer, arrays, assert_alike, assert_same_bits, on_ranks
from rank_threads import ThreadCollectives, run_ranks

Seen = dict[str, Any]


class Small(Net):
    """One parameter is made of an array, which is its initializer then."""

    def __init__(self) -> None:
        super().__init__(a=L.Linear(5, 7), b=L.Linear(7, 3))
        with self.init_scope():
            self.a_scale = chainer.Parameter(np.ones(3, np.float32))
        self.fill()

    def forward(self, x: Any) -> Any:
        return self.b(F.tanh(self.a(x))) * F.broadcast_to(self.a_scale, (len(x), 3))

    def loss(self, rank: int, step: int) -> Any:
        return F.sum(F.square(self(batch(rank, step, 4, 5))))


def hold_back(optimizer: Any) -> None:
    """Lets the parameters of the next update come to this rank only when somebody waits."""
    channel = optimizer._overlap_gather._channel
    channel.before_bucket = lambda: _is_set(channel.hurried)


def _is_set(event: threading.Event) -> None:
    assert event.wait(60), "nobody waits"


@functools.cache
def expected() -> tuple[Seen, Seen]:
    """The parameters after two updates, and after three."""

    def body(optimizer: Any, rank: int) -> tuple[Seen, Seen]:
        train(optimizer, rank, 2)
        before = copy.deepcopy(arrays(optimizer.target))
        optimizer.update(optimizer.target.loss, rank, 2)
        return before, arrays(optimizer.target)

    return on_ranks(2, body, make_model=Small)[0]  # type: ignore[no-any-return]


def assert_equal(seen: Seen, values: Seen) -> None:
    assert seen.keys() <= values.keys() and seen
    for name, array in seen.items():
        np.testing.assert_array_equal(array, values[name], err_msg=name)


def while_under_way(
    use: Callable[[Any], Any],
    prepare: Callable[[Any], Any] = lambda model: None,
    everywhere: bool = False,
    waits_within_update: bool = False,
) -> list[Any]:
    """Calls ``use(optimizer)`` on rank 1 while its parameters are held back; gives the answers.

    What rank 0 owns is nearly everything: nothing is right there by itself.

    ``prepare(model)`` is called before the update, and its answer kept.
    """
    before, _ = expected()

    def body(optimizer: Any, rank: int) -> Any:
        train(optimizer, rank, 2)
        kept = prepare(optimizer.target)
        if rank == 1:
            hold_back(optimizer)
        optimizer.kept = kept
        optimizer.update(optimizer.target.loss, rank, 2)
        if rank == 0 and not everywhere:
            return None
        if rank == 1 and not waits_within_update:
            # What has been there before lies there still.
            (group,) = optimizer.sharded_model.groups
            slots = group.layout.slots
            flat = group.buffers.flat_in_flight
            for slot in slots:
                there = flat[slot.start_f : slot.stop_f]
                assert slot.name == "/b/b" or np.any(there == before[slot.name].ravel())
            assert optimizer.sharded_model.in_flight is not None
        answer = use(optimizer)
        # Nobody is left waiting for this rank.
        optimizer.sharded_model.finish_gather()
        return answer

    return on_ranks(2, body, make_model=Small, overlap_gather=True)


def _of(model: chainer.Link, read: Callable[[Any], Any]) -> Seen:
    return {name: np.array(read(param)) for name, param in model.namedparams()}


def _npz(optimizer: Any) -> Seen:
    file = io.BytesIO()
    chainer.serializers.save_npz(file, optimizer.target)
    file.seek(0)
    return {f"/{name}": array for name, array in np.load(file).items()}


def _copyparams(optimizer: Any) -> Seen:
    other = Small()
    other.copyparams(optimizer.target)
    return arrays(other)


def _in_another_thread(optimizer: Any) -> Seen:
    seen: Seen = {}
    thread = threading.Thread(target=lambda: seen.update(copy.deepcopy(arrays(optimizer.target))))
    thread.start()
    thread.join()
    return seen


def _evaluator(optimizer: Any) -> Seen:
    model, seen = optimizer.target, {}
    iterator = chainer.iterators.SerialIterator([np.ones(5, np.float32)], 1, repeat=False)

    def evaluate(x: Any) -> None:
        model(x)
        seen.update(_of(model, lambda param: param.array))

    extensions.Evaluator(iterator, model, eval_func=evaluate)()
    return seen


def _link_hook(optimizer: Any) -> Seen:
    seen = {}

    class Hook(chainer.LinkHook):  # type: ignore[misc]
        def forward_preprocess(self, args: Any) -> None:
            if hasattr(args.link, "W"):
                seen[f"/{args.link.name}/W"] = args.link.W.array.copy()

    with Hook():
        optimizer.target(batch(0, 9, 4, 5))
    return seen


def _optimizers_pickle(optimizer: Any) -> Seen:
    return arrays(pickle.loads(pickle.dumps(optimizer)).target)


def _statistics(optimizer: Any) -> Seen:
    seen = {}
    for link in optimizer.target.links():
        for param in link.params(include_uninit=False):
            seen[id(param)] = param.xp.array(param.data)
    return {name: seen[id(param)] for name, param in optimizer.target.namedparams()}


def _of_flat_buffers(optimizer: Any) -> Seen:
    (group,) = optimizer.sharded_model.groups
    return {
        slot.name: group.buffers.flat[slot.start_f : slot.stop_f].reshape(slot.shape)
        for slot in group.layout.slots
    }


READERS: dict[str, Callable[[Any], Seen]] = {
    "array": lambda o: _of(o.target, lambda param: param.array),
    "data": lambda o: _of(o.target, lambda param: param.data),
    "raw_array": lambda o: _of(o.target, lambda param: param.raw_array),
    "node": lambda o: {"/b/W": np.array(o.target.b.W.node.data)},
    "initializer": lambda o: {"/a_scale": np.array(o.target.a_scale.initializer)},
    "item": lambda o: {"/a/b": np.array([o.target.a.b[i].array for i in range(7)])},
    "function": lambda o: _of(o.target, lambda param: F.identity(param).array),
    "string": lambda o: {"/a/b": np.array(str(o.target.a.b).split("[")[1][:-2].split(), "f")},
    "npz": _npz,
    "deepcopy": lambda o: arrays(copy.deepcopy(o.target)),
    "pickle": lambda o: arrays(pickle.loads(pickle.dumps(o.target))),
    "copy": lambda o: _of(o.target.copy(), lambda param: param.array),
    "copy of a parameter": lambda o: {
        "/a_scale": np.array(copy.copy(o.target.a_scale).initializer)
    },
    "whole copy": lambda o: _of(o.target.copy("copy"), lambda param: param.array),
    "copyparams": _copyparams,
    "thread": _in_another_thread,
    "evaluator": _evaluator,
    "link hook": _link_hook,
    "to_device": lambda o: arrays(o.target.to_device("@numpy")),
    "statistics": _statistics,
    "flat buffers": _of_flat_buffers,
    "copy of the optimizer": lambda o: arrays(copy.deepcopy(o).target),
    "pickle of the optimizer": _optimizers_pickle,
    "set up again": lambda o: _of_flat_buffers(o) if o.setup(o.target) else {},
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_sees_what_the_update_has_made(name: str) -> None:
    seen = while_under_way(READERS[name])[1]
    _, after = expected()
    if name == "string":
        np.testing.assert_allclose(seen["/a/b"], after["/a/b"], atol=1e-5)
    else:
        assert_equal(seen, after)


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "array": lambda model: model.a.W.array,
    "view": lambda model: model.a.W.array.T[1:],
    "variable": lambda model: chainer.Variable(model.a.W.array),
    "graph": lambda model: F.transpose(model.a.W),
    "copy's node": lambda model: _used(model.copy()),
}


def _used(model: Any) -> Any:
    model.kept = F.sum(model(batch(0, 9, 4, 5)))
    return model


@pytest.mark.parametrize("name", HOLDERS)
def test_what_somebody_holds_is_there_when_the_update_returns(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def read(optimizer: Any) -> np.ndarray:
        kept = optimizer.kept
        if name == "copy's node":
            return np.array(kept.b.W.node.data)
        array = getattr(kept, "array", kept)
        return np.array(array)

    (_, seen) = while_under_way(read, HOLDERS[name], waits_within_update=True)
    _, after = expected()
    w = after["/a/W"]
    right = {"view": w.T[1:], "graph": w.T, "copy's node": after["/b/W"]}.get(name, w)
    np.testing.assert_array_equal(seen, right)
    told = [r.getMessage() for r in caplog.records if "overlap_gather" in r.getMessage()]
    assert len(told) == 2
    for rank, message in enumerate(sorted(told)):
        assert f"(overlap_gather): on rank {rank} somebody has the array of /a/W" in message


class Called(Mlp):
    def forward(self, x: Any) -> Any:
        return self.c(F.tanh(self.b(F.tanh(self.a(x)))))


def test_usual_trainings_hold_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A classifier keeps its loss, and so the graph; a loop keeps it as well."""

    def body(optimizer: Any, rank: int) -> None:
        model, classifier = optimizer.target, None
        classifier = L.Classifier(model, lambda y, t: F.sum(F.square(y - t)))
        classifier.compute_accuracy = False
        twin = model.copy()
        for step in range(STEPS):
            x, t = batch(rank, step, 4, 13), batch(rank, step, 4, 3)
            if step % 2:
                optimizer.update(classifier, x, t)
            else:
                model.cleargrads()
                loss = classifier(x, t)
                loss.backward()
                optimizer.update()
            # After that of the broadcast.
            if step:
                assert optimizer.sharded_model.in_flight is not None
            with chainer.no_backprop_mode():
                twin(x)
        assert optimizer.sharded_model.in_flight is not None

    on_ranks(2, body, make_model=Called, overlap_gather=True)
    assert not [r for r in caplog.records if "overlap_gather" in r.getMessage()]


def test_gradients_are_cleared_without_waiting() -> None:
    def look(optimizer: Any) -> None:
        optimizer.target.cleargrads()
        for param in optimizer.target.params():
            assert param.dtype == np.float32
            assert param.size == np.prod(param.shape) and param.ndim == len(param.shape)
            assert param.device.name == "@numpy"
        assert not optimizer._overlap_gather._last._arrived
        optimizer.sharded_model.finish_gather()

    while_under_way(look)


def _load_npz(optimizer: Any) -> None:
    file = io.BytesIO()
    chainer.serializers.save_npz(file, Small())
    file.seek(0)
    chainer.serializers.load_npz(file, optimizer.target)


def _all_params(write: Callable[[Any], None]) -> Callable[[Any], None]:
    def everywhere(optimizer: Any) -> None:
        initial = arrays(Small())
        for name, param in optimizer.target.namedparams():
            write(param, initial[name])  # type: ignore[call-arg]

    return everywhere


def _in_place(param: Any, values: np.ndarray) -> None:
    param.array[...] = values


def _replaced(param: Any, values: np.ndarray) -> None:
    param.array = values


WRITERS: dict[str, Callable[[Any], None]] = {
    "in place": _all_params(_in_place),  # type: ignore[arg-type]
    "another array": _all_params(_replaced),  # type: ignore[arg-type]
    "copyparams": lambda o: o.target.copyparams(Small()),
    "load_npz": _load_npz,
    "in place, in a copy": lambda o: o.target.copy().copyparams(Small()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_meanwhile_stays(name: str) -> None:
    def write(optimizer: Any) -> Seen:
        WRITERS[name](optimizer)
        optimizer.sharded_model.finish_gather()
        return arrays(optimizer.target)

    assert_equal(while_under_way(write)[1], arrays(Small()))


def test_what_somebody_writes_is_noticed_at_the_next_update() -> None:
    def write_nowhere_or_on_rank_0(optimizer: Any) -> None:
        train(optimizer, optimizer.collectives.rank, 1)
        if optimizer.collectives.rank == 0:
            optimizer.target.a.W.array[...] = 7
        with pytest.raises(RuntimeError, match="parameter /a/W"):
            train(optimizer, optimizer.collectives.rank, 1)

    while_under_way(write_nowhere_or_on_rank_0, everywhere=True)


class _NothingInFlight:
    """Is asked before the ranks agree on a step."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def flags(self) -> Flag:
        assert self.optimizer.sharded_model.in_flight is None
        return NO_FLAGS

    def proceed(self, flags: Flag) -> None:
        assert self.optimizer.sharded_model.in_flight is None


TOGETHER: dict[str, Callable[[Any], Any]] = {
    "check_sync": lambda o: o.check_sync(),
    "lay_out": lambda o: o.lay_out(),
    "no_more_batches": lambda o: o.no_more_batches(),
    "update": lambda o: o.update(o.target.loss, o.collectives.rank, 3),
    "update without a loss": lambda o: o.target.cleargrads() or o.update(),
    "another model": lambda o: o.setup(Small()).update(o.target.loss, o.collectives.rank, 3),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_ranks_do_together_waits_first(name: str) -> None:
    def run(optimizer: Any) -> None:
        model, last = optimizer.target, optimizer._overlap_gather._last
        if "update" in name:
            optimizer.ask_before_each_step(_NothingInFlight(optimizer))
        TOGETHER[name](optimizer)
        assert last._arrived == len(last._turns)
        for param in model.params():
            assert type(param._node) is chainer.variable.VariableNode or "update" in name

    while_under_way(run, everywhere=True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    _, after = expected()

    def fork(optimizer: Any) -> int:
        # Other ranks are threads of this process, and not held back.
        own = weakref.WeakSet([optimizer._overlap_gather._last])
        monkeypatch.setattr(parameters_in_flight, "_under_way", own)
        child = os.fork()
        if child == 0:
            same = [np.array_equal(p.array, after[n]) for n, p in optimizer.target.namedparams()]
            os._exit(0 if all(same) else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert while_under_way(fork)[1] == 0


# Which buckets come when


@contextmanager
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "_PART_BYTES", 256)
        yield


class Backwards(Net):
    """Its layers are used in an order that is not that of their names."""

    def __init__(self) -> None:
        super().__init__(a=L.Linear(12, 16), b=L.Linear(14, 12), c=L.Linear(16, 14))
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        h = F.tanh(self.c(batch(rank, step, 4, 16)))
        return F.sum(F.square(self.a(F.tanh(self.b(h)))))


def test_buckets_come_in_the_order_of_use_and_each_is_waited_for_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buckets = small_buckets(monkeypatch)

    def body(optimizer: Any, rank: int) -> Any:
        train(optimizer, rank, 3)
        optimizer.sharded_model.finish_gather()
        permits = threading.Semaphore(0)
        channel = optimizer._overlap_gather._channel
        if rank == 0:
            channel.before_bucket = lambda: _is_true(permits.acquire(timeout=60))
        optimizer.update(optimizer.target.loss, rank, 3)
        if rank:
            return None
        last, model = optimizer._overlap_gather._last, optimizer.target
        needed = last._needed["/c/W"]
        assert 0 < needed < len(last._turns)
        permits.release(needed)
        w = model.c.W.array.copy()
        assert last._arrived == needed
        # The thread gives way to the forward pass again.
        assert not channel.hurried.is_set()
        permits.release(99)
        return optimizer._overlap_gather._order, w, model.c.W.array.copy()

    with buckets:
        order, early, late = on_ranks(2, body, make_model=Backwards, overlap_gather=True)[0]
    assert order == ("/c/W", "/c/b", "/b/W", "/b/b", "/a/W", "/a/b")
    np.testing.assert_array_equal(early, late)


def _is_true(value: bool) -> None:
    assert value


# What comes out


@pytest.mark.parametrize("seed", range(10))
def test_random_trainings_come_out_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.RandomState(seed)
    world, model = 1 + draw.randint(4), MODELS[seed % len(MODELS)]
    how: dict[str, Any] = {"overlap": bool(draw.randint(2))}
    if model is not Mixed and draw.randint(2):
        how["gather_dtype"] = "bfloat16"
    how["accumulate"] = 1 + draw.randint(2)
    hooks = [h for h in (optimizer_hooks.WeightDecay(0.1), _Own()) if draw.randint(3) == 0]
    looped, scaled = draw.randint(3) == 0, draw.randint(3) == 0

    def body(optimizer: Any, rank: int) -> Any:
        if model is Mixed:
            optimizer.use_fp32_update()
        for hook in hooks:
            optimizer.add_hook(hook)
        if scaled:
            optimizer.loss_scaling(scale=4.0)
        for step in range(2 * STEPS):
            if looped:
                optimizer.target.cleargrads()
                optimizer.target.loss(rank, step).backward(loss_scale=optimizer._loss_scale)
                optimizer.update()
            else:
                optimizer.update(optimizer.target.loss, rank, step)
        optimizer.check_sync()
        return optimizer.target, dict(optimizer.collectives.bytes_sent)

    def run(wanted: bool) -> list[Any]:
        return on_ranks(world, body, make_model=model, overlap_gather=wanted, **how)

    with small_buckets(monkeypatch):
        without, beside = run(False), run(True)
    for (one, _), (other, _) in zip(without, beside, strict=True):
        assert_same_bits(other, one)


class _Own:
    """An elementwise hook of a script's own."""

    name = "own"
    call_for_each_param = True
    is_elementwise = True
    timing = "pre"

    def __call__(self, rule: Any, param: Any) -> None:
        param.grad += 0.01 * param.array


# Where it is done, and what is said where it is not


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    head = "parameters are gathered within update (overlap_gather): "
    told = [r.getMessage() for r in caplog.records if "overlap_gather" in r.getMessage()]
    return [message.removeprefix(head) for message in told]


def _hooked(optimizer: Any, rank: int) -> None:
    optimizer.add_hook(_Own())
    train(optimizer, rank, 3)


def _replicated(optimizer: Any, rank: int) -> None:
    optimizer.add_hook(lambda _: None, name="whole")
    train(optimizer, rank, 3)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_hooked, "hooks see parameters that they might keep"),
        (_replicated, "hooks see whole gradients and parameters"),
    ],
)
def test_with_hooks_of_a_script_it_is_said_once_that_updates_wait(
    body: Callable[[Any, int], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    def run(optimizer: Any, rank: int) -> None:
        body(optimizer, rank)
        assert optimizer.sharded_model.in_flight is None

    on_ranks(2, run, make_model=Mlp, overlap_gather=True)
    assert _told(caplog) == [reason]


def test_ranks_that_share_parameters_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        assert optimizer.sharded_model.in_flight is None

    on_ranks(2, body, make_model=Mlp, overlap_gather=True, share_parameters=True)
    assert _told(caplog) == ["ranks of a host share parameters"]


def test_rules_on_whole_arrays_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    on_ranks(
        2,
        lambda o, rank: train(o, rank, 3),
        make=lambda: OwnOptimizer(NormalizedRule),
        make_model=Mlp,
        overlap_gather=True,
    )
    assert _told(caplog) == ["there is an update rule that runs on whole arrays"]


def test_without_threads_it_says_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ThreadCollectives, "obstacle", "it has no threads")
    on_ranks(2, lambda o, r: train(o, r, 3), make_model=Mlp, overlap_gather=True)
    assert _told(caplog) == ["on rank 0 it has no threads"]


def test_ranks_must_be_told_alike() -> None:
    def run(collectives: Any) -> None:
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, overlap_gather=collectives.rank == 0
        ).setup(Mlp())
        train(optimizer, collectives.rank)

    with pytest.raises(RuntimeError, match="overlap_gather: True on rank 0, False on rank 1"):
        run_ranks(2, run)


def test_copies_go_on_by_themselves() -> None:
    def body(optimizer: Any, rank: int) -> Any:
        train(optimizer, rank, 3)
        shallow = copy.copy(optimizer)
        train(shallow, rank, 3)
        deep = copy.deepcopy(shallow)
        train(deep, rank, 3)
        return deep.target

    beside = on_ranks(2, body, make_model=Mlp, overlap_gather=True)
    for one, other in zip(on_ranks(2, body, make_model=Mlp), beside, strict=True):
        assert_same_bits(other, one)
    assert_alike(beside)


# Faults


def test_a_gather_that_fails_is_an_error_for_everybody_who_asks() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        channel = optimizer._overlap_gather._channel

        def fail() -> None:
            channel._ranks._meeting.barrier.abort()
            raise OSError("the wire is cut")

        if rank == 0:
            channel.before_bucket = fail
        optimizer.update(optimizer.target.loss, rank, 3)
        error = f"rank {rank}: the gathering of parameters beside the next forward pass has failed"
        for ask in (
            lambda: optimizer.target.a.W.array,
            lambda: optimizer.target.a.W.array,
            lambda: optimizer.sharded_model.groups[0].buffers.flat,
            lambda: train(optimizer, rank, 1),
            lambda: optimizer.update(),
        ):
            with pytest.raises(RuntimeError, match=error):
                ask()

    on_ranks(2, body, make_model=Mlp, overlap_gather=True)


def test_who_waits_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(optimizer: Any, rank: int) -> Any:
        train(optimizer, rank, 2)
        channel, wait, at = optimizer._overlap_gather._channel, optimizer.collectives.wait, []

        def note() -> None:
            _is_set(channel.hurried)
            at.append(wait.at)

        channel.before_bucket = note
        train(optimizer, rank, 1)
        assert optimizer.target.a.W.array is not None
        assert wait.at is None
        return at

    where = "in the gathering of parameters beside the next forward pass"
    assert on_ranks(2, body, make_model=Mlp, overlap_gather=True) == [[where]] * 2
