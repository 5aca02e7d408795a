"""Which failures are not worth another start."""

from __future__ import annotations

from smorms3_dist.launch.restarts import Failure, early_failure

import pytest

IMPORT = b"ModuleNotFoundError: No module named 'my'"
LINES = [b"Traceback (most recent call last):", IMPORT, b"smorms3_dist: rank 1 failed; ending", b""]


def test_a_failure_before_any_step_is_known_by_its_last_words() -> None:
    assert early_failure(1, 0, 2.0, LINES) == Failure(1, IMPORT)
    usage = b"train.py: error: unrecognized arguments: --epcoh"
    assert early_failure(2, 0, 2.0, [b"usage: train.py", usage]) == Failure(2, usage)
    assert early_failure(3, 0, 2.0, []) == Failure(3, b"")


@pytest.mark.parametrize(
    ("status", "steps", "seconds", "lines"),
    [
        (1, 1, 2.0, LINES),
        (1, 0, 3000.0, LINES),
        (137, 0, 2.0, LINES),
        (1, 0, 2.0, [b"ConnectionRefusedError: [Errno 111] Connection refused"]),
        (1, 0, 2.0, [b"FileNotFoundError: [Errno 2] No such file or directory: 'data'"]),
        (1, 0, 2.0, [b"MemoryError"]),
    ],
)
def test_what_may_heal_is_tried_again(
    status: int, steps: int, seconds: float, lines: list[bytes]
) -> None:
    assert early_failure(status, steps, seconds, lines) is None
