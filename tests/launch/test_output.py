"""Lines of ranks: put together whole, prefixed, and kept."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from smorms3_dist.launch import alike
from smorms3_dist.launch.output import TAIL_LINES, Lines, Output
from smorms3_dist.launch.wire import MAX_LINE_BYTES

import pytest


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_lines_are_put_together_from_pieces(size: int) -> None:
    data = b"one\n\ntwo \xff\x00\nthree\r\nrest"
    lines = Lines()
    found = []
    for start in range(0, len(data), size):
        found += lines.feed(data[start : start + size])
    assert found == [b"one", b"", b"two \xff\x00", b"three\r"]
    assert lines.rest() == b"rest"
    assert lines.rest() == b""


def test_a_line_without_an_end_is_cut() -> None:
    lines = Lines()
    found = list(lines.feed(b"a" * (2 * MAX_LINE_BYTES + 5) + b"\nb\n"))
    assert [len(line) for line in found] == [MAX_LINE_BYTES, MAX_LINE_BYTES, 5, 1]
    assert list(lines.feed(b"c" * MAX_LINE_BYTES)) == []
    assert list(lines.feed(b"c")) == [b"c" * MAX_LINE_BYTES]


def test_lines_are_shown_with_the_rank_before_them(capfdbinary: pytest.CaptureFixture) -> None:
    output = Output(12, {0, 11}, None)
    output.line(0, b"zero \xff", is_error=False)
    output.line(1, b"not shown", is_error=False)
    output.line(11, b"eleven", is_error=True)
    output.say("words")
    out, err = capfdbinary.readouterr()
    assert out == b"[ 0] zero \xff\n"
    assert err == b"[11] eleven\nsmorms3-dist run: words\n"


def test_where_one_rank_is_shown_nothing_stands_before_its_lines(
    capfdbinary: pytest.CaptureFixture,
) -> None:
    for output in (Output(12, {11}, None), Output(1, {0}, None)):
        output.line(0, b"zero", is_error=False)
        output.line(11, b"eleven", is_error=False)
    assert capfdbinary.readouterr() == (b"eleven\nzero\n", b"")


def test_the_time_stands_before_each_line(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture
) -> None:
    output = Output(2, {0, 1}, tmp_path, timestamps=True)
    output.line(1, b"one", is_error=False)
    output.say("words")
    output.close()
    out, err = capfdbinary.readouterr()
    time = rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} "
    assert re.fullmatch(time + rb"\[1\] one\n", out)
    assert re.fullmatch(time + rb"smorms3-dist run: words\n", err)
    assert re.fullmatch(time + rb"one\n", (tmp_path / "rank-01.log").read_bytes())


TRACEBACK = b"Traceback (most recent call last):\n  File 'x', line 1\n    f()\nValueError: %s"


def test_a_traceback_of_several_ranks_is_shown_once(capfdbinary: pytest.CaptureFixture) -> None:
    output = Output(4, range(4), None)
    lines = {rank: (TRACEBACK % b"no").splitlines() for rank in (2, 0, 3)}
    lines[3] = (TRACEBACK % b"yes").splitlines()
    for number in range(4):
        # They come mixed, and are shown whole.
        for rank in lines:
            output.line(rank, lines[rank][number], is_error=True)
    shown = capfdbinary.readouterr().err.decode().splitlines()
    assert shown == [
        *(f"[2] {line.decode()}" for line in lines[2]),
        "[0] the same traceback as that of rank 2: ValueError: no",
        *(f"[3] {line.decode()}" for line in lines[3]),
    ]
    # The same rank may raise the same again.
    for line in lines[2]:
        output.line(2, line, is_error=True)
    output.line(0, b"and now", is_error=True)
    assert len(capfdbinary.readouterr().err.splitlines()) == 5


def test_a_traceback_that_does_not_end_is_shown(
    capfdbinary: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = TRACEBACK.splitlines()[:2]
    output = Output(2, range(2), None)
    for line in start:
        output.line(0, line, is_error=True)
    assert capfdbinary.readouterr().err == b""
    output.say("words")
    assert [line[:4] for line in capfdbinary.readouterr().err.splitlines()] == [b"[0] "] * 2 + [
        b"smor"
    ]
    monkeypatch.setattr(alike, "_PATIENCE_S", 0)
    for line in start:
        output.line(0, line, is_error=True)
    output.line(1, b"other", is_error=True)
    assert len(capfdbinary.readouterr().err.splitlines()) == 3


def test_last_lines_are_shown_again_only_where_others_have_come_after_them(
    capfdbinary: pytest.CaptureFixture,
) -> None:
    def last(*lines: tuple[int, bytes], of: int, shown: Collection[int] = range(3)) -> list[bytes]:
        output = Output(3, shown, None)
        for rank, line in lines:
            for each in line.splitlines():
                output.line(rank, each, is_error=True)
        capfdbinary.readouterr()
        output.show_tail(of)
        return capfdbinary.readouterr().err.splitlines()

    head = b"smorms3-dist run: the last lines of rank 1:"
    error = TRACEBACK % b"no"
    assert last((0, b"zero"), (1, b"one"), of=1) == []
    assert last((1, b"one"), (0, b"zero"), of=1) == [head, b"  | one"]
    assert last((1, b"one"), of=1, shown=[0]) == [head, b"  | one"]
    assert last((0, b"zero"), of=1) == []
    # A traceback that all have alike is the last that all have said.
    alike = [(0, error), (1, error), (1, b"ending"), (2, error)]
    assert last(*alike, of=1) == last(*alike, of=0) == []
    assert len(last(*alike[:2], (2, b"two"), (1, b"ending"), (0, b"x"), of=1)) == 6


def test_every_rank_has_a_file_and_the_last_lines_are_kept(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture
) -> None:
    output = Output(3, set(), tmp_path / "logs" / "attempt-0")
    output.line(0, b"a", is_error=False)
    output.line(2, b"b", is_error=True)
    output.line(0, b"\xfe", is_error=True)
    output.close()
    files = {path.name: path.read_bytes() for path in (tmp_path / "logs/attempt-0").iterdir()}
    assert files == {"rank-00.log": b"a\n\xfe\n", "rank-02.log": b"b\n"}
    assert capfdbinary.readouterr() == (b"", b"")
    output = Output(2, set(), None)
    for number in range(100):
        output.line(1, b"%d" % number, is_error=False)
    output.line(1, b"x" * 10000, is_error=False)
    tail = output.tail(1)
    assert len(tail) == TAIL_LINES
    assert tail[-2] == b"99"
    assert len(tail[-1]) < 10000
    assert output.tail(0) == []
