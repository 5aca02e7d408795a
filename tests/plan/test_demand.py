"""The memory and bytes of ``smorms3-dist plan`` against optimizers that hold and send them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import types
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.collectives import connect
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.collectives.nccl import NcclCollectives
from smorms3_dist.collectives.through_host import ThroughHostCollectives
from smorms3_dist.device.memory import CudaMemory, HostMemory
from smorms3_dist.kernels.narrow import SENT_AS, narrower
from smorms3_dist.layout import ParameterSpec
from smorms3_dist.plan import demand
from smorms3_dist.plan import setup as plan_setup
from smorms3_dist.plan.setup import STATES, TRANSPORTS, Setup
from smorms3_dist.sharding import model, rules
from smorms3_dist.sharding.states import IN_FLIGHT

import chainer
import fake_cupy
import hypothesis
import hypothesis.strategies as st
import models
import numpy as np
import pytest
from device_checks import Counting
from rank_threads import ThreadCollectives, run_ranks

STEPS = range(1, 4)
MIXED = {"a": "float16", "g": "float16", "e": "float64"}
DTYPES = ["float16", "float32", "float64"]


def specs_of(link: chainer.Link) -> tuple[ParameterSpec, ...]:
    params = link.namedparams()
    return tuple(ParameterSpec(name, param.shape, param.dtype.name) for name, param in params)


def simple(count: int, dtype: str = "float32", ranks: int = 1, **how: Any) -> Setup:
    return Setup((ParameterSpec("/w", (count,), dtype),), ranks, **how)


class OwnHook:
    """A user's own."""

    name = "OwnHook"
    timing = "pre"
    call_for_each_param = True
    is_elementwise = True

    def __call__(self, rule: Any, param: Any) -> None:
        """Looks."""


def configure(optimizer: Any, setup: Setup) -> None:
    if setup.hooks:
        optimizer.add_hook(OwnHook())
    if setup.fp32_update:
        for param in optimizer.target.params():
            param.update_rule.use_fp32_update()


def assert_sends(optimizer: Any, sent: dict[str, int]) -> None:
    counted = optimizer.collectives.bytes_sent
    assert counted["reduce_scatter"] == len(STEPS) * sent["reduce_scatter"]
    gathered = sent["gather_gradients"] + sent["all_gather"]
    assert counted["all_gather"] == len(STEPS) * gathered


# On CPUs


@hypothesis.given(
    shapes=st.just(models.SHAPES)
    | st.dictionaries(st.sampled_from("abcdefg"), st.tuples(st.integers(0, 700))).filter(
        lambda shapes: any(map(any, shapes.values()))
    ),
    dtypes=st.dictionaries(st.sampled_from("abcdefg"), st.sampled_from(DTYPES)),
    world_size=st.integers(1, 5),
    how=st.fixed_dictionaries(
        {"fp32_update": st.booleans(), "gradients": st.sampled_from(["sharded", "replicated"])}
    ),
)
@hypothesis.example(models.SHAPES, MIXED, 3, {"fp32_update": True, "gradients": "replicated"})
@hypothesis.example({"a": (2,), "b": (0, 3)}, {}, 4, {"fp32_update": False, "gradients": "sharded"})
@hypothesis.settings(max_examples=60, deadline=None)
def test_optimizers_hold_and_send_what_was_planned(
    shapes: Any, dtypes: dict[str, str], world_size: int, how: dict[str, Any]
) -> None:
    make_model = functools.partial(models.Model, shapes, dtypes)
    setup = Setup(specs_of(make_model()), world_size, transport="host", **how)
    optimizers = models.train_sharded(
        world_size, make_model, STEPS, lambda each: configure(each, setup), setup.gradients
    )
    for rank, optimizer in enumerate(optimizers):
        held, groups = demand.memory(setup, rank), optimizer.sharded_model.groups
        assert held["masters"] + held["states"] == optimizer.state_bytes()
        states = [item for group in groups for item in group.states.items()]
        masters = sum(state.nbytes for name, state in states if name == "fp32_param")
        assert held["masters"] == masters
        assert held["parameters"] == sum(group.buffers.flat.nbytes for group in groups)
        whole = 0
        if setup.replicated:
            # While masters are updated, their gradients are there again, in two dtypes.
            whole = sum(group.buffers.flat_grad.nbytes for group in groups) + masters + masters // 2
        assert held["mean_gradients"] == whole
        assert_sends(optimizer, demand.sent(setup, rank))
    ranks = range(world_size)
    for what in demand.memory, demand.sent:
        assert what(setup)["total"] == max(what(setup, rank)["total"] for rank in ranks)


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
def test_narrow_dtypes_take_masters_and_save_bytes(gradients: str) -> None:
    how = {"communication_dtype": "float16", "gather_dtype": "bfloat16", "fp32_update": True}
    make_model = functools.partial(models.Model, dtypes=MIXED)
    setup = Setup(specs_of(make_model()), 3, transport="host", gradients=gradients, **how)

    def narrow(optimizer: Any) -> None:
        configure(optimizer, setup)
        optimizer.communication_dtype = setup.communication_dtype
        optimizer.gather_dtype = setup.gather_dtype

    for rank, optimizer in enumerate(models.train_sharded(3, make_model, STEPS, narrow, gradients)):
        held = demand.memory(setup, rank)
        assert held["masters"] + held["states"] == optimizer.state_bytes()
        states = [i for g in optimizer.sharded_model.groups for i in g.states.items()]
        assert held["masters"] == sum(s.nbytes for name, s in states if name == "fp32_param")
        assert_sends(optimizer, demand.sent(setup, rank))


