"""The step as it runs on GPUs, on the host: the real kernel source, NCCL and CuPy by stand-ins.

Everything between `ShardedOptimizer` and the hardware is what a GPU executes: layouts that are not
dense, tables, launches, packing, buckets. Arrays are NumPy's, and so is the reference.
"""

from __future__ import annotations

import copy
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

from smorms3_dist import StepMeter, create_multi_node_optimizer, load_checkpoint, save_checkpoint
from smorms3_dist.collectives import connect as collectives
from smorms3_dist.collectives.beside import OnStream
from smorms3_dist.collectives.nccl import NcclCollectives
from smorms3_dist.collectives.through_host import ThroughHostCollectives
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.kernels.cuda import KernelError
from smorms3_dist.sharding import group as groups
from smorms3_dist.sharding import model
from smorms3_dist.step.step import Step
from smorms3_dist.step.way import Way

import chainer
import fake_cupy
import fake_streams
import models
import numpy as np
import pytest
from chainer import optimizer_hooks, serializers
from chainer.optimizers.sgd import SGDRule
from rank_threads import ThreadCollectives, run_ranks
from rule_variants import VARIANTS

set_on_host = models.set_gradients

STEPS = range(1, 6)
FLOATS = "float, float, float", "double, double, double"
MODES = ["sharded", "replicated"]
TRANSPORTS = {"nccl": NcclCollectives, "staged": ThroughHostCollectives}
WITHOUT_NCCL = {"nccl": None, "staged": "the test wants so"}


def set_gradients_on_gpu(link: chainer.Link, rank: int, step: int) -> None:
    for name, param in link.namedparams(include_uninit=False):
        grad = models.gradient(name, param, rank, step)
        param.grad = np.asarray(grad).view(fake_cupy.DeviceArray)


@pytest.fixture(params=TRANSPORTS)
def gpu(request: Any, host_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> CudaMemory:
    """Makes models take the way of GPUs, over one or the other transport."""
    cupy = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(fake_cupy, "STRICT", True)
    memory = CudaMemory(0, cupy, host_launcher)
    monkeypatch.setattr(models, "set_gradients", set_gradients_on_gpu)
    monkeypatch.setattr(model, "memory_of", lambda device, exact: memory)
    monkeypatch.setattr(collectives, "_without_nccl", lambda *_: WITHOUT_NCCL[request.param])
    # Several buckets, some of them without parameters of some ranks.
    monkeypatch.setattr(CudaMemory, "bucket_bytes", 30_000)
    memory.transport = TRANSPORTS[request.param]  # type: ignore[attr-defined]
    return memory


def on_gpu(make_model: Callable[[], chainer.Link]) -> Callable[[], chainer.Link]:
    """Makes models whose arrays are of the stand-in for CuPy from the beginning."""

    def make() -> chainer.Link:
        link = make_model()
        for param in link.params():
            param.array = np.asarray(param.array).view(fake_cupy.DeviceArray)
        link.cleargrads()
        return link

    return make


def assert_equals_chainer(
    gpu: Any,
    world_size: int,
    gradients: str,
    configure: Callable[[Any], None] = lambda optimizer: None,
    make: Any = chainer.optimizers.SMORMS3,
    make_model: Callable[[], chainer.Link] = models.Model,
) -> list[Any]:
    theirs = make_model()
    models.train_with_chainer(theirs, world_size, STEPS, configure, make=make)
    ours = models.train_sharded(
        world_size, on_gpu(make_model), STEPS, configure, gradients, make=make
    )
    for optimizer in ours:
        assert optimizer.gradient_mode == gradients
        assert type(optimizer.collectives) is gpu.transport
        assert not optimizer.layout.groups[0].dense
        for param in optimizer.target.params():
            assert isinstance(param.array, fake_cupy.DeviceArray)
    models.assert_same_training(ours, theirs)
    return ours


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


def hooked(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))
    optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))
    optimizer.add_hook(optimizer_hooks.GradientLARS())
    optimizer.target.g.update_rule.add_hook(optimizer_hooks.Lasso(0.01))


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
    assert not optimizer.collectives._buffers
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


def decay(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))


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


def train_on_gpu(world_size: int, configure: Callable[[Any], None]) -> list[Any]:
    return models.train_sharded(world_size, on_gpu(models.Model), STEPS, configure)


