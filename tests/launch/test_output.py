"""Lines of ranks: put together whole, prefixed, and kept."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from smorms3_dist.launch import alike
from smorms3_dist.launch.output import TAIL_LINES, Lines, Output, new_directory
from smorms3_dist.launch.wire import MAX_LINE_BYTES

import pytest


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_lines_are_put_together_from_pieces(size: int) -> None:
    data = b"one\n\ntwo \xff\x00\nthree\r\n 1%\r 2%\r\r\nrest"
    lines = Lines()
    found = []
    for start in range(0, len(data), size):
        found += lines.feed(data[start : start + size])
    assert found == [b"one\n", b"\n", b"two \xff\x00\n", b"three\r\n", b" 1%\r", b" 2%\r", b"\r\n"]
    assert lines.is_waiting
    assert lines.end() == b"rest\n"
    assert not lines.is_waiting


def test_a_line_may_be_given_before_it_is_finished() -> None:
    lines = Lines()
    assert list(lines.feed(b"a\nLoading")) == [b"a\n"]
    assert lines.unfinished() == b"Loading"
    assert not lines.is_waiting
    assert list(lines.feed(b" more\r")) == []
    assert lines.unfinished() == b" more\r"
    assert lines.end() == b"\n", "the line has had no end"
    assert list(lines.feed(b"b\n")) == [b"b\n"]
    assert lines.end() == b""


def test_a_line_without_an_end_is_cut() -> None:
    lines = Lines()
    found = list(lines.feed(b"a" * (2 * MAX_LINE_BYTES + 5) + b"\nb\n"))
    assert [len(line) for line in found] == [MAX_LINE_BYTES + 1, MAX_LINE_BYTES + 1, 6, 2]
    assert list(lines.feed(b"c" * MAX_LINE_BYTES)) == []
    assert list(lines.feed(b"c")) == [b"c" * MAX_LINE_BYTES + b"\n"]
    assert lines.end() == b"c\n"


def test_lines_are_shown_with_the_rank_before_them(capfdbinary: pytest.CaptureFixture) -> None:
    output = Output(12, {0, 11}, None)
    output.piece(0, b"zero \xff\n", is_error=False)
    output.piece(1, b"not shown\n", is_error=False)
    output.piece(11, b"eleven\r\n", is_error=True)
    output.say("words")
    out, err = capfdbinary.readouterr()
    assert out == b"[ 0] zero \xff\n"
    assert err == b"[11] eleven\r\nsmorms3-dist run: words\n"


def test_progress_bars_and_unfinished_lines_are_shown_and_never_mix_with_others(
    capfdbinary: pytest.CaptureFixture,
) -> None:
    output = Output(2, {0, 1}, None)
    for piece in (b"\r", b" 1%\r", b" 2%\r", b"\n"):
        output.piece(0, piece, is_error=False)
    assert capfdbinary.readouterr().out == b"[0]  1%\r[0]  2%\r\n"
    output.piece(0, b"Loading", is_error=False)
    output.piece(0, b" ...", is_error=False)
    output.piece(1, b"one\n", is_error=False)
    output.piece(0, b" done\n", is_error=False)
    output.piece(1, b" 3%\r", is_error=False)
    output.say("words")
    output.piece(1, b"no end", is_error=True)
    output.close()
    out, err = capfdbinary.readouterr()
    assert out == b"[0] Loading ...\n[1] one\n[0]  done\n[1]  3%\r\n"
    assert err == b"smorms3-dist run: words\n[1] no end\n"
    assert output.tail(0) == [b" 2%", b"Loading ... done"]
    assert output.tail(1) == [b"one", b" 3%", b"no end"]


def test_a_terminal_that_cannot_be_written_is_known_and_not_tried_again() -> None:
    code = (
        "import sys\n"
        "from smorms3_dist.launch.output import Output\n"
        "output = Output(1, {0}, None)\n"
        "for _ in range(2): output.piece(0, b'a\\n', is_error=False)\n"
        "stream, error = output.trouble\n"
        "print(stream, error.strerror, file=sys.stderr)\n"
    )
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (0, "stdout No space left on device\n")


def test_a_directory_for_output_is_never_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20300102-030405")
    names = [new_directory(tmp_path / "logs").name for _ in range(3)]
    assert names == ["20300102-030405", "20300102-030405-2", "20300102-030405-3"]


def test_where_one_rank_is_shown_nothing_stands_before_its_lines(
    capfdbinary: pytest.CaptureFixture,
) -> None:
    for output in (Output(12, {11}, None), Output(1, {0}, None)):
        output.piece(0, b"zero\n", is_error=False)
        output.piece(11, b"eleven\n", is_error=False)
    assert capfdbinary.readouterr() == (b"eleven\nzero\n", b"")


def test_the_time_stands_before_each_line(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture
) -> None:
    output = Output(2, {0, 1}, tmp_path, timestamps=True)
    output.piece(1, b"one\n", is_error=False)
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
            output.piece(rank, lines[rank][number] + b"\n", is_error=True)
    shown = capfdbinary.readouterr().err.decode().splitlines()
    assert shown == [
        *(f"[2] {line.decode()}" for line in lines[2]),
        "[0] the same traceback as that of rank 2: ValueError: no",
        *(f"[3] {line.decode()}" for line in lines[3]),
    ]
    # The same rank may raise the same again.
    for line in lines[2]:
        output.piece(2, line + b"\n", is_error=True)
    output.piece(0, b"and now\n", is_error=True)
    assert len(capfdbinary.readouterr().err.splitlines()) == 5


def test_a_traceback_that_does_not_end_is_shown(
    capfdbinary: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = TRACEBACK.splitlines()[:2]
    output = Output(2, range(2), None)
    for line in start:
        output.piece(0, line + b"\n", is_error=True)
    assert capfdbinary.readouterr().err == b""
    output.say("words")
    assert [line[:4] for line in capfdbinary.readouterr().err.splitlines()] == [b"[0] "] * 2 + [
        b"smor"
    ]
    monkeypatch.setattr(alike, "_PATIENCE_S", 0)
    for line in start:
        output.piece(0, line + b"\n", is_error=True)
    output.piece(1, b"other\n", is_error=True)
    assert len(capfdbinary.readouterr().err.splitlines()) == 3


def test_last_lines_are_shown_again_only_where_others_have_come_after_them(
    capfdbinary: pytest.CaptureFixture,
) -> None:
    def last(*lines: tuple[int, bytes], of: int, shown: Collection[int] = range(3)) -> list[bytes]:
        output = Output(3, shown, None)
        for rank, line in lines:
            for each in line.splitlines():
                output.piece(rank, each + b"\n", is_error=True)
        capfdbinary.readouterr()
        output.show_tail(of)
        return capfdbinary.readouterr().err.splitlines()

    head = b"smorms3-dist run: the last lines of rank 1:"
    error = TRACEBACK % b"no"
    assert last((0, b"zero"), (1, b"one"), of=1) == []
    others = [(0, b"zero"), (2, b"two")] * 5
    assert last((1, b"one"), *others, of=1) == [head, b"  | one"]
    assert last((1, b"one"), *others[1:], of=1) == []
    assert last((1, b"one"), of=1, shown=[0]) == [head, b"  | one"]
    assert last((0, b"zero"), of=1) == []
    # A traceback that all have alike is the last that all have said.
    alike = [(0, error), (1, error), (1, b"ending"), (2, error)]
    assert last(*alike, of=1) == last(*alike, of=0) == []
    assert len(last(*alike[:2], *others, of=1)) == 5


def test_every_rank_has_a_file_and_the_last_lines_are_kept(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture
) -> None:
    output = Output(3, set(), tmp_path / "logs" / "attempt-0")
    output.piece(0, b"a\n", is_error=False)
    output.piece(2, b"b\n", is_error=True)
    output.piece(0, b"\xfe\n", is_error=True)
    output.close()
    files = {path.name: path.read_bytes() for path in (tmp_path / "logs/attempt-0").iterdir()}
    assert files == {"rank-00.log": b"a\n\xfe\n", "rank-02.log": b"b\n"}
    assert capfdbinary.readouterr() == (b"", b"")
    output = Output(2, set(), None)
    for number in range(100):
        output.piece(1, b"%d\n" % number, is_error=False)
    output.piece(1, b"x" * 10000 + b"\n", is_error=False)
    tail = output.tail(1)
    assert len(tail) == TAIL_LINES
    assert tail[-2] == b"99"
    assert len(tail[-1]) < 10000
    assert output.tail(0) == []
