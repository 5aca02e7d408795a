"""Reads, for all ranks together, what the steps since the last reading took and held."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

from smorms3_dist.optimizer.optimizer import ShardedOptimizer
from smorms3_dist.phases import Phase
from smorms3_dist.report.numbers import RankNumbers, summary
from smorms3_dist.report.prometheus import Address, Exporter
from smorms3_dist.step.agreement import meet


class StepMeter:
    """Where the time of steps goes, and memory: for loops without a Trainer. All ranks make it.

    Recording begins when it is made. Between two readings it costs some stores for each phase of a
    step; a reading is one exchange of all ranks.

    Example::

        meter = smorms3_dist.StepMeter(optimizer)
        for number, batch in enumerate(batches, 1):
            optimizer.update(model, *batch)
            if number % 100 == 0:
                numbers = meter.read()  # on all ranks
                if comm.rank == 0:
                    print(numbers["smorms3/step_s"], numbers["smorms3/slowest_rank"])

    Args:
        optimizers: The sharded optimizer, or several of one communicator. With several, a step is
            one update of each.
        prometheus: A port on which rank 0 serves the numbers of all ranks under ``/metrics``, on
            the loopback interface, or ``HOST:PORT``; given on all ranks. Needs the extra
            ``prometheus``.

    Attributes:
        ranks: The numbers of the last reading, by rank.

    Raises:
        ValueError: If the optimizers have different communicators, or there is none; or the port is
            none.
        RuntimeError: If rank 0 cannot serve, on all ranks.
    """

    def __init__(
        self,
        optimizers: ShardedOptimizer | Iterable[ShardedOptimizer],
        *,
        prometheus: int | str | None = None,
    ) -> None:
        self._optimizers = (
            [optimizers] if isinstance(optimizers, ShardedOptimizer) else list(optimizers)
        )
        recorders = {id(optimizer.phases): optimizer.phases for optimizer in self._optimizers}
        if len(recorders) != 1:
            raise ValueError(
                f"a StepMeter reads the optimizers of one communicator, and these have "
                f"{len(recorders)}: make one StepMeter for each communicator"
            )
        (self._phases,) = recorders.values()
        self._exporter: Exporter | None = None
        if prometheus is not None:
            self._serve(Address.of(prometheus))
        self.ranks: list[RankNumbers] = []
        self._phases.start()
        self._seconds = self._phases.settle()
        self._updates = self._count_updates()
        self._sent = self._count_bytes()

    def read(
        self, occasion: str = "a reading of a StepMeter", by_rank: bool = False
    ) -> dict[str, float]:
        """Gives the numbers of the steps since the last reading, by key. Collective.

        Args:
            occasion: What it is for, alike on all ranks, in errors.
            by_rank: Whether those of each rank come besides, as ``smorms3/rank0/step_s``.

        Returns:
            The same on all ranks; see docs/seeing.md. Without a step meanwhile, memory alone.

        Raises:
            RuntimeError: If other ranks make a step instead, or do something else, or have ended.
        """
        mine = self._read_own()
        collectives = self._optimizers[0].collectives
        with self._phases.during(Phase.AGREE):
            meet(collectives, occasion)
            self.ranks = collectives.all_gather_object(mine)
        if self._exporter is not None:
            self._exporter.show(self.ranks)
        return summary(self.ranks, by_rank)

    def close(self) -> None:
        """Ends what serves the numbers. It may be called again."""
        if self._exporter is not None:
            self._exporter.close()
            self._exporter = None

    def _serve(self, address: Address) -> None:
        """Lets rank 0 serve; an error of its own is one of all ranks. Collective."""
        collectives, problem = self._optimizers[0].collectives, None
        meet(collectives, "the begin of a StepMeter with prometheus")
        if collectives.rank == 0:
            try:
                self._exporter = Exporter(address)
            except (ImportError, OSError) as error:
                problem = str(error)
        problem = collectives.all_gather_object(problem)[0]
        if problem is not None:
            raise RuntimeError(f"rank 0: {problem}")

    def _read_own(self) -> RankNumbers:
        seconds, updates, sent = self._phases.settle(), self._count_updates(), self._count_bytes()
        own = RankNumbers(
            (updates - self._updates) / len(self._optimizers),
            tuple(now - before for now, before in zip(seconds, self._seconds, strict=True)),
            # Collectives that were replaced, as when a model goes to a GPU, take their count along.
            sum(max(0, now - self._sent.get(key, 0)) for key, now in sent.items()),
            self._memory(),
        )
        self._seconds, self._updates, self._sent = seconds, updates, sent
        return own

    def _count_updates(self) -> int:
        waits = {id(o.collectives.wait): o.collectives.wait for o in self._optimizers}
        return sum(wait.updates for wait in waits.values())

    def _count_bytes(self) -> dict[int, int]:
        """Bytes sent so far, by what has counted them."""
        counters = [optimizer.collectives.bytes_sent for optimizer in self._optimizers]
        return {id(counter): sum(counter.values()) for counter in counters}

    def _memory(self) -> dict[str, int]:
        found = {
            "state_bytes": sum(optimizer.state_bytes() for optimizer in self._optimizers),
            "rss_bytes": resident_bytes(),
        }
        first = self._optimizers[0]
        if first.layout is not None:
            on_gpu = first.sharded_model.groups[0].memory.bytes_on_gpu()
            if on_gpu:
                found["gpu_bytes"] = on_gpu
        return found


def resident_bytes() -> int:
    """Bytes of memory that this process has; where the system does not say, the most it has had."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")
