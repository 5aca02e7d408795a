"""docs/troubleshooting.md: every message that it has is made here, and it has every one."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import smorms3_dist
from smorms3_dist import cli

import chainer
import chainer.links as L
import numpy as np
import pages
import pytest
from chainer import training
from chainer.serializers import load_npz, save_npz
from rank_threads import ThreadCollectives, run_ranks


class Case(NamedTuple):
    path: Path
    patch: pytest.MonkeyPatch


Maker = Callable[[Case], object]


def optimizer_of(comm: Any, link: Any = None, setup: bool = True, **options: Any) -> Any:
    made = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm, **options)
    return made.setup(L.Linear(3, 4) if link is None else link) if setup else made


def step(optimizer: Any) -> Any:
    for param in optimizer.target.params():
        param.grad = np.ones_like(param.array)
    optimizer.update()
    return optimizer


def trained(comm: Any, **options: Any) -> Any:
    return step(step(optimizer_of(comm, **options)))


def trainer_of(optimizer: Any, path: Path) -> training.Trainer:
    data = chainer.datasets.TupleDataset(np.zeros((4, 3), "f"))
    iterator = chainer.iterators.SerialIterator(data, 2)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, (1, "iteration"), out=str(path))
    trainer._start_at = 0.0  # As if running.
    return trainer


def said_by(code: str, **environment: str) -> str:
    """What Python says of code, in a process without this package's patches."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | environment, capture_output=True, text=True
    )
    return done.stderr


OLD_NUMPY = "import collections, sys, numpy; numpy.sctypes = collections.defaultdict(list)\n"
LENT = "sys.modules['numpy.distutils.system_info'] = sys.modules['numpy.distutils'] = numpy\n"


def chainer_without(what: str, is_there: bool, code: str = "") -> Maker:
    def make(case: Case) -> str:
        if is_there:
            pytest.skip(f"{what} is here")
        return said_by(f"{code}import chainer")

    return make


def ranks_that_do_not_know_of_each_other(case: Case) -> str:
    code = "import smorms3_dist, chainer; from mpi4py import MPI\n" + (
        "smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), MPI.COMM_WORLD)"
    )
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return said_by(code, PMI_SIZE="2", PYTHONPATH=str(pages.ROOT), **as_root)


def slurm_without_srun(case: Case) -> None:
    script = case.path / "train.py"
    script.touch()
    case.patch.setenv("PATH", str(case.path))
    cli.main(["run", "--backend", "slurm", "-n", "2", str(script)])


def gpu_without_cupy(case: Case) -> None:
    case.patch.setitem(sys.modules, "cupy", None)
    run_ranks(2, smorms3_dist.use_gpu)


def integer_parameter(case: Case) -> None:
    link = chainer.Link()
    with link.init_scope():
        link.a = chainer.Parameter(np.ones(3, "i"))
    run_ranks(1, lambda comm: optimizer_of(comm, link))


def only_on_rank_0(do: Callable[[Any, Case], object], instead: bool = False) -> Maker:
    """Something that rank 0 does before a step of all, or instead of it."""

    def make(case: Case) -> None:
        def run(comm: ThreadCollectives) -> None:
            optimizer = trained(comm)
            if comm.rank == 0:
                do(optimizer, case)
            if comm.rank or not instead:
                step(optimizer)

        run_ranks(2, run)

    return make


def after(configure: Callable[[Any], object], **options: Any) -> Maker:
    """A step of one rank, after its optimizer has been configured."""

    def run(comm: ThreadCollectives) -> None:
        optimizer = optimizer_of(comm, **options)
        configure(optimizer)
        step(optimizer)

    return lambda case: run_ranks(1, run)


def two_optimizers(comm: ThreadCollectives) -> None:
    first = trained(comm)
    second = optimizer_of(comm)
    second.setup(first.target)
    step(second)
    step(first)


def add_whole_hook(optimizer: Any) -> None:
    optimizer.add_hook(lambda optimizer: None, name="mine")


class OddRule(chainer.optimizers.sgd.SGDRule):
    is_elementwise = False


def snapshot_of_one_rank(case: Case) -> None:
    extension = training.extensions.snapshot()
    run_ranks(2, lambda comm: extension(trainer_of(trained(comm), case.path)))


def snapshot_of_another_world_size(case: Case) -> None:
    run_ranks(2, lambda comm: save_npz(str(case.path / f"{comm.rank}"), trained(comm)))
    run_ranks(1, lambda comm: load_npz(str(case.path / "0"), optimizer_of(comm)))


def another_communicator(case: Case) -> None:
    optimizer = run_ranks(2, trained)[0]
    run_ranks(1, lambda comm: setattr(optimizer, "communicator", comm))


def checkpoint_without_a_directory(case: Case) -> None:
    case.patch.delenv("SMORMS3_CHECKPOINT_DIR", raising=False)
    smorms3_dist.ShardedCheckpoint()


def checkpoint_of_plain_chainer(case: Case) -> None:
    trainer = trainer_of(chainer.optimizers.SMORMS3().setup(L.Linear(3, 4)), case.path)
    smorms3_dist.ShardedCheckpoint(case.path).maybe_load(trainer)


def load(case: Case, link: Any = None) -> None:
    run_ranks(1, lambda comm: smorms3_dist.load_checkpoint(case.path, optimizer_of(comm, link)))


def save(case: Case) -> None:
    run_ranks(1, lambda comm: smorms3_dist.save_checkpoint(case.path, trained(comm)))


def damaged_checkpoint(case: Case) -> None:
    save(case)
    next(case.path.glob("step-*/*.safetensors")).unlink()
    load(case)


