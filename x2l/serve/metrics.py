"""What the server tells Prometheus. Labels come from fixed sets, never from a request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from x2l.serve.decoders import DecoderPool
from x2l.serve.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The registry of one server.

    Args:
        engine: whose counts are read when Prometheus asks.
        pool: the media decoders, if there are any.
    """

    def __init__(self, engine: Engine, pool: DecoderPool | None):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, pool))  # type: ignore[arg-type]
        self.responses = Counter("x2l_http_responses", "Responses", ["route", "status"], registry=self.registry)
        self.seconds = Histogram("x2l_http_seconds", "Time of a response", ["route"], buckets=SECONDS, registry=self.registry)
        self.first_token = Histogram(
            "x2l_first_token_seconds", "Request read to first text", buckets=SECONDS, registry=self.registry
        )
        self.voice_first = Histogram(
            "x2l_voice_first_token_seconds",
            "End of speech to first text, by whether the answer was begun in a pause",
            ["ahead"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.disconnects = Counter("x2l_disconnects", "Clients that left before their answer", registry=self.registry)


class _EngineCollector:
    def __init__(self, engine: Engine, pool: DecoderPool | None):
        self.engine, self.pool = engine, pool

    def collect(self) -> Iterator[Metric]:
        engine = self.engine
        for name, value in asdict(engine.stats).items():
            yield CounterMetricFamily(f"x2l_engine_{name}", f"Engine: {name.replace('_', ' ')}", value=value)
        active, opened = engine.load
        gauges: dict[str, Any] = {
            "x2l_engine_alive": engine.alive,
            "x2l_engine_active": active,
            "x2l_engine_open": opened,
            "x2l_engine_capacity": engine.capacity,
            "x2l_prefix_cache_bytes": engine.prefixes.num_bytes,
            "x2l_embedding_cache_bytes": engine.embeddings.num_bytes,
        }
        for name, value in gauges.items():
            yield GaugeMetricFamily(name, name.removeprefix("x2l_").replace("_", " "), value=float(value))
        restarts = self.pool.restarts if self.pool else 0
        yield CounterMetricFamily("x2l_decoder_restarts", "Media decoders that died and were replaced", value=restarts)
