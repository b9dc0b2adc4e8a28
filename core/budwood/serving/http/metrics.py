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
        now = self._engine.stats()
        gauges = {
            "rows": ("Answers that are computed.", now.rows),
            "waiting": ("Requests that wait for a row, for memory or for an adapter.", now.waiting),
            "step_seconds": ("Seconds that the step in progress has taken so far.", now.step_seconds),
            "adapters": ("Names of adapters.", sum(len(adapter.names) for adapter in now.adapters)),
            "adapters_in_memory": ("Adapters in memory.", sum(adapter.resident for adapter in now.adapters)),
            "adapters_quarantined": ("Quarantined adapters.", sum(bool(one.quarantined) for one in now.adapters)),
            "adapter_bytes": ("Bytes of adapters in memory.", now.adapter_bytes),
            "stack_bytes": ("Bytes of adapters that are stacked for decoding.", now.stack_bytes),
            "kv_bytes": ("Bytes of keys and values of answers.", now.kv_bytes),
            "prefix_bytes": ("Bytes of cached prompts.", now.prefix_bytes),
        }
        counts = {
            "steps": ("Steps of the engine.", now.steps),
            "preempted": ("Answers that had to make room, and were computed again.", now.preempted),
            "adapter_loads": ("Adapters that were put in memory.", now.loads),
            "adapter_evictions": ("Adapters that left the memory to make room.", now.evictions),
            "prefix_hits": ("Blocks of prompts that were found in the cache.", now.prefix_hits),
        }
        yield from (GaugeMetricFamily(f"budwood_{name}", text, value) for name, (text, value) in gauges.items())
        yield from (CounterMetricFamily(f"budwood_{name}", text, value) for name, (text, value) in counts.items())
