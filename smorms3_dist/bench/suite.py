"""The cases of the benchmark, part by part, and running them in turn.

A case is one system with one workload: processes of their own, so that no system inherits memory,
threads or caches of another. The cases of a round are run one after the other, the systems of a
workload side by side, and rounds repeat it all.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smorms3_dist.bench.conditions import describe
from smorms3_dist.bench.processes_of_cases import CaseError, mpirun, run_processes
from smorms3_dist.bench.summary import CHAINER, CHAINERMN, OURS, OVER_TCP, Spread, in_words


class Case(NamedTuple):
    """One system with one workload.

    Attributes:
        part: The part that it belongs to.
        name: What is measured: the same for the systems beside each other.
        system: Who does it.
        ranks: How many processes do it together.
        program: The module that they run.
        arguments: For the program.
        quick: Whether ``--quick`` measures it too; ``"alone"`` if nothing else does.
        starter: What the command begins with; empty for mpirun and this interpreter.
        makers: So many ranks run the program with ``--make`` before, and both are told of a new
            folder by ``--directory``; 0 for programs that have none.
    """

    part: str
    name: str
    system: str
    ranks: int
    program: str
    arguments: tuple[str, ...] = ()
    quick: bool | str = False
    starter: tuple[str, ...] = ()
    makers: int = 0


class Settings(NamedTuple):
    """How thoroughly everything is measured.

    Attributes:
        quick: Whether only the cases for the impatient are run.
        rounds: How often each case is run.
        folder: Where programs are started; ``None`` for where this process is.
        directory: Where programs that write files do so; ``None`` for the system's choice.
    """

    quick: bool
    rounds: int
    folder: Path | None = None
    directory: Path | None = None

    @property
    def of_programs(self) -> tuple[str, ...]:
        """What every program is told: how many steps at most, and the seconds that they take."""
        steps, budget = (5, 1) if self.quick else (11, 3)
        return "--steps", str(steps), "--budget", str(budget)


def cases() -> Iterator[Case]:
    """The cases that an installed package has."""
    yield _case("kernel", "all rules, 16M elements", OURS, 1, "rule_kernels", "--elements", _16M)
    more = _case("kernel", "all rules, 2M elements", OURS, 1, "rule_kernels", "--elements", _2M)
    yield more._replace(quick="alone")
    yield from _steps()
    for hooks in (("WeightDecay",), ("WeightDecay", "GradientClipping")):
        yield from _beside("hooks", f"59M, {' and '.join(hooks)}", "59M", "--hooks", *hooks)
    both = ("--hooks", "WeightDecay", "GradientClipping")
    yield _update("hooks", "19M, both", OURS, 2, "19M", *both)._replace(quick="alone")
    yield _update("hooks", "19M, GradientLARS", OURS, 2, "19M", "--hooks", "GradientLARS")
    for rule in ("Adam", "MomentumSGD"):
        yield from _beside("rules", f"59M, {rule}", "59M", "--rule", rule)
        quick = _update("rules", f"19M, {rule}", OURS, 2, "19M", "--rule", rule)
        yield quick._replace(quick="alone")
    yield from _beside("rules", "200 small, Adam", "200 small", "--rule", "Adam")
    yield _update("checks", "59M, check_sync()", OURS, 2, "59M", "--check-sync")
    checked = ("--option", "check_finite=error")
    yield _update("checks", '59M, check_finite="error"', OURS, 2, "59M", *checked)
    for workload in ("59M", "200 small"):
        yield _update("checks", f"{workload}, recorded", OURS, 2, workload, "--recorded")
    yield _update("checks", "one element", OURS, 2, "one element")._replace(quick=True)
    for ranks in range(1, 9):
        # Of 2 ranks --quick has a step of that model anyway.
        shared = ("--shared",) if ranks > 1 else ()
        ours = _update("ranks", "19M", OURS, ranks, "19M", *shared)
        yield ours._replace(quick=ranks in (1, 3, 4))
        if ranks in (1, 2, 4, 8):
            yield _update("ranks", "19M", CHAINERMN, ranks, "19M")
    for model in ("ConvNet", "LSTM"):
        for system, ranks in ((OURS, 2), (CHAINERMN, 2), (CHAINER, 1)):
            words = ("--system", system, "--model", model)
            whole = _case("whole", model, system, ranks, "whole_step", *words)
            yield whole._replace(quick=model == "ConvNet")
    within = _case("exchange", "64 MiB", OURS, 2, "rank_exchanges")._replace(quick=True)
    yield within
    yield within._replace(name=f"64 MiB {OVER_TCP}", arguments=("--over-tcp",))
    yield _case("start", "starting", OURS, 1, "start_up")._replace(quick=True)


_16M, _2M = str(1 << 24), str(1 << 21)


def _steps() -> Iterator[Case]:
    for workload in ("59M", "19M", "powers of two", "one array", "200 small", "2000 small"):
        quick = workload in ("19M", "200 small")
        as_one = ("--as-one",) if workload.endswith("small") else ()
        yield _update("step", workload, OURS, 2, workload, *as_one)._replace(quick=quick)
        yield _update("step", workload, CHAINERMN, 2, workload)._replace(quick=quick)
    for system in (OURS, CHAINER):
        yield _update("step", "200 small, one rank", system, 1, "200 small")


def _beside(part: str, name: str, workload: str, *words: str) -> Iterator[Case]:
    """Both systems on two ranks."""
    for system in (OURS, CHAINERMN):
        yield _update(part, name, system, 2, workload, *words)


def _update(part: str, name: str, system: str, ranks: int, workload: str, *words: str) -> Case:
    own = ("--system", system, "--workload", workload)
    return _case(part, name, system, ranks, "update_step", *own, *words)


def _case(part: str, name: str, system: str, ranks: int, program: str, *words: str) -> Case:
    case = Case(part, name, system, ranks, f"smorms3_dist.bench.{program}", words)
    return case._replace(starter=(sys.executable,)) if part in ("kernel", "start") else case


def run(chosen: Sequence[Case], settings: Settings, say: Callable[[str], object]) -> dict[str, Any]:
    """Runs cases, round after round.

    Args:
        chosen: The cases.
        settings: How thoroughly.
        say: Told about each case when it has ended.

    Returns:
        What can be stored as JSON: the ``machine``, and a list of ``runs``, each with the ``part``,
        ``name``, ``system``, ``ranks`` and ``round``, and what its program has written: ``seconds``
        by phase, a list of all that were timed, and what else it tells. What has failed is in
        ``failed``, with the reason.
    """
    result: dict[str, Any] = {
        "machine": describe(),
        "quick": settings.quick,
        "rounds": settings.rounds,
        "versions": {},
        "failed": [],
        "runs": [],
    }
    for number in range(settings.rounds):
        for case in chosen:
            what = f"{case.part}: {case.name}, {case.system}, {_counted(case.ranks)}"
            try:
                measured = _measured(case, settings)
            except CaseError as error:
                result["failed"].append({"what": what, "why": str(error)})
                say(f"{what}: FAILED: {error}")
                continue
            result["versions"].setdefault(case.system, {}).update(measured.pop("versions"))
            own = {key: getattr(case, key) for key in ("part", "name", "system", "ranks")}
            result["runs"].append(_rounded(own | {"round": number} | measured))
            say(f"{what}: {_told(measured)}")
    result["machine"]["load_average_at_end"] = round(os.getloadavg()[0], 2)
    return result


def _measured(case: Case, settings: Settings) -> dict[str, Any]:
    what = f"{case.name} with {case.system}"

    def start(ranks: int, *more: str) -> dict[str, Any]:
        starter = case.starter or (mpirun(), "-n", str(ranks), sys.executable)
        command = [*starter, "-m", case.program, *case.arguments, "--ranks", str(ranks)]
        return run_processes([*command, *settings.of_programs, *more], settings.folder, what)

    if not case.makers:
        return start(case.ranks)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.directory) as directory:
        start(case.makers, "--directory", directory, "--make")
        return start(case.ranks, "--directory", directory)


def _counted(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _told(measured: dict[str, Any]) -> str:
    """The first of the phases, or the step, for somebody who waits."""
    phases = measured["seconds"]
    phase = "step" if "step" in phases else next(iter(phases))
    taken = in_words(Spread.of(phases[phase]).median)
    return f"{phase} {taken}; others used {measured['cores_used_by_others']} cores"


def _rounded(value: Any) -> Any:
    """The same with four digits of all seconds."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
