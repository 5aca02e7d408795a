"""The step as it runs on GPUs, on the host: the real kernel source, NCCL and CuPy by stand-ins.

Everything between `ShardedOptimizer` and the hardware is what a GPU executes: layouts that are not
dense, tables, launches, packing, buckets. Arrays are NumPy's, and so is the reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

from smorms3_dist.collectives.nccl import NcclCollectives
from smorms3_dist.collectives.nccl_waiting import NcclError
from smorms3_dist.collectives.through_host import ThroughHostCollectives
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.kernels.cuda import KernelError
from smorms3_dist.sharding import group as groups
from smorms3_dist.step.step import Step
from smorms3_dist.step.way import Way

import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks
from chainer.optimizers.sgd import SGDRule
from rule_variants import VARIANTS
from stand_in_gpu import (
    FLOATS,
    MODES,
    STEPS,
    assert_equals_chainer,
    decay,
    hooked,
    on_gpu,
    set_on_host,
)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_the_fused_update(gpu: CudaMemory, world_size: int, gradients: str) -> None:
    ours = assert_equals_chainer(gpu, world_size, gradients)
    assert len(ours[0].layout.groups[0].buckets) > 1


def scaled_with_hyperparameters_of_its_own(optimizer: Any) -> None:
    optimizer.set_loss_scale(96.0)
    for param in optimizer.target.params():
        param._loss_scale = 96.0
    optimizer.target.a.update_rule.hyperparam.lr = 0.1
    optimizer.target.g.update_rule.hyperparam.eps = 1e-3


def scaled_with_a_rate_of_its_own(optimizer: Any) -> None:
    optimizer.set_loss_scale(96.0)
    for param in optimizer.target.params():
        param._loss_scale = 96.0
    of_one = optimizer.target.g.update_rule.hyperparam
    name = next(name for name in ("lr", "alpha", "rho") if name in vars(optimizer.hyperparam))
    setattr(of_one, name, 0.6 * getattr(optimizer.hyperparam, name))


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("configure", [scaled_with_hyperparameters_of_its_own, hooked])
def test_scales_hyperparameters_and_hooks(
    gpu: CudaMemory, configure: Any, world_size: int, gradients: str
) -> None:
    assert_equals_chainer(gpu, world_size, gradients, configure)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fp32_masters(gpu: Any, world_size: int, gradients: str) -> None:
    if gpu.transport is NcclCollectives and world_size > 1:
        pytest.skip("NCCL sums float16 in float16, ChainerMN in float32")
    assert_equals_chainer(
        gpu,
        world_size,
        gradients,
        lambda optimizer: optimizer.use_fp32_update(),
        make_model=lambda: models.Model(dtypes={"a": "float16", "g": "float16"}),
    )


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("kind", [chainer.optimizers.Adam, chainer.optimizers.MSVAG])
def test_other_rules_with_hooks(gpu: CudaMemory, kind: Any, gradients: str) -> None:
    assert_equals_chainer(gpu, 2, gradients, hooked, make=kind)


# One without axes Chainer computes in float64, with NumPy 1.
SHAPES = {name: shape for name, shape in models.SHAPES.items() if shape}


@pytest.mark.parametrize("gpu", ["nccl"], indirect=True)
@pytest.mark.parametrize("rule", VARIANTS)
def test_every_rule_of_chainers_is_launched_and_loaded_beforehand(
    gpu: Any, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages_nothing(monkeypatch)

    def fail(*_: Any) -> None:
        raise AssertionError("the rule's own code runs")

    monkeypatch.setattr(groups, "run_rule", fail)

    def configure(optimizer: Any) -> None:
        scaled_with_a_rate_of_its_own(optimizer)
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))
        optimizer.target.g.update_rule.add_hook(optimizer_hooks.WeightDecay(0.02))
        optimizer.use_fp32_update()

    loaded, launches = gpu.launcher.loaded, gpu.launcher.launches
    loaded.clear()
    before = len(launches)
    assert_equals_chainer(
        gpu,
        # Sums of float16 are NCCL's with more.
        1,
        "sharded",
        configure,
        VARIANTS[rule],
        lambda: models.Model(SHAPES, {"a": "float16", "c": "float64"}),
    )
    launched = set(launches[before:])
    assert launched <= loaded
    (formula,) = {name.split("<")[1].split(",")[0] for name in launched if "update<" in name}
    updates = {f"update<{formula}, {types}>" for types in ("Half, Half, float", *FLOATS)}
    assert launched >= updates


class CountedRule(chainer.UpdateRule):
    """A user's own: a state that begins as the parameter, an array replaced, a count, a gradient
    that is written to."""

    is_elementwise = True
    calls: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.power = 1.0

    def init_state(self, param: Any) -> None:
        self.state["start"] = param.array.copy()

    def update_core_cpu(self, param: Any) -> None:
        self.power *= 0.5
        if param.array.size:
            self.calls.append(param.array.size)
        param.grad *= np.float32(self.power)
        param.grad += np.float32(0.125) * (param.array - self.state["start"])
        array = param.array.copy()
        array -= param.grad
        param.array = array


class NameReadingRule(CountedRule):
    def update_core_cpu(self, param: Any) -> None:
        assert param.name != "of another link"
        super().update_core_cpu(param)


class Regretting(CountedRule):
    """Has an attribute that is no value."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []


