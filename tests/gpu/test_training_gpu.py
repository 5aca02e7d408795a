"""Trainings on a real GPU, compared with Chainer's own there and with the CPU."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import smorms3_dist

import chainer
import gpu_training as training
import models
import mpirun
import numpy as np
import pytest
from chainer import optimizer_hooks
from rank_threads import Meeting, ThreadCollectives

pytestmark = pytest.mark.gpu

MODES = ["sharded", "replicated"]
RULES = ("SGD", "MomentumSGD", "Adam", "AMSGrad", "MSVAG", "AdaDelta", "RMSprop", "RMSpropGraves")


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Any:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"there is no GPU: {error}")
    assert count
    return cupy


def alone() -> ThreadCollectives:
    return ThreadCollectives(0, Meeting(1, 60.0))


def trained(
    make: Any = chainer.optimizers.SMORMS3,
    configure: Any = lambda optimizer: None,
    *,
    theirs_on: str = "@cupy:0",
    dtypes: dict[str, str] | None = None,
    **options: Any,
) -> tuple[chainer.Link, chainer.Link]:
    """The same training by the package on the GPU and by Chainer; both models on the host."""
    theirs = training.move(models.Model(dtypes=dtypes), theirs_on)
    ours = training.move(models.Model(dtypes=dtypes), "@cupy:0")
    models.train_with_chainer(theirs, 1, training.STEPS, configure, make)
    training.train_sharded(ours, alone(), make, configure, **options)
    return training.move(ours, "@numpy"), training.move(theirs, "@numpy")


def scaled_by_64(optimizer: Any) -> None:
    optimizer.set_loss_scale(64.0)
    for param in optimizer.target.params():
        param._loss_scale = 64.0


@pytest.mark.parametrize("gradients", MODES)
def test_exact_kernels_give_the_bits_of_the_cpu_and_others_chainers_to_rounding(
    gradients: str,
) -> None:
    models.assert_same_bits(*trained(theirs_on="@numpy", gradients=gradients, exact=True))
    assert training.relative(*trained(gradients=gradients)) < 1e-6


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("kind", RULES)
def test_exact_kernels_of_other_rules_do_so_too(kind: str, gradients: str) -> None:
    make = getattr(chainer.optimizers, kind)
    models.assert_same_bits(*trained(make, theirs_on="@numpy", gradients=gradients, exact=True))


def test_in_float16_other_rules_run_chainers_kernels_on_segments() -> None:
    dtypes = dict.fromkeys(models.SHAPES, "float16")
    models.assert_same_bits(*trained(chainer.optimizers.Adam, dtypes=dtypes))


def test_fp32_masters_and_a_loss_scale() -> None:
    def configure(optimizer: Any) -> None:
        optimizer.use_fp32_update()
        scaled_by_64(optimizer)

    half = {"a": "float16", "g": "float16"}
    options = {"theirs_on": "@numpy", "dtypes": half, "exact": True}
    models.assert_same_bits(*trained(configure=configure, **options))


@pytest.mark.parametrize("gradients", MODES)
def test_hooks(gradients: str) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))
        optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))
        optimizer.add_hook(optimizer_hooks.GradientLARS())
        optimizer.add_hook(optimizer_hooks.GradientHardClipping(-0.5, 0.5))
        optimizer.target.g.update_rule.add_hook(optimizer_hooks.Lasso(0.01))

    assert training.relative(*trained(configure=configure, gradients=gradients)) < 1e-5


@pytest.mark.parametrize("scaled", [False, True])
def test_hooks_that_the_update_carries_out_itself(scaled: bool) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))
        optimizer.target.g.update_rule.add_hook(optimizer_hooks.WeightDecay(0.01))
        if scaled:
            scaled_by_64(optimizer)

    assert training.relative(*trained(configure=configure, gradients="sharded")) < 1e-5


@pytest.mark.parametrize("gradients", MODES)
def test_gradients_in_flight_are_those_of_the_cpu(gradients: str) -> None:
    """They are reduced on a stream of their own, beside what the GPU does in between."""
    links = {device: training.move(models.Model(), device) for device in ("@numpy", "@cupy:0")}
    for link in links.values():
        options: Any = {"gradients": gradients, "exact": True, "double_buffering": True}
        optimizer = training.train_sharded(link, alone(), chainer.optimizers.SMORMS3, **options)
        assert optimizer.t == len(training.STEPS) - 1
        assert optimizer.in_flight.are_there
    models.assert_same_bits(training.move(links["@cupy:0"], "@numpy"), links["@numpy"])


def test_a_checkpoint_goes_to_the_host_and_back(tmp_path: pathlib.Path) -> None:
    make = chainer.optimizers.SMORMS3
    first = training.train_sharded(training.move(models.Model(), "@cupy:0"), alone(), make)
    smorms3_dist.save_checkpoint(tmp_path, first)
    for device in ("@numpy", "@cupy:0"):
        link = training.move(models.Model(), device)
        second = smorms3_dist.create_multi_node_optimizer(make(), alone()).setup(link)
        smorms3_dist.load_checkpoint(tmp_path, second)
        expected = models.gathered_states([first])
        for name, states in models.gathered_states([second]).items():
            for key, values in states.items():
                assert (values == expected[name][key]).all()
        for name, array in models.arrays(link).items():
            there = models.arrays(first.target)[name]
            assert (chainer.backends.cuda.to_cpu(array) == there.get()).all()


def test_whole_states_are_chainers_own() -> None:
    make = chainer.optimizers.SMORMS3
    ours = training.train_sharded(training.move(models.Model(), "@cupy:0"), alone(), make)
    saved = chainer.serializers.npz.serialize(ours)
    plain = make().setup(training.move(models.Model(), "@cupy:0"))
    chainer.serializers.NpzDeserializer(saved).load(plain)
    again = training.move(models.Model(), "@cupy:0")
    other = smorms3_dist.create_multi_node_optimizer(make(), alone()).setup(again)
    chainer.serializers.NpzDeserializer(saved).load(other)
    for optimizer in (plain, other):
        for name, param in ours.target.namedparams():
            dict(optimizer.target.namedparams())[name].array[...] = param.array
    for link, optimizer in ((plain.target, plain), (again, other)):
        models.set_gradients(link, 0, 9)
        optimizer.update()
    found, expected = (training.move(link, "@numpy") for link in (again, plain.target))
    assert training.relative(found, expected) < 1e-6


@pytest.mark.filterwarnings("ignore:the mean gradient of")
def test_dynamic_loss_scaling_skips_a_step() -> None:
    ours = training.move(models.Model(), "@cupy:0")
    make = chainer.optimizers.SMORMS3
    optimizer = training.train_sharded(
        ours, alone(), make, lambda optimizer: optimizer.loss_scaling(interval=10), [1]
    )
    before = {name: array.copy() for name, array in models.arrays(ours).items()}
    models.set_gradients(ours, 0, 2)
    ours.g.grad[0, 0] = np.inf
    optimizer.update()
    assert (optimizer.t, ours.g.update_rule.t) == (2, 1)
    for name, array in models.arrays(ours).items():
        assert (array == before[name]).all()


def test_states_are_on_the_gpu_and_no_larger_than_they_need_be(gpu: Any) -> None:
    ours = training.move(models.Model(), "@cupy:0")
    optimizer = training.train_sharded(ours, alone(), chainer.optimizers.SMORMS3)
    for update in optimizer.sharded_model.sharded_groups:
        assert all(isinstance(state, gpu.ndarray) for state in update.states.values())
    elements = sum(param.size for param in ours.params())
    padding = 32 * (len(list(ours.params())) + 1)
    assert 12 * elements <= optimizer.state_bytes() <= 12 * (elements + padding)


@pytest.mark.mpi
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_that_share_a_gpu_give_the_result_of_the_cpu_bit_for_bit(world_size: int) -> None:
    for values in mpirun.run_program(world_size, "gpu_ranks.py", limit=240):
        through_mpi = ("ThroughHostCollectives", "CudaAwareCollectives")
        assert world_size == 1 or values["collectives"] in through_mpi
        assert all(values["same_bits"].values()), values["same_bits"]


def test_phases_are_timed_by_events() -> None:
    """The phases of the device fill the time that the host has seen, to the last event."""
    ours = training.move(models.Model(), "@cupy:0")
    optimizer = training.train_sharded(ours, alone(), chainer.optimizers.SMORMS3)
    meter = smorms3_dist.StepMeter(optimizer)
    began = time.perf_counter()
    for step in training.STEPS:
        models.set_gradients(ours, 0, step)
        optimizer.update()
    found = meter.read()
    passed = time.perf_counter() - began
    assert 0 < found["smorms3/step_s"] * len(training.STEPS) <= passed + 0.01
    assert found["smorms3/update_s"] > 0 and found["smorms3/gpu_bytes"] > 0
