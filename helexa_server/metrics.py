"""``/metrics`` in Prometheus' text format 0.0.4, under vLLM's names so that existing dashboards work.

The engine counts tokens and pages, :class:`ModelMetrics` counts requests and their latencies. Reading them never waits for the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from .served_model import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Upper bounds in seconds, from a fast token to a long answer.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)


class Histogram:
    """Counts of observations by upper bound."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[tuple[str, str, float]]:
        """(suffix, extra label, value); buckets are cumulative."""
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield "_bucket", f',le="{bound}"', total
        yield "_sum", "", self.sum
        yield "_count", "", total


class ModelMetrics:
    """What the server itself counts for one model. Time to first token counts tokens, not keep-alives."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram()
        self.inter_token_latency = Histogram()
        self.request_latency = Histogram()
        self.finished: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()


def render(models: Iterable[tuple[ServedModel, ModelMetrics]], rejected: Mapping[str, int]) -> str:
    """All metrics of all models; those of a model's engine once it is loaded. ``rejected`` counts by code what reached no model."""
    text = _Text()
    for code, count in rejected.items():
        text.sample("helexa_rejected_requests_total", "counter", f'code="{code}"', count)
    for model, metrics in models:
        label = f'model_name="{_escape(model.id)}"'
        text.histogram("vllm:time_to_first_token_seconds", label, metrics.time_to_first_token)
        text.histogram("vllm:inter_token_latency_seconds", label, metrics.inter_token_latency)
        text.histogram("vllm:e2e_request_latency_seconds", label, metrics.request_latency)
        for reason, count in metrics.finished.items():
            text.sample("vllm:request_success_total", "counter", f'{label},finished_reason="{reason}"', count)
        for code, count in metrics.failed.items():
            text.sample("helexa_request_failure_total", "counter", f'{label},code="{code}"', count)
        if model.engine is None:
            continue
        stats = model.engine.stats()
        text.sample("vllm:num_requests_running", "gauge", label, stats.num_running)
        text.sample("vllm:num_requests_waiting", "gauge", label, stats.num_waiting)
        text.sample("vllm:kv_cache_usage_perc", "gauge", label, stats.kv_cache_usage)
        text.sample("vllm:prompt_tokens_total", "counter", label, stats.prompt_tokens_total)
        text.sample("vllm:generation_tokens_total", "counter", label, stats.generation_tokens_total)
        text.sample("vllm:num_preemptions_total", "counter", label, stats.preemptions_total)
        text.sample("helexa_engine_steps_total", "counter", label, stats.steps_total)
        if model.load_seconds is not None:
            text.sample("helexa_load_seconds", "gauge", label, model.load_seconds)
    return text.render()


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class _Text:
    """Samples grouped by metric, as the format demands."""

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}
        self._lines: dict[str, list[str]] = {}

    def sample(self, name: str, kind: str, labels: str, value: float, suffix: str = "") -> None:
        self._kinds[name] = kind
        self._lines.setdefault(name, []).append(f"{name}{suffix}{{{labels}}} {value}")

    def histogram(self, name: str, labels: str, histogram: Histogram) -> None:
        for suffix, extra, value in histogram.samples():
            self.sample(name, "histogram", labels + extra, value, suffix)

    def render(self) -> str:
        blocks = (f"# TYPE {name} {self._kinds[name]}\n" + "\n".join(lines) for name, lines in self._lines.items())
        return "\n".join(blocks) + "\n"