@pytest.mark.parametrize("fp32_update", [False, True])
def test_double_buffering_keeps_the_gradients_and_the_mean_of_the_shard(fp32_update: bool) -> None:
    how = {"double_buffering": True, "fp32_update": fp32_update}
    setup = Setup(specs_of(models.Model(dtypes=MIXED)), 3, transport="host", **how)

    def run(collectives: ThreadCollectives) -> Any:
        link = models.Model(dtypes=MIXED)
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, double_buffering=True
        ).setup(link)
        configure(optimizer, setup)
        models.train(optimizer, collectives.rank, STEPS)
        return optimizer

    for rank, optimizer in enumerate(run_ranks(3, run)):
        held, groups = demand.memory(setup, rank), optimizer.sharded_model.groups
        means = sum(group.states[IN_FLIGHT].nbytes for group in groups)
        taken = sum(each._flat.nbytes for each in optimizer._in_flight._taken)
        assert held["in_flight"] == means + taken
        assert held["masters"] + held["states"] == optimizer.state_bytes() - means
    without = dataclasses.replace(setup, double_buffering=False)
    extra = demand.memory(setup)["total"] - demand.memory(without)["total"]
    assert extra == max(demand.memory(setup, rank)["in_flight"] for rank in range(3))


@pytest.mark.parametrize("fp32_update", [False, True])
def test_hooks_keep_the_gradient_of_the_shard(fp32_update: bool) -> None:
    make_model = functools.partial(models.Model, dtypes=dict.fromkeys("abcdefg", "float16"))
    setup = Setup(specs_of(make_model()), 3, transport="host", hooks=True, fp32_update=fp32_update)
    optimizers = models.train_sharded(3, make_model, STEPS, lambda each: configure(each, setup))
    for rank, optimizer in enumerate(optimizers):
        (staged,) = optimizer.sharded_model.staged.values()
        assert staged.grad.dtype == np.float16
        scaled = staged.unscaled(None, again=False)
        kept = staged.grad.nbytes + (scaled.nbytes if fp32_update else 0)
        assert demand.memory(setup, rank)["mean_gradients"] == kept


def test_rules_of_chainer_have_the_states_that_are_planned_for() -> None:
    found = [each for each in vars(chainer.optimizers).values() if isinstance(each, type)]
    known = {each.__name__ for each in found if issubclass(each, chainer.GradientMethod)}
    assert known == STATES.keys()
    for name, dtype, masters in itertools.product(STATES, ["float16", "float32"], [False, True]):
        link = models.Model({"a": (7,)}, {"a": dtype})
        setup = Setup(specs_of(link), 1, optimizer=name, fp32_update=masters)
        configure(getattr(chainer.optimizers, name)().setup(link), setup)
        rule = rules.plan(link.a)
        assert rule.kind in (rules.Kind.FUSED, rules.Kind.ELEMENTWISE)
        planned = setup.state_bytes(setup.groups[0])
        assert sum(state.itemsize for _, state in rule.states) == planned, (name, dtype, masters)
        assert len(rule.states) == STATES[name]


@pytest.mark.parametrize("transport", ["host", "cuda-aware"])
def test_pieces_over_mpi_take_what_the_exchange_allocates(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is sent: neither an MPI library nor other ranks are there.
    library = types.SimpleNamespace(BYTE=None, Request=types.SimpleNamespace(Waitall=None))
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=library))
    from smorms3_dist.collectives import cuda_aware, mpi

    names = [None, "bfloat16"] if transport == "host" else [None]
    for world_size, dtype, name in itertools.product(
        [1, 2, 3, 5, 70], map(np.dtype, DTYPES), names
    ):
        counting = Counting(fake_cupy.module())
        comm: Any = types.SimpleNamespace(rank=0, size=world_size)
        if transport == "host":
            limit = Collectives.piece_limit(comm, dtype)
            mpi.Exchange(comm, dtype, limit, counting.empty, narrower(name, dtype))
        else:
            limit = cuda_aware.CudaAwareCollectives.piece_limit(comm, dtype)
            cuda_aware._DeviceExchange(comm, dtype, limit, counting)
        setup = simple(1000, dtype.name, world_size, transport=transport, communication_dtype=name)
        assert demand.piece_bytes(setup) // dtype.itemsize == limit
        allocated = sum(nbytes for _, nbytes in counting.on_device)
        assert demand.memory(setup)["buffers"] == allocated, (world_size, dtype)


