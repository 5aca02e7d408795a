"""Serves the numbers of all ranks to Prometheus, from rank 0."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from smorms3_dist.phases import Phase
from smorms3_dist.report.numbers import IMBALANCE, KEYS, PHASE_KEYS, SLOWEST, RankNumbers, summary

LOOPBACK = "127.0.0.1"


class Address(NamedTuple):
    """Where metrics are served."""

    host: str
    port: int

    @classmethod
    def of(cls, told: int | str) -> Address:
        """Reads a port, which is on the loopback interface, or ``HOST:PORT``.

        Raises:
            ValueError: If it is neither.
        """
        host, _, port = str(told).rpartition(":")
        if not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ValueError(
                f"prometheus={told!r} is neither a port, such as 9400, nor HOST:PORT, such as "
                "'0.0.0.0:9400'"
            )
        return cls(host.strip("[]") or LOOPBACK, int(port))


def metric_of(key: str) -> str:
    """What Prometheus has a number of a rank under; of the phases it is one."""
    if key in PHASE_KEYS:
        return "smorms3_phase_seconds"
    return "smorms3_step_seconds" if key == "step_s" else f"smorms3_{key}"


class Exporter:
    """A server of ``/metrics``, with the numbers that it was shown last.

    Args:
        address: Where it listens; port 0 is one that is free.

    Attributes:
        address: Where it does.

    Raises:
        ImportError: If prometheus-client is missing, naming the extra.
        OSError: If it cannot listen there.
    """

    def __init__(self, address: Address) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise ImportError(
                "prometheus=... needs prometheus-client: pip install 'smorms3-dist[prometheus]'"
            ) from error
        self._registry = prometheus_client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        for key, kind in (*KEYS.items(), (IMBALANCE, ""), (SLOWEST, "")):
            metric = metric_of(key)
            if metric not in self._gauges:
                labels = [*["rank"] * bool(kind), *["phase"] * (key in PHASE_KEYS)]
                what = "See docs/seeing.md of smorms3-dist"
                gauge = prometheus_client.Gauge(metric, what, labels, registry=self._registry)
                self._gauges[metric] = gauge
        try:
            self._server, self._thread = prometheus_client.start_http_server(
                address.port, address.host, self._registry
            )
        except OSError as error:
            raise OSError(
                error.errno, f"cannot serve metrics on {address.host}:{address.port}: {error}"
            ) from error
        self.address = Address(address.host, self._server.server_port)
        where = f"[{address.host}]" if ":" in address.host else address.host
        sys.stderr.write(f"smorms3_dist: metrics on http://{where}:{self.address.port}/metrics\n")

    def show(self, ranks: Sequence[RankNumbers]) -> None:
        """Serves other numbers from now on, given by rank."""
        for rank, numbers in enumerate(ranks):
            for key, value in numbers.by_key().items():
                labels = {"rank": str(rank)}
                if key in PHASE_KEYS:
                    labels["phase"] = Phase(PHASE_KEYS.index(key)).key
                self._gauges[metric_of(key)].labels(**labels).set(value)
        together = summary(ranks)
        for key in (IMBALANCE, SLOWEST):
            if f"smorms3/{key}" in together:
                self._gauges[metric_of(key)].set(together[f"smorms3/{key}"])

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
