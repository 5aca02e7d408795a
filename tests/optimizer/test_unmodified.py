"""``--shard``: scripts that know nothing of this package, with ChainerMN's optimizer and ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from smorms3_dist import ShardedOptimizer
from smorms3_dist.optimizer.unmodified import UnmodifiedScript
from smorms3_dist.timeline.merging import merge

import chainer
import chainermn
import fresh
import models
import mpirun
import numpy as np
import process
import pytest
import running
from rank_threads import ThreadCollectives, run_ranks

KINDS = {
    "classifier": 2,
    "adversarial": 2,
    "sequences": 2,
    "images": 2,
    "model_parallel": 2,
    "dual_parallel": 4,
}
"""The scripts of the program, and their ranks."""

SAID = "smorms3_dist: --shard: optimizers of chainermn.create_multi_node_optimizer are sharded"
NOTHING = "smorms3_dist: --shard: no effect"


@pytest.mark.mpi
def test_scripts_of_each_kind_end_with_the_bits_of_chainermns_own_optimizer(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    program = mpirun.PROGRAMS / "chainermn_scripts.py"
    command = mpirun.command(4, "-m", "smorms3_dist", program, theirs)
    status, output = process.run(*command, env=mpirun.environment(), limit=120)
    assert status == 0, output
    assert "--shard" not in output
    seen = tmp_path / "seen"
    status, output = running.run("-n", "4", "--timeline", seen, "--shard", program, ours)
    assert status == 0, output
    # Also optimizers of a part of the ranks are in the timeline of each rank.
    merged = merge(seen)
    assert merged.ranks == [0, 1, 2, 3] and merged.uncertainty is not None
    for rank in merged.ranks:
        named = {event["name"] for event in merged.events if event["pid"] == rank}
        assert {"compute", "agree", "layout", "reduce", "update", "gather", "step 2"} <= named
    assert [line for line in output.splitlines() if "--shard" in line] == [f"[0] {SAID}"]
    for kind, ranks in KINDS.items():
        for rank in range(ranks):
            mine, expected = (
                dict(np.load(directory / f"{kind}.{rank}.npz")) for directory in (ours, theirs)
            )
            types = {str(mine.pop(name)) for name in list(mine) if name.endswith("/type")}
            assert types == {"Adam" if kind == "model_parallel" else "ShardedOptimizer"}
            assert mine.keys() == {name for name in expected if not name.endswith("/type")}
            for name, array in mine.items():
                assert array.tobytes() == expected[name].tobytes(), (kind, rank, name)
            assert int(mine["0/t"]) >= 5
    mine, expected = (np.load(directory / "snapshot") for directory in (ours, theirs))
    whole = [name for name in expected.files if name.startswith("updater/optimizer")]
    # t and epoch, and for each of four parameters t and three states.
    assert len(whole) == 2 + 4 * 4
    for name in whole:
        assert mine[name].tobytes() == expected[name].tobytes(), name


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what scripts are prepared by."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    factory = chainermn.create_multi_node_optimizer
    for module in (chainermn, chainermn.optimizers):
        monkeypatch.setattr(module, "create_multi_node_optimizer", factory)
    monkeypatch.setattr(chainer.GradientMethod, "update", chainer.GradientMethod.update)


@pytest.mark.usefixtures("_restored")
def test_modules_that_are_imported_already_make_sharded_optimizers_with_the_options_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    UnmodifiedScript({"gradients": "replicated", "exact": True}, rank=0, size=2).prepare()
    assert chainermn.create_multi_node_optimizer == chainermn.optimizers.create_multi_node_optimizer

    def run(collectives: ThreadCollectives) -> None:
        for double_buffering in ((), (False,)):
            optimizer = chainermn.create_multi_node_optimizer(
                chainer.optimizers.SMORMS3(), collectives, *double_buffering, zero_fill=False
            )
            assert type(optimizer) is ShardedOptimizer
            told = (optimizer.gradients, optimizer.exact, optimizer.zero_fill)
            assert told == ("replicated", True, False)
        with pytest.raises(ValueError, match="double_buffering=True is not supported"):
            chainermn.create_multi_node_optimizer(
                chainer.optimizers.SMORMS3(), collectives, double_buffering=True
            )

    run_ranks(1, run)
    assert capsys.readouterr().err == f"{SAID}, with gradients='replicated', exact=True\n"


def plain() -> Any:
    optimizer = chainer.optimizers.SMORMS3().setup(models.Model())
    models.set_gradients(optimizer.target, 0, 0)
    return optimizer


@pytest.mark.usefixtures("_restored")
def test_updates_of_plain_optimizers_are_no_fault_of_a_script_that_uses_chainermn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    update = chainer.GradientMethod.update
    script = UnmodifiedScript({}, rank=0, size=2)
    script.prepare()
    assert chainer.GradientMethod.update is not update
    optimizer = plain()
    optimizer.update()
    assert optimizer.t == 1
    assert chainer.GradientMethod.update is update
    assert not capsys.readouterr().err
    script.note_end()
    assert capsys.readouterr().err.startswith(NOTHING)


@pytest.mark.usefixtures("_restored")
def test_one_rank_may_run_a_plain_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "chainermn")
    UnmodifiedScript({}, rank=0, size=1).prepare()
    optimizer = plain()
    optimizer.update()
    assert optimizer.t == 1


PLAIN = """
import sys
import chainer, numpy
assert sys.argv[1:] == ["--shard", "x"]
assert "chainermn" not in sys.modules
optimizer = chainer.optimizers.SGD().setup(chainer.links.Linear(3, 1))
optimizer.update(lambda: chainer.functions.sum(optimizer.target(numpy.ones((2, 3), "f"))))
print("trained", flush=True)
sys.exit(0)
"""


@pytest.mark.parametrize("size", [1, 2])
def test_a_plain_script_on_several_ranks_is_refused_at_its_first_update(
    size: int, tmp_path: Path
) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    status, output = process.run(
        *(sys.executable, "-m", "smorms3_dist", "--shard", "plain.py", "--shard", "x"),
        env=fresh.environment(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE=str(size)),
        cwd=tmp_path,
    )
    if size == 1:
        assert status == 0, output
        assert output.startswith("trained\n" + NOTHING)
    else:
        assert status == 1
        assert "trained" not in output and NOTHING not in output
        message = "RuntimeError: --shard has nothing to shard: this is rank 0 of 2, and the script"
        assert output.splitlines()[-1].startswith(message)
