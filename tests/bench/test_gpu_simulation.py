"""The model of steps on GPUs: the order of its two streams, and what the page says of it."""

from __future__ import annotations

import itertools
from pathlib import Path

from smorms3_dist import cli
from smorms3_dist.bench.gpu_simulation import SIZES, foretell, pipelined
from smorms3_dist.bench.summary import in_words
from smorms3_dist.plan.times import SPEEDS

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "gpus.md"


def test_buckets_are_reduced_beside_the_packing_and_the_updates_of_others() -> None:
    assert pipelined(1, 2, 3, 0) == 0
    assert pipelined(1, 2, 3, 1) == 1 + 2 + 3
    # Packed at 1, 2 and 4, reduced at 2, 3 and 5, updated at 3, 5 and 6.
    assert pipelined(1, 1, 1, 3) == 6
    for pack, reduce, update in itertools.product((0.0, 0.5, 3.0), repeat=3):
        for count in (1, 2, 7):
            found = pipelined(pack, reduce, update, count)
            # Nothing is lost where only one stream has work to do, and never more than that.
            least = max(count * (pack + update) + reduce, pack + count * reduce + update)
            assert (least if count == 1 else max(least - reduce, 0)) <= found
            assert found <= count * (pack + reduce + update) + 1e-9
            if reduce == 0 or pack == update == 0:
                assert found == pytest.approx(count * (pack + reduce + update))


def test_what_is_double_buffered_or_overlapped_takes_no_longer() -> None:
    for size, ranks in itertools.product(SIZES, (1, 2, 8, 64, 512)):
        step = foretell(size, ranks, 8, SPEEDS["nccl"])
        assert 0 < step.double_buffered <= step.overlapped <= step.in_turn * (1 + 1e-9)
        if ranks > 1:
            assert step.overlapped < step.chainermn
            assert step.in_backward <= step.overlapped * (1 + 1e-9)
            # As long as a model has several buckets.
            assert ranks > 64 or step.in_backward < step.overlapped
        else:
            assert step.in_backward == pytest.approx(step.overlapped, rel=1e-4)


def test_the_command_says_that_it_is_a_model_and_of_what(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "--simulate", "64", "--gpus"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "A model, not a measurement: 8 GPUs a host, 300 GB/s a GPU within it, 50 GB/s a host, "
        "2000 GB/s of memory, 5 us a message."
    )
    assert [line.split()[1] for line in lines if line.startswith("| ")].count("64") == len(SIZES)
    options = ["--ranks-per-host", "4", "--bandwidth", "100", "--latency", "20"]
    assert cli.main(["bench", "--simulate", "2", "--gpus", *options]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "4 GPUs a host" in first and "12.5 GB/s a host" in first and "20 us a message" in first


def test_the_page_has_what_the_model_says() -> None:
    page = PAGE.read_text()
    for size, ranks in itertools.product(SIZES, (8, 64)):
        step = foretell(size, ranks, 8, SPEEDS["nccl"])
        cells = (f"{size / 1e6:.1f}M", str(ranks), *map(in_words, step), f"{step.gain:.0%}")
        assert f"| {' | '.join(cells)} |" in page
