"""Takes the waits out of the collectives on GPUs, one by one: a test has to fail each time.

    python tests/faults/waits.py [WORDS]    only those whose line has the words

Each is taken out of a copy of the package, in which the tests of what runs on streams run. It
prints which test has failed, and exits with 1 if none did. It takes a few minutes.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
TESTS = [
    *(f"tests/collectives/test_{name}.py" for name in ("nccl", "through_host", "cuda_aware")),
    "tests/step/test_cuda_overlap.py",
    "tests/step/test_cuda_gather.py",
    "tests/device/test_memory.py",
]


class Wait(NamedTuple):
    """A line of a file that lets somebody wait; the beginning of the next one; what instead.

    Files without a folder are in collectives/.
    """

    file: str
    line: str
    before: str
    instead: str = "pass"

    @property
    def path(self) -> str:
        """Below the checkout, or a copy of it."""
        return f"smorms3_dist/{self.file if '/' in self.file else f'collectives/{self.file}'}"


WAITS = [
    # The own part is reduced before it is consumed.
    Wait("nccl.py", "compute.wait_event(done)", "consume(group.piece"),
    # A bucket is packed before it is reduced, and what was consumed of its memory is used up.
    Wait(
        "nccl.py",
        "self._stream.wait_event(self._memory.event(compute))",
        "part = buckets.reduce(",
    ),
    # One bucket is packed while another is reduced.
    Wait(
        "nccl.py",
        "packed = buckets.memory_of(group, index)[: bucket.size]",
        "# In the order of",
        "packed = buckets.memory_of(group, 0)[: bucket.size]",
    ),
    # What another optimizer has received is used up before its memory is packed into.
    Wait("nccl.py", "compute.wait_event(self._link.used_up)", "def consume_part("),
    # Parameters are updated before they are gathered, and gathered before they are read.
    Wait("nccl.py", "self._stream.wait_event(self._memory.event(compute))", "yield comm"),
    Wait(
        "nccl.py",
        "compute.wait_event(self._memory.event(self._stream))",
        "def _communicator",
    ),
    # What goes on beside the training begins when its gradients are there, and is waited for.
    Wait(
        "beside.py",
        "self._stream.wait_event(self._memory.event(self._memory.current_stream()))",
        "with self._stream:",
    ),
    Wait(
        "beside.py",
        "self._memory.current_stream().wait_event(self._done)",
        "self._done = None",
    ),
    # Gradients are computed before they are packed; means are there before they are used.
    Wait(
        "nccl_early.py",
        "self._stream.wait_event(memory.event(memory.current_stream()))",
        "with self._stream:",
    ),
    Wait("step/early.py", "self.memory.follow(self.mark)", "return self.mean"),
    # What is not made use of is over before anything else is reduced.
    Wait("step/early.py", "piece.awaited()", "def abandon"),
    # Parameters are updated before they are gathered beside the forward pass.
    Wait(
        "nccl_gather.py",
        "self._stream.wait_event(memory.event(memory.current_stream()))",
        "with self._stream:",
    ),
    # They are there before they are read: on any stream, until they are there for all.
    Wait(
        "step/parameters_in_flight.py",
        "self._memory.follow(mark)",
        "return self._memory.has_come(mark)",
    ),
    Wait(
        "step/parameters_in_flight.py",
        "return self._memory.has_come(mark)",
        "def _wait_in_words",
        "return True",
    ),
    Wait("device/memory.py", "self.current_stream().wait_event(mark)", "if self._xp"),
    Wait("device/memory.py", "self.current_stream().wait_event(mark)", "def has_come"),
    # The host asks for errors before it goes on, and for the end before memory is used anew.
    Wait("nccl_gather.py", "wait.wait_for(gathered, self._comm)", "self._work = None"),
    Wait("nccl_gather.py", "self._finish(self._wait)", "def launch_all_gather"),
    Wait("optimizer/optimizer.py", "self._overlap_gather.finish()", "if self._accumulate"),
    Wait("optimizer/laid_out.py", "self._overlap_gather.finish()", "self._overlap_gather.forget"),
    # Nobody is held up by a rank without gradients to bring.
    Wait("optimizer/overlap.py", "self.hold_up_nobody()", "flags = NO_FLAGS"),
    Wait("optimizer/overlap.py", "self.hold_up_nobody()", "except Exception"),
    Wait("optimizer/overlap.py", "begun.hand_over_nothing()", "raise"),
    Wait("optimizer/optimizer.py", "self._overlap.hold_up_nobody()", "if end_training("),
    # A mean is on the device before it is consumed, and consumed before the next one comes.
    Wait(
        "through_host.py",
        "compute.wait_event(buffer.pinned.copied)",
        "consume(piece, Mean(on_de",
    ),
    Wait(
        "through_host.py",
        "self._to_device.wait_event(buffer.consumed)",
        "buffer.pinned.send(",
    ),
    # It has left the host before the next one is formed there.
    Wait("through_host.py", "buffer.pinned.wait()", "on_host = buffer.pinned.array(piece"),
    # Gradients are computed before they are fetched, fetched before they are sent.
    Wait(
        "through_host.py",
        "self._to_host.wait_event(now)",
        "self._to_device.wait_event(now)",
    ),
    Wait(
        "through_host.py",
        "pinned.wait()",
        "return pinned.array(piece.size, self._dtype)",
    ),
    # Parameters are read by kernels before others' come; they have come before they are read.
    Wait("through_host.py", "self._to_device.wait_event(now)", "return compute"),
    Wait("through_host.py", "pinned.wait()", "self._host.all_gather(array"),
    Wait(
        "through_host.py",
        "compute.wait_event(self._memory.event(self._to_device))",
        "def broadcast",
    ),
    # The same for what is broadcast.
    Wait("through_host.py", "pinned.wait()", "self._host.broadcast(on_host, root)"),
    Wait(
        "through_host.py",
        "compute.wait_event(self._memory.event(self._to_device))",
        "def _reduction",
    ),
    # Page-locked memory is fetched into when what it was sent from has left.
    Wait("through_host.py", "stream.wait_event(self.copied)", "on_device.get(stream"),
    # What MPI is given is there, and what it overwrites is used up.
    Wait(
        "cuda_aware.py",
        "self._memory.current_stream().synchronize()",
        "receives = self._receive",
    ),
    Wait(
        "cuda_aware.py",
        "self._memory.current_stream().synchronize()",
        "self._host.all_gather(",
    ),
    Wait(
        "cuda_aware.py",
        "self._memory.current_stream().synchronize()",
        "self._host.broadcast(",
    ),
]


def without(wait: Wait, source: str) -> str:
    """The source of a file with something else in the place of a wait.

    Raises:
        LookupError: If the wait is not there, or is there more than once.
    """
    lines = source.splitlines(keepends=True)
    found = [
        index
        for index, line in enumerate(lines)
        if line.strip() == wait.line
        and next((other for other in lines[index + 1 :] if other.strip()), "")
        .strip()
        .startswith(wait.before)
    ]
    if len(found) != 1:
        raise LookupError(f"{wait.file} has {wait.line} before {wait.before} {len(found)} times")
    lines[found[0]] = lines[found[0]].replace(wait.line, wait.instead)
    return "".join(lines)


def failed_test(wait: Wait, folder: pathlib.Path) -> str | None:
    """Which test fails without a wait, if any does; in a copy of the checkout."""
    path = folder / wait.path
    source = (ROOT / wait.path).read_text()
    path.write_text(without(wait, source))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += TESTS
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    path.write_text(source)
    lines = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0] if result.returncode == 1 and lines else None


def main(words: str) -> int:
    status = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for part in ("smorms3_dist", "tests", "pyproject.toml"):
            source = ROOT / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / part)
        for wait in WAITS:
            if words not in f"{wait.file}: {wait.line} before {wait.before}":
                continue
            test = failed_test(wait, folder)
            status |= test is None
            print(f"{wait.file}: without {wait.line}: {test or 'NO TEST FAILS'}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
