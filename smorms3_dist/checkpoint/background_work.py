"""Work that a save gives to a thread, or does at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class BackgroundWork:
    """Something that communicates with nobody.

    Args:
        work: What is done.
        in_thread: Whether in a thread of its own. Otherwise it is done when this has been made.
    """

    def __init__(self, work: Callable[[], Any], in_thread: bool) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._work: Callable[[], Any] | None = work
        self._thread: threading.Thread | None = None
        if in_thread:
            # A program does not wait for it at its end: what is not committed then never will be.
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run()

    @property
    def is_running(self) -> bool:
        """Whether it has still to go on."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for it; returns whether it has ended."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.is_running

    def _run(self) -> None:
        assert self._work is not None
        try:
            self.result = self._work()
        except BaseException as error:  # to be raised on all ranks, by the thread of the training
            self.error = error
        finally:
            self._work = None
