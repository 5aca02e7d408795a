"""Files with checksums: of the whole, and of each block, so that parts can be checked.

The checksums (XXH3, 64 bits) find accidents: flipped bits, torn and misplaced writes, truncation.
They are no protection from somebody who means harm.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from smorms3_dist.checkpoint.files.errors import CheckpointError, naming

import xxhash

BLOCK_BYTES = 1 << 20
"""What is read at least to check a byte: little beside the shard of a rank, as ranks of another
number read the blocks at their borders twice; and much beside a checksum in the manifest."""

_PIECE_BYTES = 1 << 20
"""What is written and summed at once: few enough bytes that the cache still has them for the sums,
and enough that calls do not matter."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """Size and checksums of a file.

    Attributes:
        size: Bytes of the file.
        xxh3: Checksum of the whole file: 16 hexadecimal digits, as of ``xxhsum -H3``.
        block_bytes: Bytes of each block but the last one.
        blocks: Checksums of the blocks.
    """

    size: int
    xxh3: str
    block_bytes: int
    blocks: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return -(-self.size // self.block_bytes)

    def block(self, index: int) -> tuple[int, int]:
        """First byte of a block, and one past its last byte."""
        start = index * self.block_bytes
        return start, min(start + self.block_bytes, self.size)


class Damage(NamedTuple):
    """What is wrong with a file.

    Attributes:
        start: First byte of the first damaged block.
        stop: One past its last byte.
        blocks: How many blocks are damaged. It is 0, and the range is the whole file, if only the
            checksum of the whole is wrong.
    """

    start: int
    stop: int
    blocks: int

    def __str__(self) -> str:
        text = f"wrong checksum of the bytes {self.start} to {self.stop - 1}"
        if self.blocks > 1:
            text += f", the first of {self.blocks} damaged blocks"
        return text if self.blocks else f"{text}, but not of any block"


class SummedWriter:
    """Writes a new file from its start to its end, and computes its checksums on the way.

    Args:
        path: The file, which must not exist.
        block_bytes: Bytes of a block.

    Raises:
        CheckpointError: If it cannot be made.
    """

    def __init__(self, path: Path, block_bytes: int = BLOCK_BYTES) -> None:
        self.path = path
        self._block_bytes = block_bytes
        self._whole = xxhash.xxh3_64()
        self._block = xxhash.xxh3_64()
        self._blocks: list[str] = []
        self._size = 0
        self._small = bytearray(_PIECE_BYTES)
        self._held = 0
        with naming(path, "made"):
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115

    def __enter__(self) -> SummedWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes.

        Args:
            data: The bytes; a view of many is not copied, and few are gathered before they are
                written.

        Raises:
            CheckpointError: If the file cannot be written, say for want of space.
        """
        view = memoryview(data)
        if len(view) > len(self._small) - self._held:
            self._write_held()
        if len(view) < len(self._small):
            self._small[self._held : self._held + len(view)] = view
            self._held += len(view)
        else:
            self._write(view)

    def _write_held(self) -> None:
        self._write(memoryview(self._small)[: self._held])
        self._held = 0

    def _write(self, view: memoryview) -> None:
        while view:
            done = self._size % self._block_bytes
            part = view[: min(_PIECE_BYTES, self._block_bytes - done)]
            rest = part
            with naming(self.path, "written"):
                while rest:
                    rest = rest[self._file.write(rest) :]
            self._whole.update(part)
            self._block.update(part)
            self._size += len(part)
            if done + len(part) == self._block_bytes:
                self._end_block()
            view = view[len(part) :]

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block.reset()

    def finish(self) -> Sums:
        """Brings everything to the disk and closes the file.

        Raises:
            CheckpointError: If the disk does not take it.
        """
        self._write_held()
        with naming(self.path, "written"):
            os.fsync(self._file.fileno())
            self._file.close()
        if self._size % self._block_bytes:
            self._end_block()
        return Sums(self._size, self._whole.hexdigest(), self._block_bytes, tuple(self._blocks))

    def close(self) -> None:
        """Closes the file; unless `finish` came first, it is not whole."""
        self._file.close()


