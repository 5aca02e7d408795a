"""The plan of the house: its rooms, floor by floor, and what may import what.

`FLOORS` is the architecture; the table of rooms in docs/architecture.md is made of it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "smorms3_dist"


class Room(NamedTuple):
    """A folder of the package, or a module that stands alone.

    Attributes:
        name: What it is called.
        modules: What belongs to it: folders and modules directly in the package.
        concern: What it is for.
    """

    name: str
    modules: tuple[str, ...]
    concern: str


def _room(name: str, concern: str) -> Room:
    return Room(name, (name,), concern)


FLOORS: list[list[Room]] = [
    [
        _room("command_line", "reads command lines, and says in two lines what is wrong"),
        _room("references", "who else has an object, by CPython's counts"),
    ],
    [
        _room("compat", "patches Chainer 7.8.1 for today's Python, NumPy and CuPy"),
        _room("layout", "which element of which parameter lies where, and who owns it"),
        _room("rank_page", "what a rank and the agent beside it tell each other"),
        _room("chainer_internals", "the only room that touches what Chainer keeps to itself"),
        _room("phases", "where the time of a rank goes, phase by phase"),
        _room("version", "the version of the package"),
        _room("whole_files", "files that commands write: whole, or not at all"),
        _room("wording", "ranks and lists in the words of messages"),
    ],
    [
        _room("kernels", "the update of a shard's segments: on CPUs, and by CUDA on GPUs"),
        _room("timeline", "what each rank does when, as trace events; smorms3-dist timeline"),
        _room("waiting", "what a rank waits for, and a voice for it"),
    ],
    [_room("device", "where arrays are, and what is missing to use a GPU")],
    [_room("collectives", "reduce, gather and broadcast, over each transport")],
    [_room("hooks", "which of Chainer's hooks run on shards, on what, and how")],
    [_room("sharding", "a model laid out over the ranks: buffers, states and their update")],
    [_room("step", "what ranks agree on before a step, the way it takes, and its order")],
    [_room("optimizer", "what stands in the place of a Chainer optimizer")],
    [
        _room("checkpoint", "saving and loading at any world size, and the tools for it"),
        _room("report", "what a run does, in numbers, for all ranks together"),
    ],
    [
        _room("extensions", "extensions and triggers: snapshots, comparing ranks, reports"),
        _room("launch", "smorms3-dist run: starts ranks, watches them, starts them again"),
        _room("plan", "smorms3-dist plan: memory, bytes and time before there is a machine"),
        _room("plot", "smorms3-dist plot: pictures of what runs have written"),
    ],
    [
        _room("bench", "smorms3-dist bench: how fast this machine trains, and a model of more"),
        _room("demo", "smorms3-dist demo: trains on real digits with what is installed"),
        _room("doctor", "smorms3-dist doctor: is this machine fit for training?"),
    ],
    [Room("the face", ("__init__", "__main__", "cli", "completion"), "public names and commands")],
]
"""From the ground up. A room imports from the floors below its own only."""


def modules() -> dict[str, Path]:
    """All modules of the package by their name without the package's; the face is ``__init__``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imports(text: str, known: frozenset[str]) -> set[str]:
    """The modules of the package that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smorms3_dist"):
            assert node.level == 0, "relative import"
            base = (node.module or "").removeprefix("smorms3_dist").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".removeprefix(".")
                found.add(name if name in known else base or "__init__")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                if top == "smorms3_dist":
                    found.add(rest or "__init__")
    return found


def floors() -> dict[str, tuple[int, str]]:
    """The floor and the room of each folder and module directly in the package."""
    return {
        module: (number, room.name)
        for number, floor in enumerate(FLOORS)
        for room in floor
        for module in room.modules
    }


def breaks_the_rule(importer: str, imported: str) -> bool:
    """Whether a module imports from its own floor's other rooms, or from above."""
    here, there = (floors()[name.partition(".")[0]] for name in (importer, imported))
    return here[1] != there[1] and there[0] >= here[0]


@functools.cache
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path.read_text(), frozenset(known)) for name, path in known.items()}


def test_every_module_is_in_a_room() -> None:
    assert {name.partition(".")[0] for name in modules()} == set(floors())


def test_rooms_import_from_the_floors_below() -> None:
    wrong = [
        f"{importer} imports {imported}"
        for importer, targets in arrows().items()
        for imported in targets
        if breaks_the_rule(importer, imported)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "from smorms3_dist.step.step import Step",
        "def late():\n    from smorms3_dist.optimizer import factory",
        "if TYPE_CHECKING:\n    import smorms3_dist.checkpoint.saving",
        "from smorms3_dist import shard",
    ],
)
def test_a_line_that_imports_from_above_is_noticed(line: str) -> None:
    (imported,) = imports(line, frozenset(modules()))
    assert breaks_the_rule("sharding.buffers", imported)


def test_no_module_leads_back_to_itself() -> None:
    remaining = {name: set(targets) - {name} for name, targets in arrows().items()}
    while free := [name for name, targets in remaining.items() if not targets & remaining.keys()]:
        for name in free:
            del remaining[name]
    assert not remaining, f"these import each other in a circle: {sorted(remaining)}"


def test_a_name_of_a_module_or_a_class_means_one_thing() -> None:
    places = defaultdict(list)
    for name, path in modules().items():
        if path.stem not in ("__init__", "commands"):
            places[f"module {path.stem}"].append(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[f"class {node.name}"].append(name)
    twice = {what: where for what, where in places.items() if len(where) > 1}
    assert not twice


@functools.cache
def private_names_of_chainer() -> frozenset[str]:
    """The private attributes, methods and classes that Chainer's and ChainerMN's sources define."""
    found = set()
    for package in ("chainer", "chainermn"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        for path in Path(spec.origin).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
                elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
    return frozenset(name for name in found if re.match("_[^_]", name))


def touched(text: str, private: frozenset[str]) -> list[str]:
    """Where a module touches private names of Chainer's, other than by its own ``self``."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr in private:
            of = node.value
            own = isinstance(of, ast.Name) and of.id in ("self", "cls")
            # super() is a class of this package: Chainer's classes are not derived from.
            if not own and not ast.unparse(of).startswith("super("):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chainer"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [name for name in names if name.startswith("_")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value in private:
                found.append(ast.unparse(node))
    return found


# compat mends Chainer itself.
INSIDE_CHAINER = ("chainer_internals", "compat")


def test_one_room_touches_what_chainer_keeps_to_itself() -> None:
    private = private_names_of_chainer()
    wrong = {
        name: names
        for name, path in modules().items()
        if name.partition(".")[0] not in INSIDE_CHAINER
        and (names := touched(path.read_text(), private))
    }
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "rule._state = None",
        "optimizer.actual_optimizer._loss_scale",
        "getattr(param, '_loss_scale', None)",
        "from chainer.training.extensions import _snapshot",
        "from chainer.training.extensions._snapshot import find",
    ],
)
def test_a_line_that_touches_a_private_attribute_of_chainer_is_noticed(line: str) -> None:
    assert touched(line, private_names_of_chainer())


def test_a_room_says_what_each_of_its_modules_does() -> None:
    for name, path in modules().items():
        room, _, module = name.rpartition(".")
        if not room or path.stem == "__init__":
            continue
        docstring = ast.get_docstring(ast.parse((path.parent / "__init__.py").read_text())) or ""
        tested = next(Path(__file__).parent.glob(f"**/test_{module}.py"), None)
        assert f"`{module}`" in docstring or tested is not None, name
