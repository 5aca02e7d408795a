"""The formulas of ``smorms3-dist plan`` against layouts, optimizers and collectives themselves."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.collectives import connect as collectives
from smorms3_dist.collectives.nccl import NcclCollectives
from smorms3_dist.collectives.threads import ThreadCollectives, run_ranks
from smorms3_dist.collectives.through_host import ThroughHostCollectives
from smorms3_dist.device.memory import CudaMemory, HostMemory
from smorms3_dist.layout import FlatLayout, ParameterSpec
from smorms3_dist.plan import memory as plan
from smorms3_dist.plan import setup as plan_setup
from smorms3_dist.plan.setup import STATES, Group, Setup
from smorms3_dist.plan.times import Speeds, Times, chainermn_times, times, update_bytes
from smorms3_dist.sharding import model, rules

import chainer
import fake_cupy
import hypothesis
import hypothesis.strategies as st
import models
import numpy as np
import pytest

F2, F4, F8 = (np.dtype(name) for name in ("f2", "f4", "f8"))
WORLD_SIZES = [1, 2, 3, 4, 5]
STEPS = range(1, 4)
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "odd": models.SHAPES,
    "one": {"a": (12_345,)},
    "less than ranks": {"a": (2,), "b": (0, 3), "c": (1,)},
    "aligned": {"a": (64, 64), "b": (128,)},
}
DTYPES: dict[str, dict[str, str]] = {
    "float32": {},
    "float16": dict.fromkeys("abcdefg", "float16"),
    "mixed": {"a": "float16", "g": "float16", "e": "float64"},
}


def groups_of(link: chainer.Link) -> tuple[Group, ...]:
    sizes: dict[np.dtype, list[int]] = {}
    for _, param in sorted(link.namedparams()):
        sizes.setdefault(param.dtype, []).append(param.size)
    return tuple(Group(dtype, sizes[dtype]) for dtype in sorted(sizes, key=str))


def simple(count: int, dtype: np.dtype = F4, ranks: int = 1, **how: Any) -> Setup:
    return Setup((Group(dtype, [count]),), ranks, **how)


# Layouts


def test_the_bucket_of_gpus_is_that_of_their_memory() -> None:
    assert CudaMemory.bucket_bytes == plan_setup.GPU_BUCKET_BYTES
    assert HostMemory.bucket_bytes == plan_setup.BUCKET_BYTES


@hypothesis.given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=8),
    dtype=st.sampled_from([F2, F4, F8]),
    ranks=st.integers(1, 9),
    dense=st.booleans(),
    bucket_bytes=st.integers(1, 20_000),
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_sizes_are_those_of_layouts(
    sizes: list[int], dtype: np.dtype, ranks: int, dense: bool, bucket_bytes: int
) -> None:
    specs = [ParameterSpec(f"/p{i}", (size,), dtype.name) for i, size in enumerate(sizes)]
    (expected,) = FlatLayout(specs, ranks, bucket_bytes, dense).groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_setup, "BUCKET_BYTES", bucket_bytes)
        patch.setattr(plan_setup, "GPU_BUCKET_BYTES", bucket_bytes)
        group = Group(dtype, sizes)
        setup = Setup((group,), ranks, transport="host" if dense else "nccl")
        assert setup.flat_size(group) == expected.size
        assert setup.buckets(group) == len(expected.buckets)
        largest = max((bucket.part for bucket in expected.buckets), default=0)
        assert setup.bucket_size(group) == largest * ranks
        shards = setup.shard_sizes(group)
        assert shards.tolist() == [shard.size for shard in expected.shards]


# What optimizers really hold and send, on CPUs


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("fp32_update", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_states_buffers_and_bytes_are_those_of_optimizers(
    world_size: int, shapes: str, dtypes: str, fp32_update: bool, gradients: str
) -> None:
    def make_model() -> chainer.Link:
        names = {name: DTYPES[dtypes].get(name, "float32") for name in SHAPES[shapes]}
        return models.Model(SHAPES[shapes], names)

    def configure(optimizer: Any) -> None:
        if fp32_update:
            for param in optimizer.target.params():
                param.update_rule.use_fp32_update()

    optimizers = models.train_sharded(world_size, make_model, STEPS, configure, gradients)
    setup = Setup(
        groups_of(make_model()),
        world_size,
        transport="host",
        fp32_update=fp32_update,
        replicated=gradients == "replicated",
    )
    for rank, optimizer in enumerate(optimizers):
        held, updates = plan.memory(setup, rank), optimizer.shards.updates
        assert plan.state_bytes(setup, rank) == optimizer.state_bytes()
        masters = sum(
            state.nbytes
            for update in updates
            for name, state in update.states.items()
            if name == "fp32_param"
        )
        assert held.masters == masters
        assert held.parameters == sum(update.buffers.flat.nbytes for update in updates)
        if setup.replicated:
            whole = sum(update.buffers.flat_grad.nbytes for update in updates)
            if not masters:
                assert held.mean_gradients == whole
            # While masters are updated, their gradients are there again, in two dtypes.
            assert held.mean_gradients == whole + masters + masters // 2
        counted, sent = optimizer.collectives.bytes_sent, plan.sent(setup, rank)
        assert counted["reduce_scatter"] == len(STEPS) * sent.reduce_scatter
        gathered = len(STEPS) * (sent.gather_gradients + sent.all_gather)
        assert counted["all_gather"] == gathered
        assert (sent.gather_gradients > 0) == (setup.replicated and world_size > 1)
    totals = [plan.memory(setup, rank).total for rank in range(world_size)]
    assert plan.memory(setup).total == max(totals)
    assert plan.most_sent(setup).total == max(
        plan.sent(setup, rank).total for rank in range(world_size)
    )


def test_gradients_are_as_large_as_the_parameters() -> None:
    link = models.Model(dtypes=DTYPES["mixed"])
    models.set_gradients(link, 0, 0)
    held = plan.memory(Setup(groups_of(link), 3, transport="host"))
    assert held.gradients == sum(param.grad.nbytes for param in link.params())


@pytest.mark.parametrize("fp32_update", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_hooks_keep_the_gradient_of_the_shard(world_size: int, fp32_update: bool) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(1.0))
        if fp32_update:
            for param in optimizer.target.params():
                param.update_rule.use_fp32_update()

    def make_model() -> chainer.Link:
        return models.Model(dtypes=DTYPES["float16"])

    optimizers = models.train_sharded(world_size, make_model, STEPS, configure)
    setup = Setup(
        groups_of(make_model()), world_size, transport="host", hooks=True, fp32_update=fp32_update
    )
    for rank, optimizer in enumerate(optimizers):
        (staged,) = optimizer.shards.staged.values()
        assert staged.grad.dtype == F2
        scaled = staged.unscaled(None, again=False)
        kept = staged.grad.nbytes + (scaled.nbytes if fp32_update else 0)
        assert plan.memory(setup, rank).mean_gradients == kept


@pytest.mark.parametrize("fp32_update", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", STATES)
def test_rules_of_chainer_have_these_states(name: str, dtype: str, fp32_update: bool) -> None:
    link = models.Model({"a": (7,)}, {"a": dtype})
    getattr(chainer.optimizers, name)().setup(link)
    if fp32_update:
        link.a.update_rule.use_fp32_update()
    found = rules.plan(link.a)
    assert found.kind in (rules.Kind.FUSED, rules.Kind.ELEMENTWISE)
    (group,) = groups_of(link)
    setup = Setup((group,), 1, name, fp32_update=fp32_update)
    widths = [state.itemsize for _, state in found.states]
    assert widths == [setup.state_itemsize(group)] * setup.states


def test_all_optimizers_of_chainer_are_known() -> None:
    known = {
        name
        for name, value in vars(chainer.optimizers).items()
        if isinstance(value, type) and issubclass(value, chainer.GradientMethod)
    }
    assert known == STATES.keys()


@pytest.mark.parametrize("dtype", [F2, F4, F8])
@pytest.mark.parametrize("world_size", [*WORLD_SIZES, 70])
@pytest.mark.parametrize("transport", ["host", "cuda-aware"])
def test_pieces_over_mpi_take_what_the_exchange_allocates(
    transport: str, world_size: int, dtype: np.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is sent: neither an MPI library nor other ranks are there.
    library = types.SimpleNamespace(BYTE=None, Request=types.SimpleNamespace(Waitall=None))
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=library))
    from smorms3_dist.collectives import cuda_aware, mpi

    comm: Any = types.SimpleNamespace(rank=0, size=world_size)
    allocated: list[int] = []

    class Counting(CudaMemory):
        def empty(self, size: int, dtype: np.dtype, what: str = "") -> Any:
            allocated.append(size * np.dtype(dtype).itemsize)
            return np.empty(size, dtype)

    counting = Counting(0, fake_cupy.module(), None)  # type: ignore[arg-type]
    setup = simple(1000, dtype, world_size, transport=transport)
    ranks: Any = types.SimpleNamespace(size=world_size)
    if transport == "host":
        limit = collectives.Collectives.piece_limit(ranks, dtype)
        mpi.Exchange(comm, dtype, limit, counting.empty)
    else:
        limit = cuda_aware.CudaAwareCollectives.piece_limit(ranks, dtype)
        cuda_aware._DeviceExchange(comm, dtype, limit, counting)
    assert plan.piece_bytes(setup) // dtype.itemsize == limit
    assert plan.memory(setup).buffers == sum(allocated)


# On GPUs, by stand-ins


class Counting(CudaMemory):
    """Notes what is allocated."""

    def __init__(self, cupy: Any, launcher: Any) -> None:
        super().__init__(0, cupy, launcher)
        self.on_device: list[tuple[str, int]] = []
        self.on_host: list[int] = []

    def zeros(self, size: int, dtype: np.dtype, what: str) -> Any:
        self.on_device.append((what, size * np.dtype(dtype).itemsize))
        return super().zeros(size, dtype, what)

    def empty(self, size: int, dtype: np.dtype, what: str) -> Any:
        self.on_device.append((what, size * np.dtype(dtype).itemsize))
        return super().empty(size, dtype, what)

    def pinned(self, size: int, dtype: np.dtype, what: str) -> np.ndarray:
        self.on_host.append(size * np.dtype(dtype).itemsize)
        return super().pinned(size, dtype, what)


ON_ANY: list[dict[str, Any]] = [
    {},
    {"replicated": True},
    {"hooks": True},
    {"hooks": True, "replicated": True},
    {"fp32_update": True},
]
SENT_AS = [{"communication_dtype": dtype} for dtype in ("float16", "bfloat16")]
ON_GPUS = [("nccl", how) for how in ON_ANY + SENT_AS] + [("staged", how) for how in ON_ANY]


@pytest.mark.parametrize(("transport", "how"), ON_GPUS)
@pytest.mark.parametrize("dtypes", ["float32", "mixed"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_memory_and_bytes_are_those_of_steps_on_gpus(
    transport: str,
    world_size: int,
    dtypes: str,
    how: dict[str, Any],
    host_launcher: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cupy = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(model, "memory_of", lambda device, exact: Counting(cupy, host_launcher))
    without = None if transport == "nccl" else "the test wants so"
    monkeypatch.setattr(collectives, "_without_nccl", lambda *_: without)
    monkeypatch.setattr(CudaMemory, "bucket_bytes", 30_000)
    monkeypatch.setattr(plan_setup, "GPU_BUCKET_BYTES", 30_000)

    def make_model() -> chainer.Link:
        return models.Model(dtypes=DTYPES[dtypes])

    def run(host: ThreadCollectives) -> Any:
        link = make_model()
        for param in link.params():
            param.array = np.asarray(param.array).view(fake_cupy.DeviceArray)
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(),
            host,
            gradients="replicated" if how.get("replicated") else "sharded",
            communication_dtype=how.get("communication_dtype"),
        ).setup(link)
        if how.get("fp32_update"):
            for param in link.params():
                param.update_rule.use_fp32_update()
        if how.get("hooks"):
            optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(1.0))
        for step in (0, *STEPS):
            for name, param in link.namedparams():
                grad = models.gradient(name, param, host.rank, step)
                param.grad = np.asarray(grad).view(fake_cupy.DeviceArray)
            with np.errstate(all="ignore"):
                optimizer.update()
        return optimizer

    setup = Setup(groups_of(make_model()), world_size, transport=transport, **how)
    for rank, optimizer in enumerate(run_ranks(world_size, run)):
        used = optimizer.collectives
        assert type(used) is {"nccl": NcclCollectives, "staged": ThroughHostCollectives}[transport]
        counted, held = optimizer.shards.updates[0].buffers.memory, plan.memory(setup, rank)
        # A bucket may have been taken by a larger one's place.
        buckets = [buffer.nbytes for buffer in getattr(used, "_buffers", {}).values()]
        others = [n for what, n in counted.on_device if not what.startswith("a bucket of")]
        # The bytes by which states are aligned, and what the backward pass has made.
        aligned = sum(u.states.block.nbytes - u.nbytes for u in optimizer.shards.updates)
        assert aligned < 128 * 4 * len(setup.groups)
        assert held.total - held.gradients == sum(buckets) + sum(others) - aligned
        exchanges = sum(
            plan._exchange(setup, plan.piece_bytes(setup), group.dtype) for group in setup.groups
        )
        if transport == "nccl" or world_size == 1:
            assert held.host_buffers == sum(counted.on_host) == 0
        else:
            # Ranks are threads here, which have no exchange over MPI.
            assert held.host_buffers - exchanges == sum(counted.on_host)
        sent = plan.sent(setup, rank)
        assert used.bytes_sent["reduce_scatter"] == len(STEPS) * sent.reduce_scatter
        gathered = len(STEPS) * (sent.gather_gradients + sent.all_gather)
        assert used.bytes_sent["all_gather"] == gathered


# ChainerMN


@pytest.mark.parametrize("name", ["SMORMS3", "Adam"])
@pytest.mark.parametrize("fp32_update", [False, True])
def test_the_states_of_chainermn_are_those_of_chainer(name: str, fp32_update: bool) -> None:
    link = models.Model(dtypes=DTYPES["mixed"])
    setup = Setup(groups_of(link), 4, name, "host", fp32_update)

    def configure(optimizer: Any) -> None:
        if fp32_update:
            for param in link.params():
                param.update_rule.use_fp32_update()

    models.train_with_chainer(link, 1, STEPS, configure, make=getattr(chainer.optimizers, name))
    held = plan.chainermn_memory(setup)
    states = [state for param in link.params() for state in param.update_rule.state.values()]
    masters = [param.update_rule._fp32_param for param in link.params()]
    assert held.states == sum(state.nbytes for state in states if state is not None)
    assert held.masters == sum(master.array.nbytes for master in masters if master is not None)
    assert held.parameters == sum(param.array.nbytes for param in link.params())


@pytest.mark.parametrize(
    ("transport", "dtype", "expected"),
    [
        # Two of gradients as they are sent, and what its broadcast has taken.
        ("nccl", F4, 3 * 4_000),
        ("nccl", F2, 3 * 2_000),
        ("cuda-aware", F2, 2 * 4_000),
        ("staged", F4, 2 * 4_000),
        ("host", F4, 0),
        # The largest in float32.
        ("host", F2, 4 * 700),
    ],
)
def test_the_buffers_of_chainermn(transport: str, dtype: np.dtype, expected: int) -> None:
    setup = Setup((Group(dtype, [300, 700]),), 8, transport=transport)
    assert plan.chainermn_memory(setup).buffers == expected


def test_chainermn_sends_twice_the_gradients_in_a_ring() -> None:
    assert plan.chainermn_sent(simple(1000, F4, 4)) == 2 * 3 * 4000 // 4
    assert plan.chainermn_sent(simple(1000, F4, 1)) == 0
    assert plan.chainermn_sent(simple(1000, F4, 4, communication_dtype="float16")) == 3000
    assert plan.chainermn_sent(simple(1000, F2, 4, transport="host")) == 6000


# How many ranks


@pytest.mark.parametrize("transport", ["nccl", "host", "cuda-aware", "staged"])
@pytest.mark.parametrize("hooks", [False, True])
def test_the_smallest_world_size_is_found(transport: str, hooks: bool) -> None:
    setup = simple(50_000_000, F4, transport=transport, hooks=hooks)
    totals = [plan.memory(dataclasses.replace(setup, ranks=ranks)).total for ranks in range(1, 80)]
    for limit in range(min(totals), totals[0] + 1, (totals[0] - min(totals)) // 37):
        fitting = next(ranks for ranks, total in enumerate(totals, 1) if total <= limit)
        assert plan.smallest_ranks(setup, limit) == fitting
    assert plan.smallest_ranks(setup, totals[0]) == 1


@pytest.mark.parametrize("transport", ["nccl", "host", "cuda-aware", "staged"])
def test_parameters_and_gradients_fit_on_no_number_of_ranks_if_not_on_one(transport: str) -> None:
    setup = simple(50_000_000, F4, transport=transport)
    assert plan.smallest_ranks(setup, 2 * 4 * 50_000_000 - 1) is None
    # Nor if there is nearly room for these alone.
    assert plan.smallest_ranks(setup, 2 * 4 * 50_000_000 + 1000) is None


# Times

MACHINE = Speeds(inside=10e9, between=1e9, memory=100e9, latency=1e-3)


def test_a_ring_takes_its_messages_and_its_bytes() -> None:
    # Two buckets: 6 messages one after the other; 3/4 of 128 MB at 10 GB/s, or 1 between nodes.
    setup = simple(1 << 25, F4, 4)
    nbytes = 3 / 4 * 4 * 2**25
    inside = times(setup, MACHINE, 4)
    assert inside.reduce == inside.all_gather == pytest.approx(6e-3 + nbytes / 10e9)
    assert inside.gather_gradients == 0
    assert inside.pack == pytest.approx(2 * 4 * 2**25 / 100e9)
    between = times(setup, MACHINE, 2)
    assert between.reduce == between.all_gather == pytest.approx(6e-3 + nbytes / 1e9)
    halved = times(dataclasses.replace(setup, communication_dtype="bfloat16"), MACHINE, 2)
    assert halved.reduce == pytest.approx(6e-3 + nbytes / 2e9)
    assert halved.all_gather == between.all_gather
    whole = times(dataclasses.replace(setup, replicated=True), MACHINE, 2)
    assert whole.gather_gradients == whole.all_gather == between.all_gather
    assert whole.total == pytest.approx(between.total + between.all_gather)


def test_what_ranks_exchange_in_pairs_leaves_the_node_of_each() -> None:
    # 4 turns of 1 MiB / 3 from each of 3 peers; 4 MiB, of which 3/4 go to others in a node.
    setup = simple(1 << 20, F4, 4, transport="host")
    nbytes = 4 * 2**20
    inside = times(setup, MACHINE, 8)
    assert inside.reduce == pytest.approx(4 * 3 * 1e-3 + 3 / 4 * nbytes / 10e9)
    # Each of two ranks of a node sends half of it away, over one link.
    assert times(setup, MACHINE, 2).reduce == pytest.approx(4 * 3 * 1e-3 + 2 / 2 * nbytes / 1e9)
    assert times(setup, MACHINE, 1).reduce == pytest.approx(4 * 3 * 1e-3 + 3 / 4 * nbytes / 1e9)
    assert inside.pack == 0


@pytest.mark.parametrize("transport", ["nccl", "host", "cuda-aware", "staged"])
def test_one_rank_communicates_nothing(transport: str) -> None:
    alone = times(simple(1 << 20, transport=transport), MACHINE, 8)
    assert alone.reduce == alone.all_gather == 0
    assert plan.most_sent(simple(1 << 20, transport=transport)).total == 0


@pytest.mark.parametrize(
    ("dtype", "how", "expected"),
    [
        (F4, {}, 36),
        (F8, {}, 72),
        (F4, {"optimizer": "SGD"}, 12),
        (F4, {"optimizer": "Adam"}, 28),
        (F2, {}, 18),
        # float16: the gradient is read, the parameter written; masters and states are float32.
        (F2, {"fp32_update": True}, 2 + 2 + 8 + 24),
    ],
)
def test_an_update_reads_and_writes_everything_once(
    dtype: np.dtype, how: dict[str, Any], expected: int
) -> None:
    setup = simple(1 << 20, dtype, 4, **how)
    assert update_bytes(setup, setup.groups[0]) == expected
    assert times(setup, MACHINE, 8).update == pytest.approx(expected * 2**18 / 100e9)
    assert chainermn_times(setup, MACHINE, 8).update == pytest.approx(expected * 2**20 / 100e9)


def test_chainermn_reduces_in_a_ring_to_everybody() -> None:
    found = chainermn_times(simple(1 << 20, F4, 4), MACHINE, 2)
    nbytes = 4 * 2**20
    assert found == Times(
        pack=pytest.approx(4 * nbytes / 100e9),
        reduce=pytest.approx(2 * (3e-3 + 3 / 4 * nbytes / 1e9)),
        gather_gradients=0,
        update=pytest.approx(36 * 2**20 / 100e9),
        all_gather=0,
    )
