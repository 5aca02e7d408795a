"""The words that ranks of MPI exchange before each step, and the last one, when a script ends.

Words have a communicator of their own, one for each communicator of the user's, whatever number of
optimizers uses that. All exchanges of words are non-blocking ones, so that a rank whose script has
ended can wait in all of them at once for what comes first: the others come to their next exchange,
and learn that it has left; or they end as well, and nothing is said.
"""

from __future__ import annotations

import atexit
import itertools
import os
import time
from typing import TYPE_CHECKING, Any

from smorms3_dist.collectives.base import LEFT
from smorms3_dist.rank_page import note_end
from smorms3_dist.waiting import Wait, watch

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

_LONGEST_PAUSE_S = 0.02
"""A rank that has ended looks so often at least for what the others do."""


class MpiWords:
    """The words of one communicator.

    Args:
        comm: The user's communicator, duplicated at the first exchange.

    Attributes:
        wait: What this rank is waiting for.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._users_comm = comm
        self._own_comm: MPI.Intracomm | None = None
        self._word = np.zeros(1, np.int64)
        self.wait = Wait(comm.rank)
        self._users = itertools.count(1)
        if comm.size > 1:
            watch(self.wait)

    def count_user(self) -> int:
        """See `Collectives.count_user`."""
        return next(self._users)

    def exchange(self, word: int) -> int:
        """See `Collectives.exchange_word`."""
        self.start(word).Wait()
        return self.result

    def start(self, word: int) -> MPI.Request:
        """Begins an exchange."""
        from mpi4py import MPI

        if self._own_comm is None:
            self._own_comm = self._users_comm.Dup()
            _at_end(self)
        self._word[0] = word
        return self._own_comm.Iallreduce(MPI.IN_PLACE, self._word, MPI.BOR)

    @property
    def result(self) -> int:
        """The outcome of the last exchange. After one in which somebody has left there is none."""
        word = int(self._word[0])
        if word & LEFT:
            _open.remove(self)
        return word

    def gather(self, note: Any) -> list[Any]:
        """See `Collectives.exchange_note`."""
        assert self._own_comm is not None, "words come first"
        return self._own_comm.allgather(note)


def words_of(comm: MPI.Intracomm) -> MpiWords:
    """The words of a communicator, the same for all who ask."""
    from mpi4py import MPI

    global _key
    if _key is None:
        _key = MPI.Comm.Create_keyval()
    words = comm.Get_attr(_key)
    if not isinstance(words, MpiWords):
        words = MpiWords(comm)
        comm.Set_attr(_key, words)
    return words


_key: int | None = None
_open: list[MpiWords] = []
_owner = 0
_fails = False


def _at_end(words: MpiWords) -> None:
    """Notes words to which this rank has come."""
    global _owner
    if not _owner:
        _owner = os.getpid()
        _note_failures()
        # After it MPI is finalized, when Python has ended.
        atexit.register(_leave)
    _open.append(words)


def _note_failures() -> None:
    """Lets mpi4py's runner say here that it is about to end the job, because the script fails."""
    from mpi4py import MPI

    inner = MPI._set_abort_status

    def set_abort_status(status: int) -> None:
        global _fails
        _fails = bool(status)
        inner(status)

    MPI._set_abort_status = set_abort_status


def _leave() -> None:
    """Tells the others that this rank's script has ended, as soon as they ask; waits until then."""
    from mpi4py import MPI

    if _owner != os.getpid() or _fails or MPI.Is_finalized():
        return
    note_end()
    exchanges = [(words, words.start(LEFT)) for words in _open]
    pause = 0.0
    while exchanges:
        time.sleep(pause)
        pause = min(pause + 0.001, _LONGEST_PAUSE_S)
        for words, request in exchanges:
            if request.Test() and words.result & ~LEFT:
                words.gather(words.wait.farewell)
        exchanges = [(words, request) for words, request in exchanges if words in _open]
