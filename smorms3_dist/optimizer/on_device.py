"""Methods of an optimizer whose model may be on another GPU than the current one.

A script that moves its model to ``@cupy:1`` and leaves the current GPU as it is works with
Chainer's optimizers, which look at each array; and each thread begins with GPU 0. What is made here
(flat buffers, streams, a communicator of NCCL) belongs where the model is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from smorms3_dist.sharding.model import memory_of_link

_Method = TypeVar("_Method", bound=Callable[..., Any])


def device_of(optimizer: Any) -> contextlib.AbstractContextManager[Any]:
    """Makes the GPU of an optimizer's target, if it has one, the current one within a block."""
    link = optimizer.actual_optimizer.target
    if link is None:
        return contextlib.nullcontext()
    return memory_of_link(link, optimizer.exact).current()


def on_its_device(method: _Method) -> _Method:
    """Makes the GPU of an optimizer's target the current one while a method of it runs."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwds: Any) -> Any:
        with device_of(self):
            return method(self, *args, **kwds)

    return run  # type: ignore[return-value]
