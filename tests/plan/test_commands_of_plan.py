"""``smorms3-dist plan``: what it says, which models it finds, and its exit statuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smorms3_dist import cli
from smorms3_dist.layout import ParameterSpec
from smorms3_dist.plan import demand
from smorms3_dist.plan.setup import Setup

import mpirun
import process
import pytest

SCRIPT = """
import sys

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import beside

print("this is not JSON")

class Net(chainer.Chain):
    def __init__(self, hidden=20, inputs=30):
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(inputs, hidden)
            self.l2 = L.Linear(hidden, beside.OUTPUTS)

class Needy(Net):
    def __init__(self, hidden):
        super().__init__(hidden)

def lazy():
    return Net(inputs=None)

def called():
    net = lazy()
    net.l1(np.zeros((1, 30), "f"))
    return net

def half():
    with chainer.using_config("dtype", np.float16):
        return Net()

def tied():
    return chainer.Sequential(shared, shared)

def failing():
    raise ValueError("no data\\nat all")

def integers():
    link = chainer.Link()
    with link.init_scope():
        link.x = chainer.Parameter(np.zeros(3, "i"))
    return link

class Lazy(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(None, 6, 5)
            self.norm = L.BatchNormalization(axis=(0, 2, 3))
            self.aux, self.out = L.Linear(None, 3), L.Linear(None, 10)

    def __call__(self, x):
        assert not chainer.config.enable_backprop and not x.any()
        h = F.dropout(F.relu(self.norm(self.conv(x))))
        if chainer.config.train:
            self.aux(h)
        return self.out(h)

def recurrent():
    return chainer.Sequential(L.EmbedID(9, 4), F.flatten, lambda h: h[None], L.Linear(None, 2))

class Unreached(Lazy):
    def __call__(self, x):
        return self.out(x)

def ending():
    sys.exit(3)

shared = L.Linear(5, 7)
answer = 42
nothing = chainer.Link()

if __name__ == "__main__":
    raise RuntimeError("this trains")
"""


def line_of(text: str) -> int:
    return SCRIPT[: SCRIPT.index(text)].count("\n") + 1


NET = 30 * 20 + 20 + 20 * 10 + 10


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "beside.py").write_text("OUTPUTS = 10\n")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    yield path
    sys.modules.pop("beside", None)


class Plan:
    """The command, and what it prints."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def said(self, *arguments: object, status: int = 0) -> list[str]:
        assert cli.main(["plan", *map(str, arguments)]) == status
        return self.capsys.readouterr().out.splitlines()

    def facts(self, *arguments: object, status: int = 0) -> Any:
        return json.loads("".join(self.said(*arguments, "--json", status=status)))

    def error(self, status: int, *arguments: object) -> str:
        """The line that says what is wrong."""
        try:
            assert cli.main(["plan", *map(str, arguments)]) == status
        except SystemExit as ended:
            assert ended.code == status == 2
        captured = self.capsys.readouterr()
        assert captured.out == ""
        (line,) = (line for line in captured.err.splitlines() if ": error: " in line)
        hint = "smorms3-dist plan --help says more\n" if status == 2 else ""
        assert captured.err.endswith(f"{line}\n{hint}")
        return line.partition(": error: ")[2]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    return Plan(capsys)


# Numbers


def test_the_example_of_the_documentation(plan: Plan) -> None:
    found = plan.facts("--params", "1.5e9", "--dtype", "fp16", "--ranks", 64, "--fp32-update")
    assert found["parameters"] == {"float16": 1_500_000_000}
    defaults = {"ranks_per_node": 8, "transport": "nccl", "optimizer": "SMORMS3"}
    defaults |= {"gradients": "sharded", "hooks": False, "communication_dtype": None}
    defaults |= {"gather_dtype": None, "double_buffering": False, "share_parameters": False}
    assert found["training"] == {**defaults, "ranks": 64, "fp32_update": True}
    memory, theirs = found["memory"], found["chainermn"]["memory"]
    # 3e9 bytes lie even on 64 ranks: 1.5e9 is a multiple of 64 x 64 elements, nearly.
    part = -(-1_500_000_000 // 4096) * 64
    assert memory["states"] == 12 * part and memory["masters"] == 4 * part
    assert memory["parameters"] == 2 * 64 * part and memory["gradients"] == 3_000_000_000
    assert memory["buffers"] == 2 << 28
    assert theirs["states"] == 18_000_000_000 and theirs["masters"] == 6_000_000_000
    assert found["sent"]["all_gather"] == 2 * part * 63 == found["sent"]["reduce_scatter"]
    assert found["chainermn"]["sent"]["total"] == 2 * 63 * 3_000_000_000 // 64
    for table in (memory, theirs, found["sent"], found["seconds"], found["chainermn"]["seconds"]):
        parts = {**table, "total": 0, "host_buffers": 0}
        assert table["total"] == pytest.approx(sum(parts.values()))


def test_options_reach_the_formulas(plan: Plan) -> None:
    options = ["--params", 1000, "-n", 3, "--transport", "host", "--optimizer", "adam"]
    options += ["--gradients", "replicated", "--hooks", "--dtype", "float16", "--fp32-update"]
    options += ["--double-buffering"]
    how: Any = {"fp32_update": True, "gradients": "replicated", "hooks": True}
    how["double_buffering"] = True
    specs = (ParameterSpec("/w", (1000,), "float16"),)
    setup = Setup(specs, 3, optimizer="Adam", transport="host", **how)
    found = plan.facts(*options)
    assert found["memory"]["total"] == demand.memory(setup)["total"]
    assert found["training"]["optimizer"] == "Adam"
    sent = plan.facts("--params", 1e6, "-n", 2, "--communication-dtype", "bfloat16")["sent"]
    assert sent["reduce_scatter"] * 2 == sent["all_gather"]
    options = ("--params", 1e6, "-n", 2, "--transport", "host", "--gather-dtype", "bfloat16")
    assert plan.facts(*options)["memory"]["masters"] == 2e6
    options = ("--params", 1 << 20, "-n", 4, "--transport", "host", "--share-parameters")
    assert plan.facts(*options)["memory"]["parameters"] == 1 << 20


def test_speeds_are_those_given(plan: Plan) -> None:
    given = ["--bandwidth", 100, "--node-bandwidth", 25, "--memory-bandwidth", 4000]
    options = ["--params", 1e9, "-n", 16, "--gpus-per-node", 4, *given, "--latency", 0]
    found = plan.facts(*options)
    assert found["speeds"] == {"inside": 1e11, "between": 2.5e10, "memory": 4e12, "latency": 0}
    assert found["seconds"]["all_gather"] == pytest.approx(15 / 16 * 4e9 / 2.5e10, rel=1e-3)
    assert found["seconds"]["update"] == pytest.approx(36e9 / 16 / 4e12, rel=1e-3)
    inside = plan.facts(*options, "--gpus-per-node", 16)
    assert inside["seconds"]["all_gather"] == pytest.approx(15 / 16 * 4e9 / 1e11, rel=1e-3)


def test_the_table_is_for_readers(plan: Plan) -> None:
    lines = plan.said("--params", 2**30, "--ranks", 4, "--transport", "staged")
    how = "SMORMS3, 4 ranks, 1 node, transport staged, sharded gradients"
    assert lines[0] == f"1,073,741,824 float32 parameters: {how}"
    assert "memory of a GPU, GiB             smorms3_dist      ChainerMN" in lines
    assert "  states                                3.000         12.000" in lines
    assert any(re.fullmatch(r"and \d+\.\d{3} MiB of host memory a rank", line) for line in lines)
    assert "  all-gather                            3.221              -" in lines
    assert "  all-reduce                                -          6.442" in lines
    assert all(len(line) <= 100 for line in lines[1:])
    assert not any("masters" in line or "mean" in line for line in lines)


def test_units_are_those_of_the_numbers(plan: Plan) -> None:
    def titles(*options: object) -> list[str]:
        lines = plan.said(*options, "--ranks", 4)
        found = [line.split("  ")[0] for line in lines if line.endswith("ChainerMN")]
        return [title.rpartition(", ")[2] for title in found]

    assert titles("--params", 20) == ["B", "B", "us"]
    assert titles("--params", 2000) == ["KiB", "kB", "us"]
    assert titles("--params", 2e6, "--transport", "host") == ["MiB", "MB", "ms"]
    assert titles("--params", 2e12 // 2, "--latency", 0) == ["TiB", "TB", "s"]


def test_where_the_step_is_not_faster_it_is_said_what_is_gained(plan: Plan) -> None:
    model = ("--params", "1.5e9", "--dtype", "fp16", "--fp32-update", "--ranks", 64)
    model += ("--latency", 20)
    (line,) = (line for line in plan.said(*model) if "gain" in line)
    found = plan.facts(*model)
    share = 1 - found["memory"]["total"] / found["chainermn"]["memory"]["total"]
    expected = f"The step is not faster here: memory is the gain, {share:.0%} less of it."
    assert line == expected and 0.8 < share < 0.9
    none = plan.said("--params", 1e4, "--ranks", 64, "--transport", "host")
    assert "Neither memory nor time is gained here." in none
    host = plan.said("--params", 1e8, "--ranks", 4, "--transport", "host")
    assert not any("gain" in line for line in host)


def test_memory_finds_the_fewest_ranks(plan: Plan) -> None:
    model = ["--params", 2**30, "--memory", 12]
    # Parameters, gradients and two buckets take 8.125 GiB, states 12.
    found = plan.facts(*model)
    assert found["training"]["ranks"] == 4
    assert found["limit"] == {"bytes": 12 << 30, "fits": True, "smallest_ranks": 4}
    assert plan.said(*model)[-1] == (
        "4 ranks fit into 12 GiB; the fewest that do are 4. ChainerMN's would not, however many."
    )
    assert plan.facts(*model, "--reserve", 1)["training"]["ranks"] == 5
    few = plan.facts(*model, "--ranks", 3, status=1)
    assert few["limit"] == {**found["limit"], "fits": False}
    assert plan.said(*model, "-n", 3, status=1)[-1].startswith("3 ranks do not fit into 12 GiB")
    never = plan.said("--params", 2**30, "--memory", 8, status=1)[-1]
    assert never.startswith("No number of ranks up to 65,536 fits into 8 GiB each")
    large = "1 rank fits into 80 GiB; the fewest that do are 1. ChainerMN's would fit, too."
    assert plan.said("--params", 2**30, "--memory", 80)[-1] == large


# Models


def test_models_in_files(script: Path, plan: Plan) -> None:
    before = sys.path[:], sys.argv[:]
    for target, expected in {
        "Net": {"float32": NET},
        "called": {"float32": NET},
        "half": {"float16": NET},
        "shared": {"float32": 5 * 7 + 7},
        "tied": {"float32": 5 * 7 + 7},
        "Net(40)": {"float32": 30 * 40 + 40 + 40 * 10 + 10},
        "Needy(hidden=20)": {"float32": NET},
        "L.Linear(3, 4)": {"float32": 16},
        "lambda: Net(20)": {"float32": NET},
    }.items():
        found = plan.facts(f"{script}:{target}", "--ranks", 3, "--transport", "host")
        assert found["parameters"] == expected, target
        assert (sys.path, sys.argv) == before
    # They are laid out one by one.
    shapes = {"/l1/W": (20, 30), "/l1/b": (20,), "/l2/W": (10, 20), "/l2/b": (10,)}
    setup = Setup(tuple(ParameterSpec(*item, "float32") for item in shapes.items()), 3)
    assert plan.facts(f"{script}:Net", "-n", 3)["memory"]["total"] == demand.memory(setup)["total"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Nett", "{} has no 'Nett'"),
        ("Net(", "'Net(' after the file's name is not Python"),
        ("Needy", "{}:Needy needs arguments (missing a required argument: 'hidden'); give them"),
        ("Net(1, 2, 3)", "{} raised TypeError: "),
        ("beside.Net", "{} raised AttributeError: module 'beside' has no attribute 'Net'"),
        ("answer", "{}:answer is of type int; name a chainer.Link, its class"),
        ("np.zeros(3)", "{}:np.zeros(3) is of type ndarray; name a chainer.Link"),
        ("lazy", "{}:lazy: /l1/W have no shape yet. Give the shape of a batch, as in --input 1,1"),
        ("failing", f"{{}}, line {line_of('raise ValueError')} raised ValueError: no data"),
        ("ending", f"{{}}, line {line_of('sys.exit(3)')} raised SystemExit: 3"),
        ("integers", "{}:integers: parameter /x has dtype int32; only float16, float32"),
        ("nothing", "{}:nothing: the link Link has no parameters"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(
    target: str, message: str, script: Path, plan: Plan
) -> None:
    line = plan.error(1, f"{script}:{target}", "--ranks", 2)
    assert line.startswith(message.format(script))


@pytest.mark.parametrize(
    ("target", "inputs", "count"),
    [
        ("lazy().l1", ["1,30"], 30 * 20 + 20),
        ("Lazy", ["2,3,8,8"], 3 * 6 * 25 + 6 + 12 + 6 * 16 * 13 + 13),
        ("L.Classifier(Lazy())", ["1,1,8,8", "int32:1"], 6 * 25 + 6 + 12 + 6 * 16 * 13 + 13),
        ("recurrent", ["int32:1,7"], 36 + 28 * 2 + 2),
        ("half", ["fp16:1,30"], NET),
    ],
)
def test_sizes_come_of_one_batch_of_zeros(
    target: str, inputs: list[str], count: int, script: Path, plan: Plan
) -> None:
    options = [f"--input={each}" for each in inputs]
    found = plan.facts(f"{script}:{target}", "--ranks", 2, *options)
    assert sum(found["parameters"].values()) == count


@pytest.mark.parametrize(
    ("target", "shape", "message"),
    [
        ("Lazy", "1,30", "a forward pass with zeros of float32 (1, 30) raised ValueError: not"),
        ("Lazy()", "int32:1,1,8,8", "zeros of int32 (1, 1, 8, 8) raised InvalidType: "),
        ("L.Classifier(Lazy())", "1,1,8,8", "raised "),
        ("Unreached", "1,9", ": /aux/W, /conv/W, /norm/beta and 1 more have no shape after a for"),
        ("failing", "1", "raised ValueError: no data"),
    ],
)
def test_a_batch_that_the_model_does_not_take_is_told_in_one_line(
    target: str, shape: str, message: str, script: Path, plan: Plan
) -> None:
    assert message in plan.error(1, f"{script}:{target}", "--ranks", 2, "--input", shape)


def test_files_that_cannot_be_run(tmp_path: Path, plan: Plan) -> None:
    missing = tmp_path / "missing.py"
    assert plan.error(1, f"{missing}:Net", "-n", 2).startswith(f"there is no file '{missing}'")
    assert "is not FILE.py:MODEL" in plan.error(1, "train.py", "-n", 2)
    raising = tmp_path / "raising.py"
    raising.write_text("import os\n\n1 / 0\n")
    expected = f"{raising}, line 3 raised ZeroDivisionError: division by zero"
    assert plan.error(1, f"{raising}:Net", "-n", 2) == expected
    raising.write_text("def f(:\n")
    line = plan.error(1, f"{raising}:Net", "-n", 2)
    assert line.startswith(f"{raising}, line 1 raised SyntaxError: ")


# Command lines


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--params", "0 -5 1.5 1e13 nan inf 1e999999999 x", "is not a whole number from 1 to 1e12"),
        ("--ranks", "0 -1 1e3 65537", "is not a number from 1 to 65536"),
        ("--gpus-per-node", "0", "is not a number from 1"),
        ("--dtype", "int8", "there is no"),
        ("--input", "x 1,0 1x2 ,1 f:1,2 int99:3 :3", "is not the shape of a batch, such as 1,1,28"),
        ("--optimizer", "lamb", "is not one of SMORMS3, SGD"),
        ("--bandwidth", "0", "is not a positive number below 1e9"),
        ("--node-bandwidth", "-1", "is not a positive number"),
        ("--memory-bandwidth", "nan 1e9", "is not a positive number"),
        ("--memory", "inf", "is not a positive number"),
        ("--latency", "-1", "is not a number that is not negative"),
    ],
)
def test_values_that_an_option_does_not_take(
    option: str, values: str, message: str, plan: Plan
) -> None:
    for value in values.split():
        line = plan.error(2, "--params", 10, "--ranks", 2, option, value)
        assert option in line and repr(value) in line and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ranks 2", "give either FILE.py:MODEL or --params"),
        ("train.py:Net --params 3 --ranks 2", "give either FILE.py:MODEL or --params"),
        ("train.py:Net --dtype fp16 --ranks 2", "--dtype is for --params"),
        ("--params 10", "give --ranks, or --memory"),
        ("--params 10 --ranks 2 --reserve 3", "--reserve is a part of --memory, which is missing"),
        ("--params 10 --ranks 2 --input 1,1", "--input is for FILE.py:MODEL"),
        ("--params 10 --memory 3 --reserve 3", "--reserve leaves nothing of --memory"),
        ("--params 1e12 --ranks 1001 --transport host", "--params times --ranks is more than"),
        ("--params 10 --ranks 2 --fp32-update", "--fp32-update is for float16 parameters"),
        (
            "--params 10 -n 2 --transport staged --communication-dtype float16",
            "is for --transport nccl and host",
        ),
        ("--params 10 -n 2 --gather-dtype float16", "--gather-dtype is for --transport host"),
    ],
)
def test_options_that_do_not_go_together(arguments: str, message: str, plan: Plan) -> None:
    assert message in plan.error(2, *arguments.split())


def test_numbers_need_neither_chainer_nor_mpi() -> None:
    program = (
        "import sys\n"
        "from smorms3_dist.cli import main\n"
        "status = main(['plan', '--params', '1e6', '--ranks', '2', '--memory', '9'])\n"
        "loaded = {'chainer', 'chainermn', 'mpi4py', 'cupy', 'numba'} & sys.modules.keys()\n"
        "sys.exit(str(loaded) if loaded else status)\n"
    )
    status, output = process.run(sys.executable, "-c", program, cwd=mpirun.ROOT)
    assert status == 0 and output.startswith("1,000,000 float32 parameters: "), output
