"""The words that ranks of MPI exchange before each step, and the last one, when a script ends.

Words have a communicator of their own, one for each communicator of the user's, whatever number of
optimizers uses that. All exchanges of words are non-blocking ones, so that a rank whose script has
ended can wait in all of them at once for what comes first: the others come to their next exchange,
and learn that it has left; or they end as well, and nothing is said.

The communicator is made in the first exchange, since making it is collective, and a rank may have
made an optimizer that it never uses. So the first words go over the user's communicator, each to
each rank directly: a rank that leaves before its first update sends them, and need not wait for
others, which may have no optimizer at all.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import time
from typing import TYPE_CHECKING, Any

from smorms3_dist.collectives.base import LEFT
from smorms3_dist.phases import of_process
from smorms3_dist.rank_page import note_end
from smorms3_dist.waiting import Wait, watch

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

_LONGEST_PAUSE_S = 0.02
"""A rank that has ended looks so often at least for what the others do."""

_PATIENCE_S = 1.0
"""So long a rank that leaves before its first update waits for the first words of others, so that
nothing is under way when MPI ends. What it has sent they receive in any case."""


class MpiWords:
    """The words of one communicator.

    Args:
        comm: The user's communicator, duplicated in the first exchange.

    Attributes:
        wait: What this rank is waiting for.
        shared: See `Collectives.shared`.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._users_comm = comm
        self._own_comm: MPI.Intracomm | None = None
        self._word = np.zeros(1, np.int64)
        self._first_words = np.zeros(comm.size, np.int64)
        self.wait = Wait(comm.rank, of_process)
        self.shared: dict[Any, Any] = {}
        self._users = itertools.count(1)
        if comm.size > 1:
            watch(self.wait)
            _at_end(self)

    @property
    def begun(self) -> bool:
        """Whether all ranks have come to the first exchange."""
        return self._own_comm is not None

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
            return self._start_first(word)
        self._word[0] = word
        return self._own_comm.Iallreduce(MPI.IN_PLACE, self._word, MPI.BOR)

    def _start_first(self, word: int) -> MPI.Request:
        from mpi4py import MPI

        # With counts, MPI libraries send each word at once: nobody passes on those of others.
        size = self._users_comm.size
        ones, places = np.ones(size, np.intc), np.arange(size, dtype=np.intc)
        mine = np.full(size, word, np.int64)
        return self._users_comm.Ialltoallv(
            [mine, (ones, places), MPI.INT64_T],
            [self._first_words, (ones, places), MPI.INT64_T],
        )

    @property
    def result(self) -> int:
        """The outcome of the last exchange. After one in which somebody has left there is none."""
        if self._own_comm is not None:
            word = int(self._word[0])
        else:
            word = int(np.bitwise_or.reduce(self._first_words))
            if not word & LEFT:
                self._own_comm = self._users_comm.Dup()
        if word & LEFT:
            self.close()
        return word

    def gather(self, note: Any) -> list[Any]:
        """See `Collectives.exchange_note`."""
        if self._own_comm is not None:
            return self._own_comm.allgather(note)
        # Those who have left before their first update have said all that they had to say.
        there = np.flatnonzero(self._first_words & LEFT == 0).tolist()
        group = self._users_comm.group.Incl(there)
        comm = self._users_comm.Create_group(group)
        notes: list[Any] = [Wait(0).farewell] * self._users_comm.size
        for rank, theirs in zip(there, comm.allgather(note), strict=True):
            notes[rank] = theirs
        comm.Free()
        group.Free()
        return notes

    def close(self) -> None:
        """Nothing is to be said when the script ends."""
        if self in _open:
            _open.remove(self)

    def close_unless_begun(self) -> None:
        """The user frees the communicator, which does not matter to its duplicate."""
        if not self.begun:
            self.close()


def words_of(comm: MPI.Intracomm) -> MpiWords:
    """The words of a communicator, the same for all who ask."""
    from mpi4py import MPI

    global _key
    if _key is None:
        _key = MPI.Comm.Create_keyval(delete_fn=_freed)
    words = comm.Get_attr(_key)
    if not isinstance(words, MpiWords):
        words = MpiWords(comm)
        comm.Set_attr(_key, words)
    return words


def _freed(comm: MPI.Comm, key: int, words: MpiWords) -> None:
    """Notes that a communicator of the user's is freed."""
    words.close_unless_begun()


_key: int | None = None
_open: list[MpiWords] = []
_owner = 0
_fails = False


def _at_end(words: MpiWords) -> None:
    """Notes words that this rank will have to take leave of."""
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
    for words, request in exchanges:
        if not words.begun:
            # Its arrays are written to when Python has ended.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(request))
    impatient = time.monotonic() + _PATIENCE_S
    pause = 0.0
    while exchanges:
        time.sleep(pause)
        pause = min(pause + 0.001, _LONGEST_PAUSE_S)
        for words, request in exchanges:
            if request.Test() and words.result & ~LEFT and words.begun:
                words.gather(words.wait.farewell)
        if time.monotonic() > impatient:
            exchanges = [(words, request) for words, request in exchanges if words.begun]
        exchanges = [(words, request) for words, request in exchanges if words in _open]
