"""Metrics of the server, by adapter and tenant, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from budwood.serving.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counts requests; the engine's own numbers are read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        by = ("adapter", "tenant")
        self.requests = Counter("budwood_requests", "Requests by result.", ("route", "status", *by), registry=registry)
        self.prompt_tokens = Counter("budwood_prompt_tokens", "Tokens of prompts.", by, registry=registry)
        self.generated_tokens = Counter("budwood_generated_tokens", "Tokens of answers.", by, registry=registry)
        self.cancelled = Counter(
            "budwood_cancelled", "Requests that did not end by themselves.", ("reason", *by), registry=registry
        )
        self.first = Histogram(
            "budwood_first_token_seconds", "Seconds to the first piece of text.", by, buckets=SECONDS, registry=registry
        )
        self.seconds = Histogram(
            "budwood_request_seconds", "Seconds of requests that were answered.", by, buckets=SECONDS, registry=registry
        )
        registry.register(_EngineNumbers(engine))

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self.registry)


class _EngineNumbers:
    """What the engine counts by itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the numbers of now."""
        engine, scheduler = self._engine, self._engine.scheduler
        yield GaugeMetricFamily("budwood_rows", "Answers that are computed.", len(scheduler.rows))
        yield GaugeMetricFamily("budwood_waiting", "Requests that wait for a row.", scheduler.waiting)
        yield GaugeMetricFamily("budwood_adapters", "Names of loaded adapters.", len(engine.names))
        yield CounterMetricFamily("budwood_steps", "Steps of the engine.", scheduler.steps)
        yield CounterMetricFamily("budwood_preempted", "Rows that had to make room.", scheduler.preempted)
        yield CounterMetricFamily("budwood_prefix_hits", "Blocks of prompts found in the cache.", engine.prefixes.hits)
        yield GaugeMetricFamily("budwood_prefix_bytes", "Bytes of cached prompts.", engine.prefixes.bytes)