# On GPUs, by stand-ins


ANYWHERE: list[dict[str, Any]] = [{}, {"gradients": "replicated"}, {"hooks": True}]
ANYWHERE += [{"hooks": True, "gradients": "replicated"}, {"fp32_update": True}]
OVER_NCCL = [*ANYWHERE, *({"communication_dtype": dtype} for dtype in SENT_AS)]


@pytest.mark.parametrize(
    ("world_size", "transport", "how"),
    [
        *((3, "nccl", how) for how in OVER_NCCL),
        *((3, "staged", how) for how in ANYWHERE),
        *((ranks, transport, {}) for ranks in (1, 2) for transport in ("nccl", "staged")),
    ],
)
def test_steps_on_gpus_take_the_memory_and_bytes_that_were_planned(
    transport: str, world_size: int, how: Any, host_launcher: Any, monkeypatch: Any
) -> None:
    assert CudaMemory.bucket_bytes == plan_setup.GPU_BUCKET_BYTES
    sizes = {ranks: plan_setup.gpu_bucket_bytes(ranks) for ranks in (1, 16, 17, 64)}
    assert sizes == {1: 1 << 26, 16: 1 << 26, 17: 1 << 27, 64: 1 << 28}
    assert HostMemory.bucket_bytes == plan_setup.BUCKET_BYTES
    cupy = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(model, "memory_of", lambda device, exact: Counting(cupy, host_launcher))
    without = None if transport == "nccl" else "the test wants so"
    monkeypatch.setattr(connect, "_without_nccl", lambda *_: without)
    monkeypatch.setattr(CudaMemory, "bucket_bytes", 30_000)
    monkeypatch.setattr(plan_setup, "GPU_BUCKET_BYTES", 30_000)
    setup = Setup(specs_of(models.Model(dtypes=MIXED)), world_size, transport=transport, **how)

    def run(host: ThreadCollectives) -> Any:
        link = models.Model(dtypes=MIXED)
        for param in link.params():
            param.array = np.asarray(param.array).view(fake_cupy.DeviceArray)
        sent = {"communication_dtype": setup.communication_dtype, "gradients": setup.gradients}
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), host, **sent)
        optimizer.setup(link)
        configure(optimizer, setup)
        for step in (0, *STEPS):
            for name, param in link.namedparams():
                grad = models.gradient(name, param, host.rank, step)
                param.grad = np.asarray(grad).view(fake_cupy.DeviceArray)
            with np.errstate(all="ignore"):
                optimizer.update()
        return optimizer

    for rank, optimizer in enumerate(run_ranks(world_size, run)):
        used, groups = optimizer.collectives, optimizer.sharded_model.groups
        assert type(used) is {"nccl": NcclCollectives, "staged": ThroughHostCollectives}[transport]
        counted, held = groups[0].buffers.memory, demand.memory(setup, rank)
        # A bucket may have been taken by a larger one's place.
        buffers = used._buckets._buffers.values() if transport == "nccl" else ()
        buckets = [buffer.nbytes for buffer in buffers]
        others = [n for what, n in counted.on_device if not what.startswith("a bucket of")]
        # The bytes by which states are aligned, and what the backward pass has made.
        aligned = sum(group.states.block.nbytes - group.nbytes for group in groups)
        assert aligned < 128 * 4 * len(setup.groups)
        assert held["total"] - held["gradients"] == sum(buckets) + sum(others) - aligned
        # Ranks are threads here, which have no exchange over MPI.
        limit = demand.piece_bytes(setup)
        exchanges = sum(demand._exchange(setup, limit, group.dtype) for group in setup.groups)
        there = 0 if transport == "nccl" or world_size == 1 else exchanges
        assert held["host_buffers"] - there == sum(nbytes for _, nbytes in counted.on_host)
        assert bool(counted.on_host) == bool(there)
        assert_sends(optimizer, demand.sent(setup, rank))


# ChainerMN


