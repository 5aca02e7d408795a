"""The connection between launcher and agents: who is let in, and what frames look like."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

from smorms3_dist.launch import wire
from smorms3_dist.launch.wire import Wire, WireError

import pytest

SECRET = b"s" * 32


def connected(
    listening: Callable[[Wire], Awaitable[Any]], connecting: Callable[[Wire], Awaitable[Any]]
) -> tuple[Any, Any]:
    """Runs two functions on the two ends of a connection; returns what they return or raise."""

    async def run() -> tuple[Any, Any]:
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                result.set_result(await asyncio.wait_for(listening(Wire(reader, writer)), 20))
            except Exception as error:
                result.set_result(error)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            theirs = await asyncio.wait_for(connecting(Wire(reader, writer)), 20)
        except Exception as error:
            theirs = error
        writer.close()
        server.close()
        return await asyncio.wait_for(result, 20), theirs

    return asyncio.run(run())


async def mirror(w: Wire) -> None:
    while data := await w._reader.read(100):
        w._writer.write(data)


async def leave(w: Wire) -> None:
    w.close()


@pytest.mark.parametrize(
    ("other", "errors"),
    [
        (lambda w: w.prove(SECRET, listening=False), ()),
        (lambda w: w.prove(b"other", listening=False), WireError),
        (mirror, WireError),
        (leave, (WireError, OSError)),
    ],
    ids=["knows", "another", "mirror", "stranger"],
)
def test_both_sides_prove_that_they_know_the_secret(other: Any, errors: Any) -> None:
    ours, theirs = connected(lambda w: w.prove(SECRET, listening=True), other)
    assert isinstance(ours, errors) if errors else ours is None
    # Both sides know it, or neither.
    assert other in (mirror, leave) or type(theirs) is type(ours)


def test_frames_arrive_as_they_were_sent() -> None:
    line = bytes(range(256)) * 4096

    async def receive(w: Wire) -> list[Any]:
        return [await w.receive() for _ in range(4)]

    async def send(w: Wire) -> None:
        w.tell(hello={"rank": 3})
        w.send(wire.STDOUT, line)
        w.send(wire.STDERR, b"")
        await w.drain()

    ours, _ = connected(receive, send)
    assert ours[1:] == [(wire.STDOUT, line), (wire.STDERR, b""), None]
    assert wire.parse(ours[0][1]) == {"hello": {"rank": 3}}


@pytest.mark.parametrize("data", [b"X\0\0\0\0", b"J\xff\xff\xff\xff", b"O\0\x7f\0\0"])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    async def send(w: Wire) -> None:
        w._writer.write(data)
        await w.drain()

    ours, _ = connected(lambda w: w.receive(), send)
    assert isinstance(ours, WireError)


def test_messages_are_objects() -> None:
    for content in (b"{", b"[1]", b"\xff", b"3"):
        with pytest.raises(WireError):
            wire.parse(content)


def test_a_host_that_does_not_answer_is_known_by_what_it_has_not_taken() -> None:
    async def listen(w: Wire) -> float:
        await w.receive()
        return w.unanswered()

    async def send(w: Wire) -> None:
        w.tell(hello={})
        await w.drain()

    assert connected(listen, send)[0] == 0, "nothing was sent"

    numbers = [0] * 26
    numbers[6], numbers[14] = 1, 61_500
    own = SimpleNamespace(getsockopt=lambda *which: struct.pack("=26I", *numbers)[: which[-1]])
    writer = SimpleNamespace(get_extra_info=lambda name: own)
    cut_off = Wire(cast("Any", None), cast("Any", writer))
    assert cut_off.unanswered() == 61.5
    numbers[6] = 0
    assert cut_off.unanswered() == 0, "all was taken, a long time ago"
