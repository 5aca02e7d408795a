"""Runs a job of two ranks, which is `job`, and judges how far it has come."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from smorms3_dist.doctor import processes
from smorms3_dist.doctor.findings import GREEN, Finding, green, red, yellow
from smorms3_dist.doctor.two_ranks_program import MARK, RANKS, STAGES
from smorms3_dist.launch.backends import Backend, BackendError, Start
from smorms3_dist.launch.run_module import python_command

_MODULE = "smorms3_dist.doctor.two_ranks_program"
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)\b.*")
_SHOWN_LINES = 3

_TO_END_S = 30.0
"""How long the launcher has to end a job whose time is over."""

_Reports = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class JobResult:
    """What became of the job, by what its ranks have said at each stage.

    `trouble` is how it failed, if it did; `variables` were set for it, and are not here; `not_run`
    is why it was not run, if it was not.
    """

    reports: _Reports = dataclasses.field(default_factory=dict)
    trouble: str = ""
    command: Sequence[str] = ()
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    not_run: str = ""


def run(backend: Backend | BackendError, library_works: bool, limit: float) -> JobResult:
    """Runs the job, for so many seconds at most, if the MPI library and its launcher work."""
    if isinstance(backend, BackendError):
        return JobResult(not_run="there is no launcher")
    if not library_works:
        return JobResult(not_run="mpi4py cannot be used")
    command = [*python_command("smorms3_dist"), "-m", _MODULE]
    start = Start(command, RANKS, hosts=None, forwarded=(), bind_to="none", more=())
    variables = backend.environment()
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return _run(backend.command(start), limit, {**one_thread, **variables}, variables)


def run_between(hosts: Sequence[str], limit: float) -> JobResult:
    """Runs the job by the launcher, a rank on each of two hosts, for so many seconds at most."""
    listed = ",".join(f"{host}:1" for host in hosts)
    limits = ["--timeout", str(limit), "--start-timeout", str(limit)]
    words = [*python_command("smorms3_dist"), "run", "-H", listed, *limits, "-m", _MODULE]
    return _run(words, limit + _TO_END_S, {}, {})


def _run(
    words: Sequence[str], limit: float, added: Mapping[str, str], variables: Mapping[str, str]
) -> JobResult:
    ended = processes.run(words, limit, {**os.environ, **added})
    trouble = ended.trouble
    if trouble and (said := _last_words(ended.stdout, ended.stderr)):
        trouble += f" ({said})"
    return JobResult(reports(ended.stdout), trouble, words, variables)


def reports(output: str) -> _Reports:
    """Finds what ranks have reported in what the job has printed."""
    found: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    for line in output.splitlines():
        _, mark, text = line.partition(MARK)
        if not mark:
            continue
        try:
            report = json.loads(text)
        except ValueError:
            continue  # a line that was cut off, or mixed with another: that rank has not reported
        found[report["stage"]].append(report)
    return found


def _last_words(stdout: str, stderr: str) -> str:
    """What explains a failure: the last exception, or else the last lines."""
    lines = [line.strip() for line in (stdout + "\n" + stderr).splitlines()]
    exceptions = [line for line in lines if _EXCEPTION.fullmatch(line)]
    if exceptions:
        return exceptions[-1]
    words = [line for line in lines if line.strip("-=* ") and MARK not in line]
    return " / ".join(words[-_SHOWN_LINES:])


def two_ranks(job: JobResult) -> Finding:
    """Judges whether the job has started as one of two ranks, and has ended well."""
    if job.not_run:
        return _not_run(job)
    worlds = job.reports["world"]
    alone = [report for report in worlds if report["size"] != RANKS]
    if alone:
        return red(
            f"MPI says that there {_ranks(alone[0]['size'])}, but {RANKS} were started: the "
            "launcher does not fit the MPI library",
            "see the launcher and the MPI wheels, above: both must be of one MPI",
        )
    if len(worlds) < RANKS:
        return red(f"the job {job.trouble or 'has not said anything'}", _by_hand(job))
    if job.trouble and _came_to(job, STAGES[-1]):
        return red(f"the job has done all it should, but {job.trouble}", _by_hand(job))
    hosts = " and ".join(dict.fromkeys(str(report["host"]) for report in worlds))
    root = [f"{n}={v}" for n, v in job.variables.items() if "RUN_AS_ROOT" in n]
    note = f"; as root, with {' and '.join(root)} set for it alone" if root else ""
    return green(f"mpirun has started {RANKS} ranks on {hosts}, which see each other{note}")


def all_reduce(job: JobResult) -> Finding:
    """Judges a sum over the two ranks."""
    before = _before(job, "all-reduce")
    if before is not None:
        return before
    reports = job.reports["all-reduce"]
    wrong = sum(report["wrong"] for report in reports)
    if wrong:
        return red(
            f"{wrong} of {sum(report['elements'] for report in reports)} sums are wrong",
            "the MPI library or its network does not work here: try another transport (Open MPI: "
            "export OMPI_MCA_pml=ob1)",
        )
    return green(f"{reports[0]['elements']} numbers summed over {RANKS} ranks, all sums are right")


def training(job: JobResult) -> Finding:
    """Judges training steps, whose results must be those of plain Chainer, bit for bit."""
    before = _before(job, "training")
    if before is not None:
        return before
    reports = job.reports["training"]
    differing = sum(report["differing"] for report in reports)
    what = f"{reports[0]['steps']} sharded steps of SMORMS3 ({reports[0]['kernel']} kernel)"
    if differing:
        largest = max(report["largest"] for report in reports)
        return red(
            f"{what}: {differing} of {sum(report['elements'] for report in reports)} parameters "
            f"differ from those of plain Chainer, by up to {largest:.3g}",
            "do not train with this installation; please report this with all that doctor says",
        )
    return green(f"{what} give the parameters of plain Chainer, bit for bit")


def between(job: JobResult) -> Finding:
    """Judges a job between two hosts: the first stage that it has not come through, or all."""
    for judge in (two_ranks, all_reduce, training):
        finding = judge(job)
        if finding.status != GREEN:
            return finding
    worlds = sorted(job.reports["world"], key=lambda report: int(report["rank"]))
    by = [f"{report['host']} by {report['interface'] or 'what MPI chooses'}" for report in worlds]
    return green(f"2 ranks sum and train as plain Chainer: {', '.join(by)}")


def is_cuda_aware(job: JobResult) -> bool | None:
    """Whether the MPI library takes pointers to the memory of GPUs; ``None`` if nobody said."""
    if job.not_run or not _came_to(job, "all-reduce"):
        return None
    return all(report["cuda_aware"] for report in job.reports["all-reduce"])


def _before(job: JobResult, stage: str) -> Finding | None:
    """What is to be said if the job has not come through a stage."""
    if job.not_run:
        return _not_run(job)
    if _came_to(job, stage):
        return None
    if not _came_to(job, STAGES[STAGES.index(stage) - 1]):
        return yellow("not known: the 2-rank job has not come to it", "mend that first")
    return red(f"the job {job.trouble or 'has not come to it'}", _by_hand(job))


def _came_to(job: JobResult, stage: str) -> bool:
    reports = job.reports[stage]
    return len(reports) == RANKS and all(report["size"] == RANKS for report in reports)


def _not_run(job: JobResult) -> Finding:
    return yellow(f"not run: {job.not_run}", "mend that first")


def _by_hand(job: JobResult) -> str:
    return f"see all that it says: {shlex.join(job.command)}"


def _ranks(size: int) -> str:
    return "is 1 rank" if size == 1 else f"are {size} ranks"
