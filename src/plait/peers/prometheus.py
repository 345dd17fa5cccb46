"""What Prometheus reads from a peer: round, neighbours, bytes, refusals, ends of certificates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from plait.peers.federation import split_address
from plait.peers.mailbox import Desk
from plait.peers.transport import GrpcTransport


class Figures(Collector):
    """Reads the figures when Prometheus asks; nothing is counted twice."""

    def __init__(self, desk: Desk, transport: GrpcTransport) -> None:
        self.desk, self.transport = desk, transport

    def collect(self) -> Iterator[Metric]:
        """All figures of this moment."""
        status = self.desk.status()
        yield GaugeMetricFamily("plait_round", "Round that is open", value=status["round"])
        yield GaugeMetricFamily("plait_rounds", "Rounds of the run", value=status["rounds"])
        for key, text in (("loss", "Training loss of the last round"), ("score", "Last score")):
            if key in status:
                yield GaugeMetricFamily(f"plait_{key}", text, value=status[key])
        lag = GaugeMetricFamily(
            "plait_lag_rounds", "Rounds that a peer is behind this one", labels=["peer"]
        )
        for peer, round_ in status["seen"].items():
            lag.add_metric([peer], status["round"] - round_)
        yield lag
        incidents = CounterMetricFamily(
            "plait_incidents", "What went wrong", labels=["kind", "peer", "reason"]
        )
        with self.desk.condition:
            counts = dict(self.desk.counts)
        for labels, count in counts.items():
            incidents.add_metric(list(labels), count)
        yield incidents
        expires = GaugeMetricFamily(
            "plait_certificate_expires_seconds", "End, in seconds since 1970", labels=["of"]
        )
        for what, end in self.transport.expires().items():
            expires.add_metric([what], end)
        yield expires
        for name, counter in vars(self.transport.counts).items():
            figure = CounterMetricFamily(f"plait_{name}", "Bytes of factors", labels=["peer"])
            for peer, count in dict(counter).items():
                figure.add_metric([peer], count)
            yield figure


def serve_metrics(address: str | None, desk: Desk, transport: GrpcTransport) -> Callable[[], None]:
    """Answer Prometheus at `address`, `host:port`; nowhere for None. Call the result to stop.

    Raises:
        ValueError: The address is in use, or not of this machine.
    """
    if address is None:
        return lambda: None
    host, port = split_address(address)
    registry = CollectorRegistry()
    registry.register(Figures(desk, transport))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ValueError(
            f"Can't show figures at {address}: {error}. Stop what uses it, or change `metrics` in "
            "peer.toml."
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
