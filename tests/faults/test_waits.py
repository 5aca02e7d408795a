"""The waits that `tests/faults/waits.py` takes out are still there."""

from __future__ import annotations

import pytest
import waits


@pytest.mark.parametrize("wait", waits.WAITS, ids=lambda wait: f"{wait.file}-{wait.before}")
def test_each_wait_can_be_taken_out(wait: waits.Wait) -> None:
    source = (waits.ROOT / wait.path).read_text()
    mutated = waits.without(wait, source)
    assert mutated != source
    compile(mutated, wait.file, "exec")
