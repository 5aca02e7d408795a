"""docs/troubleshooting.md: every message that it has is made here, and it has every one."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import smorms3_dist
from smorms3_dist import cli, waiting
from smorms3_dist.collectives import connect
from smorms3_dist.launch import backends
from smorms3_dist.phases import Phases
from smorms3_dist.timeline.rank_timeline import start_timeline

import chainer
import chainer.links as L
import chainermn
import mpirun
import numpy as np
import pages
import process
import pytest
import saving
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


def on(ranks: int, run: Callable[[ThreadCollectives], object]) -> list[object]:
    return run_ranks(ranks, run)


def trainer_of(optimizer: Any, path: Path) -> training.Trainer:
    data = chainer.datasets.TupleDataset(np.zeros((4, 3), "f"))
    updater = training.updaters.StandardUpdater(
        chainer.iterators.SerialIterator(data, 2), optimizer
    )
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


def chainer_not_installed(case: Case) -> str:
    hidden = "sys.path[:] = [path for path in sys.path if 'site-packages' not in path]\n"
    return said_by(f"import sys, smorms3_dist\n{hidden}import chainer", PYTHONPATH=str(pages.ROOT))


def chainer_without_sctypes(case: Case) -> str:
    if hasattr(np, "sctypes"):
        pytest.skip("this NumPy has it")
    return said_by("import chainer")


OLD_NUMPY = "import collections, sys, numpy; numpy.sctypes = collections.defaultdict(list)\n"


def chainer_without_distutils(case: Case) -> str:
    if sys.version_info < (3, 12):
        pytest.skip("this Python has it")
    return said_by(OLD_NUMPY + "import chainer")


def chainer_without_pkg_resources(case: Case) -> str:
    if importlib.util.find_spec("pkg_resources"):
        pytest.skip("this setuptools has it")
    names = "numpy.distutils", "numpy.distutils.system_info"
    lent = "".join(f"sys.modules['{name}'] = numpy\n" for name in names)
    return said_by(OLD_NUMPY + lent + "numpy.distutils = numpy; import chainer")


def int_of_an_array(case: Case) -> None:
    if np.lib.NumpyVersion(np.__version__) < "2.4.0":
        pytest.skip("this NumPy takes it")
    int(np.ones(1))


def ranks_that_do_not_know_of_each_other(case: Case) -> str:
    code = "import smorms3_dist, chainer; from mpi4py import MPI\n" + (
        "smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), MPI.COMM_WORLD)"
    )
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return said_by(code, PMI_SIZE="2", PYTHONPATH=str(pages.ROOT), **as_root)


def no_mpi_library(case: Case) -> None:
    case.patch.setenv("MPI4PY_LIBMPI", str(case.path / "libmpi.so"))
    cli.main(["run", "-n", "2", "-m", "anything"])


def slurm_without_srun(case: Case) -> None:
    script = case.path / "train.py"
    script.touch()
    case.patch.setenv("PATH", str(case.path))
    cli.main(["run", "--backend", "slurm", "-n", "2", str(script)])


def with_shard(case: Case, script: str, **environment: str) -> str:
    path = case.path / "train.py"
    path.write_text(script)
    code = f"import smorms3_dist.__main__ as main; main.main(['--shard', {str(path)!r}])"
    return said_by(code, PYTHONPATH=str(pages.ROOT), **environment)


def plain_script_on_two_ranks(case: Case) -> str:
    script = "import chainer; chainer.optimizers.SGD().setup(chainer.links.Linear(3, 1)).update()"
    return with_shard(case, script, OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2")


def communicator_in_a_child(case: Case) -> None:
    case.patch.setenv("PMIX_RANK", "0")
    case.patch.setattr(multiprocessing, "parent_process", lambda: object())
    chainermn.create_communicator("naive")


def gpu_without_cupy(case: Case) -> None:
    case.patch.setitem(sys.modules, "cupy", None)
    on(2, smorms3_dist.use_gpu)


def integer_parameter(case: Case) -> None:
    link = chainer.Link()
    with link.init_scope():
        link.a = chainer.Parameter(np.ones(3, "i"))
    on(1, lambda comm: optimizer_of(comm, link))


def only_on_rank_0(do: Callable[[Any, Case], object], instead: bool = False) -> Maker:
    """Something that rank 0 does before a step of all, or instead of it."""

    def make(case: Case) -> None:
        def run(comm: ThreadCollectives) -> None:
            optimizer = trained(comm)
            if comm.rank == 0:
                do(optimizer, case)
            if comm.rank or not instead:
                step(optimizer)

        on(2, run)

    return make


def after(configure: Callable[[Any], object], **options: Any) -> Maker:
    """A step of one rank, after its optimizer has been configured."""

    def run(comm: ThreadCollectives) -> None:
        optimizer = optimizer_of(comm, **options)
        configure(optimizer)
        step(optimizer)

    return lambda case: on(1, run)


def clear_gradients(optimizer: Any) -> None:
    optimizer.target.cleargrads()


def two_optimizers(comm: ThreadCollectives) -> None:
    first = trained(comm)
    second = optimizer_of(comm)
    second.setup(first.target)
    step(second)
    step(first)


def add_whole_hook(optimizer: Any) -> None:
    def hook(optimizer: Any) -> None:
        """Does nothing, but nobody can know."""

    optimizer.add_hook(hook, name="mine")


def not_finite_gradients(case: Case) -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm, check_finite="error")
        for param in optimizer.target.params():
            param.grad = np.full_like(param.array, np.nan)
        optimizer.update()

    on(2, run)


class OddRule(chainer.optimizers.sgd.SGDRule):
    is_elementwise = False


def snapshot_of_one_rank(case: Case) -> None:
    extension = training.extensions.snapshot()
    on(2, lambda comm: extension(trainer_of(trained(comm), case.path)))


def snapshot_of_another_world_size(case: Case) -> None:
    def save(comm: ThreadCollectives) -> None:
        save_npz(str(case.path / f"{comm.rank}"), trained(comm))

    on(2, save)
    on(1, lambda comm: load_npz(str(case.path / "0"), optimizer_of(comm)))


def another_communicator(case: Case) -> None:
    optimizer = on(2, trained)[0]
    on(1, lambda comm: setattr(optimizer, "communicator", comm))


def checkpoint_without_a_directory(case: Case) -> None:
    case.patch.delenv("SMORMS3_CHECKPOINT_DIR", raising=False)
    smorms3_dist.ShardedCheckpoint()


def checkpoint_of_plain_chainer(case: Case) -> None:
    trainer = trainer_of(chainer.optimizers.SMORMS3().setup(L.Linear(3, 4)), case.path)
    smorms3_dist.ShardedCheckpoint(case.path).maybe_load(trainer)


def load(case: Case, link: Any = None) -> None:
    on(1, lambda comm: smorms3_dist.load_checkpoint(case.path, optimizer_of(comm, link)))


def save(case: Case, **options: Any) -> None:
    on(1, lambda comm: smorms3_dist.save_checkpoint(case.path, trained(comm), **options))


def step_as_directory(case: Case) -> None:
    save(case)
    smorms3_dist.latest_step(next(case.path.glob("step-*")))


def damaged_checkpoint(case: Case) -> None:
    save(case)
    next(case.path.glob("step-*/*.safetensors")).unlink()
    load(case)


def checkpoint_of_another_model(case: Case) -> None:
    save(case)
    load(case, L.Linear(3, 5))


def two_who_save(case: Case) -> None:
    program = Path(saving.__file__), "hold", case.path
    with process.start(sys.executable, *program, env=mpirun.environment()) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        try:
            save(case)
        finally:
            other.kill()


def two_trainings(case: Case) -> None:
    save(case)
    save(case)


def replaced_directory(case: Case) -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm)
        smorms3_dist.save_checkpoint(case.path / "ck", optimizer)
        (case.path / "ck").rename(case.path / "old")
        smorms3_dist.save_checkpoint(case.path / "ck", optimizer)

    on(1, run)


def late_extension(case: Case) -> None:
    def run(comm: ThreadCollectives) -> None:
        for late in (False, True):
            link = chainer.Sequential(L.Linear(3, 1), chainer.functions.sum)
            trainer = trainer_of(optimizer_of(comm, link), case.path)
            checkpoint = smorms3_dist.ShardedCheckpoint(case.path / "ck", every=(1, "iteration"))
            log = training.extensions.LogReport()
            if not late:
                trainer.extend(log)
            trainer.extend(checkpoint)
            checkpoint.maybe_load(trainer)
            if late:
                trainer.extend(log)
            trainer.run()

    on(1, run)


def snapshot_on_error_on_rank_0(case: Case) -> None:
    def run(comm: ThreadCollectives) -> None:
        trainer = trainer_of(optimizer_of(comm), case.path)
        if comm.rank == 0:
            trainer.extend(training.extensions.snapshot(snapshot_on_error=True))
        trainer.run()

    on(2, run)


def replica_set_without_a_snapshot(case: Case) -> None:
    def run(comm: ThreadCollectives) -> None:
        trainer = trainer_of(optimizer_of(comm), case.path)
        inner = training.extensions.snapshot(filename="snapshot", autoload=True)
        trainer.extend(chainermn.extensions.multi_node_snapshot(comm, inner, [0]))
        trainer.run()

    (case.path / "snapshot.0").touch()
    on(2, run)


def statistics_of_sharded_gradients(case: Case) -> None:
    def run(comm: ThreadCollectives) -> None:
        optimizer = optimizer_of(comm, gradients="sharded")
        trainer = trainer_of(optimizer, case.path)
        trainer.extend(training.extensions.ParameterStatistics(optimizer.target))
        trainer.run()

    on(1, run)


def lr_of_adam(case: Case) -> None:
    def run(comm: ThreadCollectives) -> None:
        made = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.Adam(), comm)
        step(made.setup(L.Linear(3, 4))).alpha_t  # noqa: B018

    on(1, run)


def late_rank(case: Case) -> None:
    case.patch.setenv("SMORMS3_STALL_WARNING", "0.05")
    told = threading.Event()
    print_it = waiting._print
    case.patch.setattr(waiting, "_print", lambda words: (print_it(words), told.set()))

    def run(comm: ThreadCollectives) -> None:
        optimizer = trained(comm)
        told.clear()
        if comm.rank == 0:
            assert told.wait(30)
        step(optimizer)

    on(2, run)


def allocation_without_srun(case: Case) -> int:
    for name, value in (("SLURM_JOB_ID", "1"), ("SLURM_JOB_NUM_NODES", "2")):
        case.patch.setenv(name, value)
    case.patch.setattr(backends, "works", lambda srun: False)
    case.patch.setattr(backends, "offers_pmix", lambda srun: False)
    return cli.main(["run", "-m", "anything"])


def bad_stall_warning(case: Case) -> None:
    case.patch.setenv("SMORMS3_STALL_WARNING", "soon")
    on(2, trained)


def bad_timeline(case: Case) -> None:
    (case.path / "file").touch()
    case.patch.setenv("SMORMS3_TIMELINE", str(case.path / "file"))
    start_timeline(Phases(), 0)


MAKERS: dict[str, Maker] = {
    "Chainer is not installed. This builds and installs it: python -m smorms3_dist "
    "install-chainer": chainer_not_installed,
    "`np.sctypes` was removed in the NumPy 2.0 release": chainer_without_sctypes,
    "No module named 'numpy.distutils'": chainer_without_distutils,
    "No module named 'pkg_resources'": chainer_without_pkg_resources,
    "only 0-dimensional arrays can be converted to Python scalars": int_of_an_array,
    "... started ... processes (...), but for the MPI library that mpi4py has loaded each of them "
    "is alone": ranks_that_do_not_know_of_each_other,
    "mpi4py cannot be used with ...: ...": no_mpi_library,
    "srun is not on the PATH; is Slurm installed on this host?": slurm_without_srun,
    "this allocation of Slurm's has ... hosts, but there is no srun here that "
    "works": allocation_without_srun,
    "... ranks are more than the ... slots of the hosts": lambda case: cli.main(
        ["run", "-n", "9", "-H", "h1:2,h2:2", "-m", "anything"]
    ),
    "--shard has nothing to shard: this is rank ... of ..., and the script has not imported "
    "chainermn": plain_script_on_two_ranks,
    "--shard: no effect: the script has made no optimizer by "
    "chainermn.create_multi_node_optimizer": lambda case: with_shard(case, ""),
    "a communicator was asked for in a child that multiprocessing has started in a "
    "rank": communicator_in_a_child,
    "rank ... cannot use a GPU of ...": gpu_without_cupy,
    "double_buffering=True is not supported": lambda case: on(
        1, lambda comm: optimizer_of(comm, double_buffering=True)
    ),
    "... is a multi-node optimizer already; pass it to smorms3_dist.shard()": lambda case: on(
        1, lambda comm: smorms3_dist.create_multi_node_optimizer(optimizer_of(comm), comm)
    ),
    "... is not a communicator": lambda case: optimizer_of("naive"),
    "parameter ... has dtype ...; only float16, float32 and float64 parameters can be "
    "updated": integer_parameter,
    "communication_dtype=... on GPUs is for NCCL, but ...": lambda case: connect._refuse_dtype(
        "float16", "NCCL is missing on rank 1"
    ),
    "the optimizer has no target; call setup(link) before update()": lambda case: on(
        1, lambda comm: optimizer_of(comm, setup=False).update()
    ),
    "the ranks have different models: parameter ... is ... on rank 0 and ... on rank "
    "...": lambda case: on(2, lambda comm: trained(comm, link=L.Linear(3, 4 + comm.rank))),
    "the ranks differ in what they must share: ...: ... on rank ..., ... on rank "
    "...": only_on_rank_0(lambda optimizer, case: setattr(optimizer, "lr", 0.1)),
    "a hook has changed something on some ranks alone: after the ... the ... of ... is another on "
    "rank ...": only_on_rank_0(
        lambda optimizer, case: optimizer.add_hook(clear_gradients, "clear")
    ),
    "parameter ... is updated by two optimizers, which would each keep states of their own for "
    "it": lambda case: on(2, lambda comm: two_optimizers(comm)),
    "since the last step rank 0 ..., but rank ... ...": only_on_rank_0(
        lambda optimizer, case: save_npz(str(case.path / "rank_0"), optimizer)
    ),
    "the ranks do different things: rank ... is in ..., rank ... is in ...": only_on_rank_0(
        lambda optimizer, case: optimizer.consolidate(), instead=True
    ),
    "rank ... has ended its script after ... updates, while rank ... is in ...": only_on_rank_0(
        lambda optimizer, case: None, instead=True
    ),
    "rank ... has waited for ... s in ..., in the exchange of all ranks before it": late_rank,
    "SMORMS3_STALL_WARNING=... is not a number of seconds": bad_stall_warning,
    "SMORMS3_TIMELINE=...: rank ... cannot write its timeline there: ...": bad_timeline,
    "the ranks are not in sync (t = ...): parameter ... has one value on rank ..., another on rank "
    "...": only_on_rank_0(lambda optimizer, case: optimizer.target.W.array.fill(3)),
    "gradients are not finite in the step after t = ...: that of ... on rank "
    "...": not_finite_gradients,
    "gradients='sharded' was asked for, but ...": after(add_whole_hook, gradients="sharded"),
    "every rank receives whole gradients: ...": after(add_whole_hook),
    "... runs on whole arrays, with its whole states on every rank: ...": after(
        lambda optimizer: setattr(optimizer.target.b, "update_rule", OddRule())
    ),
    "there are no mean gradients to gather: the last update did not keep them": lambda case: on(
        1, lambda comm: trained(comm).gather_gradients()
    ),
    "this snapshot would hold the optimizer states of rank ... alone": snapshot_of_one_rank,
    "the snapshot holds the optimizer states of rank ... of ..., but this is rank ... of "
    "...": snapshot_of_another_world_size,
    "the extension ... of rank ... cannot save the optimizer states, which lie on all "
    "ranks": snapshot_on_error_on_rank_0,
    "rank ... has no snapshot in ... to load, but rank ... has ...": replica_set_without_a_snapshot,
    "the extension ... reads gradients after each step, and with gradients='sharded' no rank has "
    "them whole": statistics_of_sharded_gradients,
    "Can't determine the learning rate of Adam optimizer because the update steps have not been "
    "started.": lr_of_adam,
    "snapshot_on_error=True is not supported": lambda case: smorms3_dist.extensions.snapshot(
        snapshot_on_error=True
    ),
    "this optimizer was restored from a pickle and has no communicator": lambda case: on(
        1, lambda comm: pickle.loads(pickle.dumps(trained(comm))).update()
    ),
    "the states of this optimizer are shard ... of ..., but in the new communicator this process "
    "is rank ... of ...": another_communicator,
    "ShardedCheckpoint needs a directory": checkpoint_without_a_directory,
    "the trainer's updater has no sharded optimizer": checkpoint_of_plain_chainer,
    "...: has no checkpoint": load,
    "...: is one step, not a directory of steps: give ..., and the step ...": step_as_directory,
    "... cannot be the best: ...": lambda case: save(case, keep_last=1, keep_best=("loss", "min")),
    "after_save: ... has failed for step ..., which is whole in ..., and the training goes on: "
    "...": lambda case: save(case, after_save=lambda step, path: 1 / 0),
    "...: has no whole step. To train from the start, remove the damaged ones: "
    "...": damaged_checkpoint,
    "...: is of another model: ...": checkpoint_of_another_model,
    "...: has ..., which this training has neither saved nor loaded, and its own would be older or "
    "replace them": two_trainings,
    "...: was removed or replaced while this job was writing to it": replaced_directory,
    "the trainer was extended with ... after maybe_load()": late_extension,
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