class SummedReader:
    """Reads ranges of a file, and checks each block before giving out a byte of it.

    A block is checked when something in it is first asked for. The last one is kept, so that small
    neighbouring ranges do not read it again. Not for several threads at once.

    Args:
        path: The file.
        sums: What it must be like; without them, nothing is checked.
        origin: Whose file it is, in words, for errors.

    Raises:
        CheckpointError: If it is missing, not a regular file, or not of the right size.
    """

    def __init__(self, path: Path, sums: Sums | None = None, origin: str = "") -> None:
        self.path = path
        self.origin = origin
        self._sums = sums
        self._held = -1
        self._buffer = bytearray()
        self._checked = bytearray(len(sums.blocks)) if sums is not None else bytearray()
        with naming(path, "opened", origin):
            # Opening a pipe would wait for its other end, without O_NONBLOCK.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                found = os.fstat(self._fd)
                if not stat.S_ISREG(found.st_mode):
                    raise self.error("is not a regular file")
                self.size = found.st_size
                if sums is not None and self.size != sums.size:
                    raise self.error(f"has {self.size} bytes, and {sums.size} were written")
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> SummedReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. It may be called again."""
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def error(self, reason: str) -> CheckpointError:
        """An error about this file."""
        return CheckpointError(self.path, reason + (f" ({self.origin})" if self.origin else ""))

    def read(self, start: int, out: memoryview) -> None:
        """Fills ``out`` with the bytes from ``start`` on.

        Args:
            start: First byte.
            out: Where they go; a view of bytes. If a block is damaged, zeros are left there instead
                of it.

        Raises:
            CheckpointError: If the file ends before, cannot be read, or is damaged there.
        """
        if self._sums is None:
            self._fill(start, out)
            return
        if start + len(out) > self.size:
            raise self.error(f"ends at byte {self.size}, before byte {start + len(out)}")
        while out:
            index = start // self._sums.block_bytes
            block_start, block_stop = self._sums.block(index)
            part = out[: block_stop - start]
            if index != self._held and self._checked[index]:
                self._fill(start, part)
            elif index != self._held and len(part) == block_stop - block_start:
                self._read_checked(index, block_start, part)
            else:
                if index != self._held:
                    self._hold(index, block_start, block_stop)
                offset = start - block_start
                part[:] = memoryview(self._buffer)[offset : offset + len(part)]
            start += len(part)
            out = out[len(part) :]

    def find_damage(self, progress: Callable[[int], Any]) -> Damage | None:
        """Reads the whole file and compares its checksums, which must have been given.

        Args:
            progress: Is called with the number of bytes of each block that has been read.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        sums = self._sums
        assert sums is not None
        whole = xxhash.xxh3_64()
        buffer = memoryview(bytearray(min(sums.block_bytes, sums.size)))
        damaged = []
        for index, expected in enumerate(sums.blocks):
            start, stop = sums.block(index)
            view = buffer[: stop - start]
            self._fill(start, view)
            whole.update(view)
            if xxhash.xxh3_64_hexdigest(view) != expected:
                damaged.append(index)
            progress(stop - start)
        if damaged:
            return Damage(*sums.block(damaged[0]), len(damaged))
        return None if whole.hexdigest() == sums.xxh3 else Damage(0, self.size, 0)

    def _hold(self, index: int, start: int, stop: int) -> None:
        self._held = -1
        if len(self._buffer) < stop - start:
            self._buffer = bytearray(stop - start)
        self._read_checked(index, start, memoryview(self._buffer)[: stop - start])
        self._held = index

    def _read_checked(self, index: int, start: int, out: memoryview) -> None:
        assert self._sums is not None
        self._fill(start, out)
        if xxhash.xxh3_64_hexdigest(out) != self._sums.blocks[index]:
            out[:] = bytes(len(out))
            raise self.error(f"is damaged: {Damage(start, start + len(out), 1)}")
        self._checked[index] = 1

    def _fill(self, start: int, out: memoryview) -> None:
        while out:
            with naming(self.path, "read", self.origin):
                count = os.preadv(self._fd, [out], start)
            if count == 0:
                raise self.error(f"ends at byte {start}, before byte {start + len(out)}")
            start += count
            out = out[count:]