def checkpoint_of_another_model(case: Case) -> None:
    save(case)
    load(case, L.Linear(3, 5))


def two_who_save(case: Case) -> None:
    def run(comm: ThreadCollectives) -> None:
        for optimizer in [trained(comm), trained(comm)]:
            smorms3_dist.save_checkpoint(case.path, optimizer)

    run_ranks(1, run)


MAKERS: dict[str, Maker] = {
    "`np.sctypes` was removed in the NumPy 2.0 release": chainer_without(
        "np.sctypes", hasattr(np, "sctypes")
    ),
    "No module named 'numpy.distutils'": chainer_without(
        "it", sys.version_info < (3, 12), OLD_NUMPY
    ),
    "No module named 'pkg_resources'": chainer_without(
        *("it", importlib.util.find_spec("pkg_resources") is not None),
        f"{OLD_NUMPY}{LENT}numpy.distutils = numpy; ",
    ),
    "... started ... processes (...), but for the MPI library that mpi4py has loaded each of them "
    "is alone": ranks_that_do_not_know_of_each_other,
    "srun is not on the PATH; is Slurm installed on this host?": slurm_without_srun,
    "... ranks are more than the ... slots of the hosts": lambda case: cli.main(
        ["run", "-n", "9", "-H", "h1:2,h2:2", "-m", "anything"]
    ),
    "rank ... cannot use a GPU of ...": gpu_without_cupy,
    "double_buffering=True is not supported": lambda case: run_ranks(
        1, lambda comm: optimizer_of(comm, double_buffering=True)
    ),
    "... is a multi-node optimizer already; pass it to smorms3_dist.shard()": lambda case: (
        run_ranks(
            1, lambda comm: smorms3_dist.create_multi_node_optimizer(optimizer_of(comm), comm)
        )
    ),
    "... is not a communicator": lambda case: optimizer_of("naive"),
    "parameter ... has dtype ...; only float16, float32 and float64 parameters can be "
    "updated": integer_parameter,
    "communication_dtype=... is for NCCL, but ...": lambda case: run_ranks(
        1, lambda comm: trained(comm, communication_dtype="float16")
    ),
    "the optimizer has no target; call setup(link) before update()": lambda case: run_ranks(
        1, lambda comm: optimizer_of(comm, setup=False).update()
    ),
    "the ranks have different models: parameter ... is ... on rank 0 and ... on rank "
    "...": lambda case: run_ranks(2, lambda comm: trained(comm, link=L.Linear(3, 4 + comm.rank))),
    "the ranks differ in what they must share: ...: ... on rank ... and ... on rank "
    "...": only_on_rank_0(lambda optimizer, case: setattr(optimizer, "lr", 0.1)),
    "a hook has changed something on some ranks alone: after the ... the ... of ... is another on "
    "rank ...": only_on_rank_0(
        lambda optimizer, case: optimizer.add_hook(lambda each: each.target.cleargrads(), "clear")
    ),
    "parameter ... is updated by two optimizers, which would each keep states of their own for "
    "it": lambda case: run_ranks(2, two_optimizers),
    "since the last step rank 0 ..., but rank ... ...": only_on_rank_0(
        lambda optimizer, case: save_npz(str(case.path / "rank_0"), optimizer)
    ),
    "some ranks save or load a checkpoint or a snapshot, while others make a step": only_on_rank_0(
        lambda optimizer, case: optimizer.consolidate(), instead=True
    ),
    "gradients='sharded' was asked for, but ...": after(add_whole_hook, gradients="sharded"),
    "every rank receives whole gradients: ...": after(add_whole_hook),
    "... runs on whole arrays, with its whole states on every rank: ...": after(
        lambda optimizer: setattr(optimizer.target.b, "update_rule", OddRule())
    ),
    "there are no mean gradients to gather: the last update did not keep them": lambda case: (
        run_ranks(1, lambda comm: trained(comm).gather_gradients())
    ),
    "this snapshot would hold the optimizer states of rank ... alone": snapshot_of_one_rank,
    "the snapshot holds the optimizer states of rank ... of ..., but this is rank ... of "
    "...": snapshot_of_another_world_size,
    "snapshot_on_error=True is not supported": lambda case: smorms3_dist.extensions.snapshot(
        snapshot_on_error=True
    ),
    "this optimizer was restored from a pickle and has no communicator": lambda case: run_ranks(
        1, lambda comm: pickle.loads(pickle.dumps(trained(comm))).update()
    ),
    "the states of this optimizer are shard ... of ..., but in the new communicator this process "
    "is rank ... of ...": another_communicator,
    "ShardedCheckpoint needs a directory": checkpoint_without_a_directory,
    "the trainer's updater has no sharded optimizer": checkpoint_of_plain_chainer,
    "...: has no checkpoint": load,
    "...: has no whole step. To train from the start, remove the damaged ones: "
    "...": damaged_checkpoint,
    "...: is of another model: ...": checkpoint_of_another_model,
    "...: is being written to by ...": two_who_save,
}
"""By message as the page has it, what makes it: raised, printed, logged or returned."""


@pytest.mark.parametrize("message", MAKERS)
def test_the_message_appears(
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        said = [MAKERS[message](Case(tmp_path, monkeypatch))]
    except (Exception, SystemExit) as error:
        said = [error]
    text = " ".join(" ".join([*map(str, said), caplog.text, capsys.readouterr().err]).split())
    assert re.search(".+".join(map(re.escape, message.split("..."))).strip(), text), text


def test_the_page_has_these_messages_and_no_others() -> None:
    headings = re.findall(r"^### (.*)$", pages.read("troubleshooting.md"), re.M)
    assert headings == list(MAKERS)
