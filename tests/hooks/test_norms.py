"""Norms of gradients: which sums have the bits of one process."""

from __future__ import annotations

import logging

from smorms3_dist.hooks import norms

import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks


def test_ranks_that_sum_up_differently_say_once_that_norms_take_longer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lanes = iter([8, 4])
    monkeypatch.setattr(norms, "lanes_of_blas", lambda dtype: next(lanes))

    def run(collectives: ThreadCollectives) -> None:
        for _ in range(2):
            assert norms.lanes_on_all_ranks(np.dtype("f"), collectives) is None

    with caplog.at_level(logging.INFO):
        run_ranks(2, run)
    (said,) = caplog.messages
    assert said.startswith("norms in float32 are taken of whole parameters")
