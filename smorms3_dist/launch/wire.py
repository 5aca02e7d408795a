"""What launcher and agents say to each other: frames on a TCP connection.

A frame is a kind (a byte), the length of its content (4 bytes, big-endian) and the content: a JSON
object, or bytes that a rank has printed. Before the first one, both sides prove that they know the
secret of the job, without saying it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import socket
import struct
from typing import Any

MESSAGE = b"J"
"""The kind of frames with a JSON object."""

STDOUT, STDERR = b"O", b"E"
"""The kinds of frames with a line that a rank has printed, with its end, or with a piece of one."""

MAX_LINE_BYTES = 1 << 20
"""Longer lines are cut in two."""

_HEAD = struct.Struct("!cI")

_TCP_INFO = struct.Struct("=24xI28xI")
"""Of Linux's ``struct tcp_info``: segments without an answer, milliseconds since the last one."""

_MAX_BYTES = MAX_LINE_BYTES + (1 << 16)
_NONCE_BYTES = _PROOF_BYTES = 32


class WireError(Exception):
    """The other side is not one of the job, or does not keep to the protocol."""


class Wire:
    """One connection, of which asyncio gives both directions."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def prove(self, secret: bytes, listening: bool) -> None:
        """Makes sure that both sides know the secret, and raises a `WireError` if they do not.

        The side that is `listening` has been connected to.
        """
        mine = os.urandom(_NONCE_BYTES)
        self._writer.write(mine)
        try:
            theirs = await self._reader.readexactly(_NONCE_BYTES)
            roles = (b"launcher", b"agent") if listening else (b"agent", b"launcher")
            nonces = mine + theirs if listening else theirs + mine
            self._writer.write(hmac.digest(secret, roles[0] + nonces, "sha256"))
            proof = await self._reader.readexactly(_PROOF_BYTES)
        except asyncio.IncompleteReadError as error:
            raise WireError("it has closed the connection") from error
        if not hmac.compare_digest(proof, hmac.digest(secret, roles[1] + nonces, "sha256")):
            raise WireError("it does not know the secret of the job")

    def tell(self, **message: Any) -> None:
        """Sends a JSON object; does not wait until it is sent."""
        self.send(MESSAGE, json.dumps(message).encode())

    def send(self, kind: bytes, content: bytes) -> None:
        """Sends a frame; does not wait until it is sent."""
        if not self._writer.is_closing():
            self._writer.write(_HEAD.pack(kind, len(content)) + content)

    async def drain(self) -> None:
        """Waits while more is to be sent than the other side takes."""
        await self._writer.drain()

    async def receive(self) -> tuple[bytes, bytes] | None:
        """Kind and content of a frame; ``None`` if the other side has closed the connection."""
        try:
            kind, length = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
            if kind not in (MESSAGE, STDOUT, STDERR) or length > _MAX_BYTES:
                raise WireError(f"a frame of kind {kind!r} and {length} bytes")
            return kind, await self._reader.readexactly(length)
        except asyncio.IncompleteReadError:
            return None

    def addresses(self) -> tuple[str, str]:
        """The address of this side, and that of the other one."""
        names = (self._writer.get_extra_info(name)[0] for name in ("sockname", "peername"))
        # As a socket for both versions of IP has those of version 4.
        own, other = (str(name).removeprefix("::ffff:").partition("%")[0] for name in names)
        return own, other

    def unanswered(self) -> float:
        """For how many seconds the other host has not taken what was sent; 0 if nothing was.

        It takes it as long as it runs and is connected, even if the process there is stopped.
        """
        own = self._writer.get_extra_info("socket")
        try:
            info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:
            return 0.0
        unacknowledged, since_last_ms = _TCP_INFO.unpack(info)
        return since_last_ms / 1000 if unacknowledged else 0.0

    def close(self) -> None:
        """Closes the connection. It may be called again."""
        self._writer.close()


def parse(content: bytes) -> dict[str, Any]:
    """The JSON object of a message."""
    try:
        message = json.loads(content)
    except ValueError as error:
        raise WireError("a message that is not JSON") from error
    if not isinstance(message, dict):
        raise WireError("a message that is no object")
    return message
