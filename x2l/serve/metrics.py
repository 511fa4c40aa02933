"""What the server tells Prometheus. Labels come from fixed sets, never from a request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from x2l.serve.decoders import DecoderPool
from x2l.serve.engine import Engine
from x2l.serve.intake import Stats

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The registry of one server.

    Args:
        engines: by model name; their counts are read when Prometheus asks.
        pool: the media decoders, if there are any.
    """

    def __init__(self, engines: Mapping[str, Engine], pool: DecoderPool | None):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engines, pool))  # type: ignore[arg-type]
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
    def __init__(self, engines: Mapping[str, Engine], pool: DecoderPool | None):
        self.engines, self.pool = engines, pool

    def collect(self) -> Iterator[Metric]:
        for name in asdict(Stats()):
            counter = CounterMetricFamily(f"x2l_engine_{name}", f"Engine: {name.replace('_', ' ')}", labels=["model"])
            for model, engine in self.engines.items():
                counter.add_metric([model], getattr(engine.stats, name))
            yield counter
        gauges = {model: _gauges(engine) for model, engine in self.engines.items()}
        for name in next(iter(gauges.values())):
            gauge = GaugeMetricFamily(name, name.removeprefix("x2l_").replace("_", " "), labels=["model"])
            for model, values in gauges.items():
                gauge.add_metric([model], values[name])
            yield gauge
        restarts = self.pool.restarts if self.pool else 0
        yield CounterMetricFamily("x2l_decoder_restarts", "Media decoders that died and were replaced", value=restarts)


def _gauges(engine: Engine) -> dict[str, float]:
    active, opened = engine.load
    return {
        "x2l_engine_alive": float(engine.alive),
        "x2l_engine_active": active,
        "x2l_engine_open": opened,
        "x2l_engine_capacity": engine.capacity,
        "x2l_prefix_cache_bytes": engine.prefixes.num_bytes,
        "x2l_embedding_cache_bytes": engine.embeddings.num_bytes,
    }