@pytest.mark.parametrize("world_size", [1, 3])
def test_snapshots_of_shards_and_of_whole_states(gpu: Any, world_size: int) -> None:
    expected = train_on_gpu(world_size, decay)

    def run(comm: ThreadCollectives) -> Any:
        link = on_gpu(models.Model)()
        optimizer = models.optimizer_for(link, comm)
        decay(optimizer)
        optimizer.update()
        models.train(optimizer, comm.rank, range(1, 4))
        shard = serializers.npz.serialize(optimizer)
        optimizer.consolidate()
        whole = comm.all_gather_object(
            serializers.npz.serialize(optimizer) if comm.rank == 0 else None
        )[0]
        for saved in (shard, whole):
            assert not any(isinstance(value, fake_cupy.DeviceArray) for value in saved.values())
            twin = on_gpu(models.Model)()
            for name, param in link.namedparams():
                dict(twin.namedparams())[name].array[...] = param.array
            other = models.optimizer_for(twin, comm)
            decay(other)
            serializers.NpzDeserializer(saved).load(other)
            models.train(other, comm.rank, range(4, 6))
            assert other.t == 5
            models.assert_same_bits(twin, expected[0].target)

    run_ranks(world_size, run)


@pytest.mark.parametrize("world_size", [1, 3])
def test_checkpoints_go_to_hosts_and_back(
    gpu: Any, world_size: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = train_on_gpu(world_size, decay)

    def save(comm: ThreadCollectives) -> None:
        optimizer = saved[comm.rank]
        optimizer.communicator = comm
        save_checkpoint(tmp_path, optimizer)

    def load(comm: ThreadCollectives, make_model: Callable[[], chainer.Link]) -> Any:
        optimizer = models.optimizer_for(make_model(), comm)
        load_checkpoint(tmp_path, optimizer)
        return optimizer

    run_ranks(world_size, save)
    loaded = run_ranks(2, lambda comm: load(comm, on_gpu(models.Model)))
    monkeypatch.undo()
    loaded_on_host = run_ranks(2, lambda comm: load(comm, models.Model))
    states = models.gathered_states(saved)
    for ours in (loaded, loaded_on_host):
        models.assert_same_bits(ours[0].target, saved[0].target)
        for name, theirs in states.items():
            for key, values in theirs.items():
                assert models.bits(models.gathered_states(ours)[name][key]) == models.bits(values)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_compared_and_repaired_on_the_gpu(gpu: Any, world_size: int) -> None:
    dtypes = {"a": "float16", "c": "float64"}

    def run(comm: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm)
        optimizer.setup(on_gpu(lambda: models.Model(dtypes=dtypes))()).use_fp32_update()
        for step in range(3):
            models.set_gradients(optimizer.target, comm.rank, step)
            optimizer.update()
            optimizer.check_sync()
        if comm.rank == 0:
            for param in optimizer.target.params():
                param.array[...] = np.asarray(0.25, param.dtype).view(fake_cupy.DeviceArray)
        with pytest.raises(RuntimeError, match="/a, float16 of shape"):
            optimizer.check_sync()
        optimizer.check_sync(repair=True)
        optimizer.check_sync()
        optimizer.lr = 0.0
        models.set_gradients(optimizer.target, comm.rank, 3)
        optimizer.update()
        optimizer.check_sync()
        for param in optimizer.target.params():
            assert (np.asarray(param.array) == 0.25).all()

    run_ranks(world_size, run)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_that_are_not_finite_are_named_on_the_gpu(gpu: Any, world_size: int) -> None:
    dtypes = {"a": "float16", "c": "float64"}

    def run(comm: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), comm, check_finite="error"
        ).setup(on_gpu(lambda: models.Model(dtypes=dtypes))())
        optimizer.update()
        for name in ("g", "a", "c"):
            models.set_gradients(optimizer.target, comm.rank, 1)
            optimizer.update()
            t, before = optimizer.t, optimizer.target.g.array.tobytes()
            models.set_gradients(optimizer.target, comm.rank, 2)
            if comm.rank == comm.size - 1:
                getattr(optimizer.target, name).grad.reshape(-1).view(np.ndarray)[-1] = np.nan
            with pytest.raises(RuntimeError, match=f"that of /{name} on rank {comm.size - 1} "):
                optimizer.update()
            assert optimizer.t == t and optimizer.target.g.array.tobytes() == before

    run_ranks(world_size, run)


