"""Figures for Prometheus: the engine's own when they are asked for, times as they pass."""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lascaux.generate.engine import Engine
from lascaux.generate.request import Outcome, Piece

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)


class Metrics:
    """What the server counts; `text` is the body of /metrics."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        registry = self.registry
        self.first_token = Histogram(
            "lascaux_time_to_first_token_seconds",
            "From a request to the first token of each of its answers",
            ["route"],
            buckets=LONG,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "lascaux_time_between_tokens_seconds",
            "Between two tokens of an answer",
            ["route"],
            buckets=SHORT,
            registry=registry,
        )
        self.whole_request = Histogram(
            "lascaux_request_seconds",
            "From a request to its last token",
            ["route"],
            buckets=LONG,
            registry=registry,
        )
        self.failures = Counter(
            "lascaux_requests_failed",
            "Requests that were not carried out to their end",
            ["status"],
            registry=registry,
        )
        self._computing = {"prompt": 0.0, "drawing": 0.0}
        self._tokens = {"prompt": 0, "drawing": 0}

    def watch_engine(self, engine: Engine) -> None:
        """Report this engine's figures from now on."""
        self.registry.register(_EngineFigures(engine))
        self.registry.register(_Speeds(self._tokens, self._computing))

    def failed(self, status: int) -> None:
        """Count a request that ended with a refusal."""
        self.failures.labels(str(status)).inc()

    def computed(self, outcome: Outcome) -> None:
        """Count what an answer took."""
        self._tokens["prompt"] += outcome.prompt_tokens - outcome.cached_tokens
        self._computing["prompt"] += outcome.prompt_seconds
        self._tokens["drawing"] += max(0, outcome.drawn_tokens - 1)
        self._computing["drawing"] += outcome.drawing_seconds

    def text(self) -> bytes:
        """Every figure in Prometheus's text format."""
        return generate_latest(self.registry)


class Watch:
    """The times of one request."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._metrics, self._route = metrics, route
        self._began = time.perf_counter()
        self._last: dict[int, float] = {}

    def saw(self, index: int, piece: Piece) -> None:
        """A piece of an answer came."""
        now = time.perf_counter()
        if piece.tokens:
            last = self._last.get(index)
            count = len(piece.tokens)
            if last is None:
                self._metrics.first_token.labels(self._route).observe(now - self._began)
            else:
                between = self._metrics.between_tokens.labels(self._route)
                for _ in range(count):
                    between.observe((now - last) / count)
            self._last[index] = now
        if piece.outcome is not None:
            self._metrics.computed(piece.outcome)

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        """The request is carried out, if it has outcomes."""
        if outcomes:
            seconds = time.perf_counter() - self._began
            self._metrics.whole_request.labels(self._route).observe(seconds)


class _Speeds(Collector):
    def __init__(self, tokens: dict[str, int], seconds: dict[str, float]) -> None:
        self._tokens, self._seconds = tokens, seconds

    def collect(self) -> Iterator[Metric]:
        names = {"prompt": "prompt", "drawing": "generated"}
        for kind, name in names.items():
            seconds = self._seconds[kind]
            yield GaugeMetricFamily(
                f"lascaux_{name}_tokens_per_second",
                "Tokens over the time their answers took to compute, since the start",
                value=self._tokens[kind] / seconds if seconds else 0.0,
            )


class _EngineFigures(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        f = self._engine.figures()
        gauges = {
            "requests_running": ("Answers being computed", f.running),
            "requests_waiting": ("Answers waiting for a slot", f.waiting),
            "cache_pages": ("Pages of keys and values there are", f.cache_pages),
            "cache_pages_used": ("Pages held by answers", f.cache_pages_used),
            "cache_use_ratio": ("Part of the pages in use", f.cache_pages_used / f.cache_pages),
            "cache_bytes": ("Memory of keys and values", f.cache_bytes),
            "weight_bytes": ("Memory of weights", f.weight_bytes),
            "rows_per_step": ("Token rows in a step, on average", f.rows / max(1, f.steps)),
        }
        for name, (words, value) in gauges.items():
            yield GaugeMetricFamily(f"lascaux_{name}", words, value=value)
        totals = {
            "prompt_tokens": ("Tokens of prompts computed", f.prompt_tokens),
            "generated_tokens": ("Tokens drawn", f.drawn_tokens),
            "prefix_cache_queried_tokens": (
                "Tokens of prompts looked for in the cache",
                f.prompt_tokens + f.cached_tokens,
            ),
            "prefix_cache_hit_tokens": ("Tokens of prompts found there", f.cached_tokens),
            "steps": ("Steps in which answers got tokens", f.steps),
            "rows": ("Token rows computed in them", f.rows),
            "drafted_tokens": ("Tokens guessed", f.drafted_tokens),
            "accepted_tokens": ("Guesses that were right", f.accepted_tokens),
        }
        for name, (words, value) in totals.items():
            yield CounterMetricFamily(f"lascaux_{name}", words, value=value)
        reasons = CounterMetricFamily(
            "lascaux_requests_finished", "Answers that ended", labels=["reason"]
        )
        for reason, count in f.finished.items():
            reasons.add_metric([reason], count)
        yield reasons
