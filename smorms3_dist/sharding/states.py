"""The states of a shard: arrays of as many elements each, in a single allocation.

Checkpoints copy them and read them back. One large copy is faster than several smaller ones: only
from some size on does the C library write past the caches. And what has been read into a block of
host memory can take the place of the one before, without any copy.

In host memory each array starts at a place of its own within a page
(`smorms3_dist.device.memory.offset_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from smorms3_dist.device.memory import STATES, Memory, assign, offset_of
from smorms3_dist.layout import ALIGNMENT

import numpy as np

IN_FLIGHT = "gradient_in_flight"
"""The array with the mean gradient that the next update applies, with double buffering."""


class States(Mapping[str, Any]):
    """Arrays by name, one behind the other in one block of memory, without values at first.

    ``owner`` is whose states they are, as an error says it.

    Attributes:
        block: The bytes of all of them: each starts at a multiple of `ALIGNMENT`.

    Raises:
        MemoryError: If there is no memory for them.
    """

    def __init__(
        self, memory: Memory, size: int, dtypes: Mapping[str, np.dtype], owner: str
    ) -> None:
        self._size = size
        self._dtypes = dict(dtypes)
        self._starts, nbytes = [], 0
        for index, dtype in enumerate(self._dtypes.values()):
            own = size * dtype.itemsize
            start = nbytes
            if own >= memory.page:
                start += (offset_of(index) - start) % memory.page
            self._starts.append(start)
            nbytes = start + -(-own // ALIGNMENT) * ALIGNMENT
        what = f"the states {', '.join(dtypes)} of {owner}" if dtypes else f"no states of {owner}"
        self.block = memory.empty(nbytes, np.dtype(np.uint8), what, STATES)
        self._arrays = self.views_of(self.block)

    def __getstate__(self) -> dict[str, Any]:
        # Views would be copied as arrays of their own.
        return {**self.__dict__, "_arrays": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._arrays = self.views_of(self.block)

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def views_of(self, block: Any) -> dict[str, Any]:
        """The arrays in another block, say in a copy."""
        return {
            name: block[start : start + self._size * dtype.itemsize].view(dtype)
            for start, (name, dtype) in zip(self._starts, self._dtypes.items(), strict=True)
        }

    def replace_block(self, block: np.ndarray) -> None:
        """Overwrites all arrays with those of a block in host memory.

        Args:
            block: As many bytes as ``block`` has. It may become a part of this, so its owner must
                forget it.
        """
        if hasattr(self.block, "get"):
            assign(self.block, block)
        else:
            self.block = block
            self._arrays = self.views_of(block)