@pytest.mark.parametrize("double_buffering", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_model_may_be_on_another_gpu_than_the_current_one(
    gpu: Any,
    world_size: int,
    double_buffering: bool,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cupy = sys.modules["cupy"]
    elsewhere = CudaMemory(1, cupy, gpu.launcher)
    monkeypatch.setattr(model, "memory_of", lambda device, exact: elsewhere)
    set_gradients = models.set_gradients

    def set_gradients_there(link: chainer.Link, rank: int, step: int) -> None:
        with fake_cupy.Device(1):
            set_gradients(link, rank, step)

    def make_model() -> chainer.Link:
        with fake_cupy.Device(1):
            return on_gpu(models.Model)()

    monkeypatch.setattr(models, "set_gradients", set_gradients_there)

    def body(optimizer: Any, rank: int) -> None:
        hooked(optimizer)
        for step in range(4):
            models.set_gradients(optimizer.target, rank, step)
            optimizer.update()
            optimizer.check_sync()
        for group in optimizer.sharded_model.groups:
            assert group.buffers.flat.device_id == 1
            assert {state.device_id for state in group.states.values()} == {1}
        optimizer.consolidate()
        serializers.npz.serialize(optimizer)
        saved_on: list[int] = []

        def after_save(step: int, path: pathlib.Path) -> None:
            saved_on.append(fake_cupy.Device.current())

        options: Any = {"objects": {}, "asynchronous": True, "after_save": after_save}
        save_checkpoint(tmp_path, optimizer, **options).wait()
        drawn = draw_there()
        models.set_gradients(optimizer.target, rank, 4)
        optimizer.update()
        load_checkpoint(tmp_path, optimizer)
        if world_size == 1:
            assert draw_there() == drawn and saved_on == [1]
        copied = copy.deepcopy(optimizer).sharded_model
        assert {group.buffers.flat.device_id for group in copied.groups} == {1}
        optimizer.update()
        assert (optimizer.in_flight is not None) is double_buffering
        optimizer.setup(optimizer.target)
        assert fake_cupy.Device.current() == 0

    def draw_there() -> int:
        with fake_cupy.Device(1):
            return cupy.random.randint(0, 1000)

    fake_cupy.Device.used.clear()
    options = {"double_buffering": double_buffering, "gradients": "sharded"}
    models.on_ranks(world_size, body, make_model=make_model, **options)
    assert fake_cupy.Device.used == {1}


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_agree_while_the_gpu_still_computes_gradients(
    gpu: Any, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: dict[int, list[int]] = {rank: [] for rank in range(world_size)}
    exchange = ThreadCollectives.exchange_word

    def note(self: ThreadCollectives, word: int) -> int:
        computed[self.rank].append(fake_streams.current()._done)
        return exchange(self, word)

    monkeypatch.setattr(ThreadCollectives, "exchange_word", note)

    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, [0, 1])
        models.set_gradients(optimizer.target, rank, 2)
        with fake_streams.Stream() as compute:
            for param in optimizer.target.params():
                np.multiply(param.grad, param.grad, out=param.grad)
            computed[rank].clear()
            optimizer.update()
            assert computed[rank] == [0]
            compute.synchronize()

    make_model = on_gpu(models.Model)
    ours = models.on_ranks(world_size, lambda o, r: (body(o, r), o)[1], make_model=make_model)
    models.assert_same_bits(ours[0].target, ours[-1].target)


@pytest.mark.parametrize("gradients", MODES)
def test_phases_are_timed_by_events_that_nobody_waits_for(gpu: CudaMemory, gradients: str) -> None:
    def body(optimizer: Any, rank: int) -> tuple[dict[str, float], list[float]]:
        meter = StepMeter(optimizer)
        optimizer.update()
        meter.read()
        before = optimizer.phases.settle()
        models.train(optimizer, rank, STEPS)
        return meter.read(), before

    for found, before in models.on_ranks(
        2, body, make_model=on_gpu(models.Model), gradients=gradients
    ):
        assert found["smorms3/gpu_bytes"] == fake_cupy.POOL_BYTES
        for phase in ("compute", "agree", "reduce", "update", "gather"):
            assert found[f"smorms3/{phase}_s"] > 0, phase
        assert found["smorms3/layout_s"] == 0 < before[2]


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_gradients_in_flight_are_reduced_on_a_stream_of_their_own(
    gpu: Any, world_size: int, gradients: str
) -> None:
    """Late as streams are here, an update that did not wait for them would see none."""

    def train(comm: ThreadCollectives, late: bool) -> Any:
        optimizer = models.optimizer_for(
            on_gpu(models.Model)(), comm, gradients=gradients, double_buffering=late
        )
        decay(optimizer)
        models.train(optimizer, comm.rank, [0])
        for step in range(1, 6 + late):
            models.train(optimizer, comm.rank, [step])
            if late:
                assert isinstance(optimizer.collectives, gpu.transport)
                on_stream = isinstance(optimizer._in_flight._channel, OnStream)
                assert on_stream == (gpu.transport is NcclCollectives)
        return optimizer

    late, other = (
        run_ranks(world_size, lambda comm, late=late: train(comm, late)) for late in (True, False)
    )
    for ours, theirs in zip(late, other, strict=True):
        assert ours.t == theirs.t == 5
        models.assert_same_bits(ours.target, theirs.target)