@pytest.mark.parametrize("gpu", ["nccl"], indirect=True)
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("rule", [CountedRule, NameReadingRule, Regretting])
def test_own_code_of_a_rule_runs_on_neighbours_at_once(
    gpu: CudaMemory, rule: Any, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaMemory, "bucket_bytes", 1 << 26)
    sizes = {"a": (3, 5), "b": (1,), "c": (7,), "d": (9,), "e": (33, 2), "f": (0, 4), "g": (50, 61)}
    shapes = {**sizes, "h": models.SHAPES["d"], "i": (40,), "j": (32,)}

    def configure(optimizer: Any) -> None:
        optimizer.target.c.update_rule.power = 2.0
        optimizer.target.d.update_rule.enabled = False
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))

    def make() -> Any:
        return models.OwnOptimizer(rule)

    def make_model() -> Any:
        return models.Model(shapes)

    theirs = make_model()
    models.train_with_chainer(theirs, world_size, STEPS, configure, make=make)
    rule.calls = []
    ours = models.train_sharded(
        world_size, on_gpu(make_model), STEPS, configure, "sharded", make=make
    )
    models.assert_same_training(ours, theirs)
    for optimizer in ours:
        powers = [param.update_rule.power for _, param in sorted(optimizer.target.namedparams())]
        assert powers == [2 * 0.5**5 if i == 2 else 1 if i == 3 else 0.5**5 for i in range(10)]
    calls, rest = divmod(len(rule.calls), len(STEPS))
    if world_size == 3:
        # Two cuts more.
        calls = min(calls, 8) if rule is not CountedRule else calls - 2
    assert rest == 0
    # a and b, c, e and g, h if it is without axes, i and j; or each by itself.
    assert calls == (8 if rule is not CountedRule else 3 if shapes["h"] else 5)


def test_a_tied_parameter_is_updated_once_a_path(gpu: CudaMemory) -> None:
    theirs = models.Tied()
    models.train_with_chainer(theirs, 2, STEPS)
    for optimizer in models.train_sharded(2, on_gpu(models.Tied), STEPS, gradients="sharded"):
        models.assert_same_bits(optimizer.target, theirs)


