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
from smorms3_dist.bench.summary import CHAINER, CHAINERMN, OURS, Spread, in_words


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
    program = "smorms3_dist.bench."
    alone = (sys.executable,)
    yield Case(
        *("kernel", "all rules, 16M elements", OURS, 1, f"{program}rule_kernels"),
        *(("--elements", str(1 << 24)), False, alone),
    )
    yield Case(
        *("kernel", "all rules, 2M elements", OURS, 1, f"{program}rule_kernels"),
        *(("--elements", str(1 << 21)), "alone", alone),
    )

    def update(
        part: str,
        name: str,
        system: str,
        ranks: int,
        workload: str,
        *more: str,
        quick: bool | str = False,
    ) -> Case:
        arguments = ("--system", system, "--workload", workload, *more)
        return Case(part, name, system, ranks, f"{program}update_step", arguments, quick)

    for workload in ("59M", "19M", "powers of two", "one array", "200 small", "2000 small"):
        for system in (OURS, CHAINERMN):
            quick = workload in ("19M", "200 small")
            yield update("step", workload, system, 2, workload, quick=quick)
        if workload.endswith("small"):
            yield update(
                *("step", f"{workload} as one", OURS, 2, f"{workload} as one"),
                quick=workload == "200 small",
            )
    for hooks in (("WeightDecay",), ("WeightDecay", "GradientClipping")):
        for system in (OURS, CHAINERMN):
            name = f"59M, {' and '.join(hooks)}"
            yield update("hooks", name, system, 2, "59M", "--hooks", *hooks)
    for rule in ("Adam", "MomentumSGD"):
        for system in (OURS, CHAINERMN):
            yield update("rules", f"59M, {rule}", system, 2, "59M", "--rule", rule)
        yield update("rules", f"19M, {rule}", OURS, 2, "19M", "--rule", rule, quick="alone")
    yield update("checks", "59M, check_sync()", OURS, 2, "59M", "--check-sync")
    checked = ("--option", "check_finite=error")
    yield update("checks", '59M, check_finite="error"', OURS, 2, "59M", *checked)
    yield update("checks", "one element", OURS, 2, "one element", quick=True)
    for ranks in range(1, 9):
        for system in (OURS, CHAINERMN):
            if system == OURS or ranks in (1, 2, 4, 8):
                quick = system == OURS and ranks in (1, 3, 4)
                yield update("ranks", "19M", system, ranks, "19M", quick=quick)
    for model in ("ConvNet", "LSTM"):
        for system, ranks in ((OURS, 2), (CHAINERMN, 2), (CHAINER, 1)):
            yield Case(
                *("whole", model, system, ranks, f"{program}whole_step"),
                *(("--system", system, "--model", model), model == "ConvNet"),
            )
    yield Case("exchange", "64 MiB", OURS, 2, f"{program}rank_exchanges", (), True)
    yield Case("start", "starting", OURS, 1, f"{program}start_up", (), True, alone)


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
