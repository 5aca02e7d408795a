"""Lines of ranks: put together whole, prefixed, and kept."""

from __future__ import annotations

from pathlib import Path

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