@pytest.mark.parametrize("name", ["SMORMS3", "Adam"])
@pytest.mark.parametrize("fp32_update", [False, True])
def test_the_states_of_chainermn_are_those_of_chainer(name: str, fp32_update: bool) -> None:
    link = models.Model(dtypes=MIXED)
    setup = Setup(specs_of(link), 4, optimizer=name, transport="host", fp32_update=fp32_update)
    make = getattr(chainer.optimizers, name)
    models.train_with_chainer(link, 1, STEPS, lambda each: configure(each, setup), make=make)
    held = demand.chainermn_memory(setup)
    states = [state for param in link.params() for state in param.update_rule.state.values()]
    masters = [param.update_rule._fp32_param for param in link.params()]
    assert held["states"] == sum(state.nbytes for state in states if state is not None)
    assert held["masters"] == sum(master.array.nbytes for master in masters if master is not None)
    assert held["parameters"] == sum(param.array.nbytes for param in link.params())
    assert held["gradients"] == sum(param.grad.nbytes for param in link.params())
    assert held["gradients"] == demand.memory(setup)["gradients"]


def test_the_buffers_of_chainermn() -> None:
    for transport, dtype, expected in (
        # Two of gradients as they are sent, and what its broadcast has taken.
        ("nccl", "float32", 3 * 4_000),
        ("nccl", "float16", 3 * 2_000),
        ("cuda-aware", "float16", 2 * 4_000),
        ("staged", "float32", 2 * 4_000),
        ("host", "float32", 0),
        # The largest in float32.
        ("host", "float16", 4 * 700),
    ):
        specs = (ParameterSpec("/a", (300,), dtype), ParameterSpec("/b", (700,), dtype))
        setup = Setup(specs, 8, transport=transport)
        assert demand.chainermn_memory(setup)["buffers"] == expected, (transport, dtype)


def test_chainermn_sends_twice_the_gradients_in_a_ring() -> None:
    for expected, ranks, dtype, how in (
        (2 * 3 * 4000 // 4, 4, "float32", {}),
        (0, 1, "float32", {}),
        (3000, 4, "float32", {"communication_dtype": "float16"}),
        (6000, 4, "float16", {"transport": "host"}),
    ):
        assert demand.chainermn_sent(simple(1000, dtype, ranks, **how))["total"] == expected


# How many ranks


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_smallest_world_size_is_found(transport: str) -> None:
    sharing = {"share_parameters": True, "ranks_per_node": 100}
    for how in ({}, {"hooks": True}, {"double_buffering": True}):
        setup = simple(50_000_000, transport=transport, **how)
        tried = (dataclasses.replace(setup, ranks=ranks) for ranks in range(1, 80))
        totals = [demand.memory(each)["total"] for each in tried]
        for limit in range(min(totals), totals[0] + 1, (totals[0] - min(totals)) // 37):
            fitting = next(ranks for ranks, total in enumerate(totals, 1) if total <= limit)
            assert demand.smallest_ranks(setup, limit) == fitting
        assert demand.smallest_ranks(setup, totals[0]) == 1
        # Parameters and gradients fit on no number of ranks if not on one.
        assert demand.smallest_ranks(setup, 2 * 4 * 50_000_000 - 1) is None
    if transport == "host":
        # Nor if there is nearly room for these alone.
        assert demand.smallest_ranks(setup, 2 * 4 * 50_000_000 + 1000) is None
        setup = simple(50_000_000, transport=transport, **sharing)
        totals = [demand.memory(dataclasses.replace(setup, ranks=n))["total"] for n in (1, 2, 3, 4)]
        assert [demand.smallest_ranks(setup, total) for total in totals] == [1, 2, 3, 4]
        assert demand.smallest_ranks(setup, 4 * 50_000_000 + 4 * 500_000 - 1) is None


@pytest.mark.parametrize("host_of", [[0, 0, 0], [0, 0, 1]])
def test_parameters_that_ranks_share_are_there_once_a_node_and_enter_it_once(
    host_of: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadCollectives, "host_of", host_of)
    setup = dataclasses.replace(
        Setup(specs_of(models.Model(dtypes=MIXED)), 3, transport="host", share_parameters=True),
        ranks_per_node=host_of.count(0),
    )

    def run(collectives: ThreadCollectives) -> Any:
        link = models.Model(dtypes=MIXED)
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, share_parameters=True
        ).setup(link)
        optimizer.update()
        collectives.bytes_sent.clear()
        models.train(optimizer, collectives.rank, range(1))
        return optimizer

    for rank, optimizer in enumerate(run_ranks(3, run)):
        assert optimizer.sharded_model.shares
        flats = sum(group.buffers.flat.nbytes for group in optimizer.sharded_model.groups)
        assert demand.memory(setup)["parameters"] == -(-flats // host_of.count(0))
        sent = optimizer.collectives.bytes_sent["all_gather"]
        assert demand.sent(setup, rank)["all_gather"] == sent