def test_a_step_is_one_launch_a_bucket_and_tables_go_to_the_gpu_once(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu.transport is ThroughHostCollectives:
        pytest.skip("pieces, not buckets, go through host memory")
    monkeypatch.setattr(CudaMemory, "bucket_bytes", 1 << 26)
    (optimizer,) = models.train_sharded(1, on_gpu(models.Model), [1], gradients="sharded")
    launcher = gpu.launcher
    launches, uploads = len(launcher.launches), launcher.uploads
    for step in (2, 3):
        models.set_gradients(optimizer.target, 0, step)
        optimizer.update()
    # Gradients are read where they lie, which is another matter at each step: one small table.
    assert [name.partition("<")[0] for name in launcher.launches[launches:]] == ["update"] * 2
    assert launcher.uploads - uploads <= 2
    assert not optimizer.collectives._buckets._buffers
    models.set_gradients(optimizer.target, 0, 4)
    optimizer.target.a.cleargrad()
    optimizer.update()
    assert [name.partition("<")[0] for name in launcher.launches[launches + 2 :]] == [
        "pack",
        "update",
    ]


def test_whole_gradients_are_read_where_they_lie_too(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaMemory, "bucket_bytes", 1 << 26)
    for ranks in (1, 2):
        launches = len(gpu.launcher.launches)
        models.train_sharded(ranks, on_gpu(models.Model), [1, 2, 3], gradients="replicated")
        names = [name.partition("<")[0] for name in gpu.launcher.launches[launches:]]
        assert names.count("update") == 3 * ranks


def stages_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a step fail that would call hooks, or keep gradients for them."""

    def fail(*_: Any) -> None:
        raise AssertionError("the step is staged")

    monkeypatch.setattr(Step, "_make_staged", fail)


@pytest.mark.parametrize("scale", [None, 96.0])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weight_decay_is_part_of_the_update(
    gpu: Any, world_size: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages_nothing(monkeypatch)

    def configure(optimizer: Any) -> None:
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))
        optimizer.target.g.update_rule.add_hook(optimizer_hooks.WeightDecay(0.01))
        if scale is not None:
            optimizer.set_loss_scale(scale)
            for param in optimizer.target.params():
                param._loss_scale = scale

    ours = assert_equals_chainer(gpu, world_size, "sharded", configure)
    with pytest.raises(RuntimeError, match="no mean gradients to gather"):
        ours[0].gather_gradients()


@pytest.mark.parametrize("threshold", [0.5, 1e9])
@pytest.mark.parametrize("world_size", [1, 3])
def test_gradients_are_clipped_by_a_factor_that_stays_on_the_gpu(
    gpu: Any, world_size: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages_nothing(monkeypatch)

    def configure(optimizer: Any) -> None:
        optimizer.add_hook(optimizer_hooks.GradientClipping(threshold))
        decay(optimizer)

    dtypes = {"a": "float64", "c": "float16"}

    def make_model() -> models.Model:
        return models.Model(dtypes=dtypes)

    theirs, unclipped = make_model(), make_model()
    models.train_with_chainer(theirs, world_size, STEPS, configure)
    models.train_with_chainer(unclipped, world_size, STEPS, decay)
    assert np.allclose(theirs.g.array, unclipped.g.array, 1e-4, 1e-4) == (threshold > 1)
    ours = models.train_sharded(world_size, on_gpu(make_model), STEPS, configure)
    expected = models.arrays(theirs)
    for optimizer in ours:
        for name, array in models.arrays(optimizer.target).items():
            # The norm is summed in float64; Chainer's in the dtype of the parameters.
            error = 4e-3 if array.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(array, expected[name], rtol=error, atol=error)


def test_exact_kernels_clip_as_chainer_does_to_the_bit(gpu: Any) -> None:
    gpu.exact = True

    def configure(optimizer: Any) -> None:
        optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))

    assert_equals_chainer(gpu, 2, "sharded", configure)


@pytest.mark.filterwarnings("ignore:the mean gradient of /g is not finite")
@pytest.mark.parametrize(
    ("world_size", "kind"),
    # The rule of MSVAG counts in another way, too.
    [
        (1, chainer.optimizers.SMORMS3),
        (3, chainer.optimizers.SMORMS3),
        (2, chainer.optimizers.MSVAG),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_by_the_gpu(
    gpu: Any, world_size: int, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages_nothing(monkeypatch)

    def configure(optimizer: Any) -> None:
        optimizer.loss_scaling(interval=2)
        decay(optimizer)

    def set_gradients(link: chainer.Link, rank: int, step: int, scale: float) -> None:
        models.set_gradients(link, rank, step)
        for param in link.params():
            param.grad *= np.float32(scale)
            param._loss_scale = scale
        if step in (2, 5) and rank == world_size - 1:
            link.g.grad[7, 3] = np.inf if step == 2 else np.nan

    theirs = models.Model(SHAPES)
    plain = kind().setup(theirs)
    configure(plain)
    expected = []
    for step in STEPS:
        ranks = []
        for rank in range(world_size):
            set_gradients(theirs, rank, step, plain._loss_scale)
            ranks.append({name: param.grad.copy() for name, param in theirs.namedparams()})
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            for name, param in theirs.namedparams():
                param.grad = np.asarray(models.mean_gradient([grads[name] for grads in ranks]))
            plain.update()
        expected.append((plain.t, theirs.g.update_rule.t, plain._loss_scale))

    def body(optimizer: Any, rank: int) -> None:
        configure(optimizer)
        optimizer.update()
        trace = []
        for step in STEPS:
            set_gradients(optimizer.target, rank, step, optimizer._loss_scale)
            optimizer.update()
            trace.append((optimizer.t, optimizer.target.g.update_rule.t, optimizer._loss_scale))
        assert trace == expected
        models.assert_same_bits(optimizer.target, theirs)

    models.on_ranks(world_size, body, kind, on_gpu(lambda: models.Model(SHAPES)))
    assert expected[-1][:2] == (5, 3)


@pytest.mark.parametrize("gpu", ["nccl"], indirect=True)
def test_kernels_that_one_rank_cannot_compile_are_an_error_on_all_before_anything_is_reduced(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = groups.ShardedGroup.load_kernels
    broken = {1}

    def fail(self: Any) -> None:
        if self.shard.rank in broken:
            raise KernelError("NVRTC 13.0 cannot compile it")
        load(self)

    def body(optimizer: Any, rank: int) -> None:
        with pytest.raises(KernelError, match=r"^rank 1: NVRTC 13\.0 cannot compile it$"):
            optimizer.update()
        assert optimizer.t == 0
        optimizer.collectives.all_gather_object(None)
        broken.clear()
        optimizer.update()
        models.train(optimizer, rank, STEPS)

    monkeypatch.setattr(groups.ShardedGroup, "load_kernels", fail)
    models.on_ranks(2, body, make_model=on_gpu(models.Model))


@pytest.mark.filterwarnings("ignore:the mean gradient of /g is not finite", "ignore:Non finite")
def test_own_code_that_somebody_puts_into_a_rule_is_told_what_the_gpu_has_decided(
    gpu: Any,
) -> None:
    def train(optimizer: Any, mean: Callable[[chainer.Link, int], None]) -> None:
        optimizer.loss_scaling(interval=9)
        optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))
        for step in STEPS:
            mean(optimizer.target, step)
            for param in optimizer.target.params():
                param._loss_scale = optimizer._loss_scale
            if step == 3:
                optimizer.target.g.grad[7, 3] = np.inf
            with np.errstate(all="ignore"):
                optimizer.update()
            rule = optimizer.target.g.update_rule
            rule.update_core = lambda param: SGDRule(lr=0.5).update_core(param)

    theirs = models.Model()
    train(chainer.optimizers.SMORMS3().setup(theirs), lambda link, step: set_on_host(link, 0, step))

    def body(optimizer: Any, rank: int) -> None:
        optimizer.update()
        train(optimizer, lambda link, step: models.set_gradients(link, 0, step))
        assert optimizer._way is Way.CHECKED
        for name, array in models.arrays(optimizer.target).items():
            expected = models.arrays(theirs)[name]
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)

    models.on_ranks(1, body, make_model=on_gpu(models.Model))


def test_the_host_waits_for_the_flag_when_everything_has_been_launched(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (optimizer,) = models.train_sharded(
        1,
        on_gpu(models.Model),
        [1],
        lambda optimizer: (
            optimizer.loss_scaling(),
            optimizer.add_hook(optimizer_hooks.GradientClipping(0.5)),
        ),
    )
    launches, fetch = gpu.launcher.launches, gpu.launcher.fetch
    waited: list[int] = []

    def late(array: Any) -> Callable[[], np.ndarray]:
        wait = fetch(array)

        def waiting() -> np.ndarray:
            waited.append(len(launches))
            return wait()

        return waiting

    monkeypatch.setattr(gpu.launcher, "fetch", late, raising=False)
    before = len(launches)
    models.set_gradients(optimizer.target, 0, 2)
    optimizer.update()
    assert waited == [len(launches)]
    assert [name.partition("<")[0] for name in launches[before:]][-3:] == [
        "check",
        "finish_check",
        "update",
    ]


def hard_clipping() -> Any:
    return optimizer_hooks.GradientHardClipping(-0.5, 0.5)


HOST_READS = {
    # hooks and loss scale: what the host reads of the GPU in a step
    "the flag": lambda optimizer: optimizer.loss_scaling(),
    "norms": lambda optimizer: optimizer.add_hook(optimizer_hooks.GradientLARS()),
    "gradients": lambda optimizer: (optimizer.loss_scaling(), optimizer.add_hook(hard_clipping())),
}


@pytest.mark.parametrize("gpu", ["nccl"], indirect=True)
@pytest.mark.parametrize("what", HOST_READS)
def test_what_the_host_reads_after_collectives_is_waited_for_in_bounded_time(
    gpu: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(optimizer: Any, rank: int) -> None:
        HOST_READS[what](optimizer)
        optimizer.update()
        models.set_gradients(optimizer.target, rank, 1)
        # The first step waits for none before it.
        optimizer.collectives._link.comm.error = 6
        told = f"rank {rank}: a collective on the GPU failed: NCCL_ERROR_6"
        with pytest.raises(NcclError, match=told):
            optimizer.update()

    models.on_ranks(2, body, make_model=on_gpu(models.Model))
