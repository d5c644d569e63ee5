"""``/metrics`` in Prometheus' text format 0.0.4, under vLLM's names so that existing dashboards work.

The engine counts tokens and pages, :class:`ModelMetrics` counts requests and their latencies. Reading them never waits for the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

from helexa_engine.errors import HelexaError
from helexa_engine.events import FinishReason, Timings
from helexa_engine.version import __version__

from .served_model import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Upper bounds in seconds, from a fast token to a long answer.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)

#: Upper bounds in tokens, from one to the longest contexts.
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)) + (1e6,)

#: What engines count, which goes on from one engine of a model to the next: metric -> field of their statistics.
_TOTALS = {
    "vllm:prompt_tokens_total": "prompt_tokens_total",
    "vllm:generation_tokens_total": "generation_tokens_total",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits_total",
    "vllm:num_preemptions_total": "preemptions_total",
    "helexa_engine_steps_total": "steps_total",
}


class Histogram:
    """Counts of observations by upper bound."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
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
        self.queue_time = Histogram()
        self.prefill_time = Histogram()
        self.decode_time = Histogram()
        self.time_per_output_token = Histogram()
        self.prompt_tokens = Histogram(TOKENS)
        self.generation_tokens = Histogram(TOKENS)
        self.finished: Counter[str] = Counter(dict.fromkeys(get_args(FinishReason), 0))
        self.failed: Counter[str] = Counter()

    def answered(self, tokens: int, timings: Timings) -> None:
        """Counts one answer of a request that came to its end."""
        self.generation_tokens.observe(tokens)
        self.queue_time.observe(timings.queue_seconds)
        self.prefill_time.observe(timings.prefill_seconds)
        self.decode_time.observe(timings.decode_seconds)
        if tokens > 1:
            self.time_per_output_token.observe(timings.decode_seconds / (tokens - 1))


def render(
    models: Iterable[tuple[ServedModel, ModelMetrics]],
    rejected: Mapping[tuple[str, str], int],
    joules: Mapping[str, float],
) -> str:
    """All metrics of all models; those of a model's engine once it is loaded.

    ``rejected`` counts by :func:`rejection` what reached no model; ``joules`` is what processors have taken, where that can be read.
    """
    text = _Text()
    text.sample("helexa_info", "gauge", f'version="{_escape(__version__)}"', 1)
    for (code, reason), count in rejected.items():
        label = f'code="{code}"' + (f',reason="{reason}"' if reason else "")
        text.sample("helexa_rejected_requests_total", "counter", label, count)
    for zone, taken in joules.items():
        text.sample("helexa_joules_total", "counter", f'zone="{_escape(zone)}"', taken)
    for model, metrics in models:
        label = f'model_name="{_escape(model.id)}"'
        text.histogram("vllm:time_to_first_token_seconds", label, metrics.time_to_first_token)
        text.histogram("vllm:inter_token_latency_seconds", label, metrics.inter_token_latency)
        text.histogram("vllm:e2e_request_latency_seconds", label, metrics.request_latency)
        text.histogram("vllm:request_queue_time_seconds", label, metrics.queue_time)
        text.histogram("vllm:request_prefill_time_seconds", label, metrics.prefill_time)
        text.histogram("vllm:request_decode_time_seconds", label, metrics.decode_time)
        text.histogram("vllm:request_time_per_output_token_seconds", label, metrics.time_per_output_token)
        text.histogram("vllm:request_prompt_tokens", label, metrics.prompt_tokens)
        text.histogram("vllm:request_generation_tokens", label, metrics.generation_tokens)
        for reason, count in metrics.finished.items():
            text.sample("vllm:request_success_total", "counter", f'{label},finished_reason="{reason}"', count)
        for code, count in metrics.failed.items():
            text.sample("helexa_request_failure_total", "counter", f'{label},code="{code}"', count)
        text.sample("helexa_model_up", "gauge", label, int(model.engine is not None))
        text.sample("helexa_loads_total", "counter", label, model.life.loads)
        text.sample("helexa_evictions_total", "counter", label, model.evictions)
        text.sample("helexa_recoveries_total", "counter", label, model.life.recoveries)
        text.sample("helexa_recovery_seconds_total", "counter", label, model.life.recovery_seconds)
        for name, total in _TOTALS.items():
            text.sample(name, "counter", label, model.life.total(total))
        if model.engine is None:
            continue
        stats = model.engine.stats()
        text.sample("vllm:num_requests_running", "gauge", label, stats.num_running)
        text.sample("vllm:num_requests_waiting", "gauge", label, stats.num_waiting)
        text.sample("vllm:kv_cache_usage_perc", "gauge", label, stats.kv_cache_usage)
        if stats.snapshots_total:
            share = stats.snapshots_used / stats.snapshots_total
            text.sample("helexa_snapshot_bytes", "gauge", label, model.engine.model_info.snapshot_bytes * share)
        info = model.engine.model_info
        for kind in ("weight", "kv", "state", "snapshot"):
            text.sample("helexa_memory_bytes", "gauge", f'{label},kind="{kind}"', getattr(info, f"{kind}_bytes"))
        if model.life.load_seconds is not None:
            text.sample("helexa_load_seconds", "gauge", label, model.life.load_seconds)
    return text.render()


def rejection(error: HelexaError) -> tuple[str, str]:
    """The code of an error and, where one code has several causes, which it was; else ""."""
    return error.code, str(error.facts.get("reason", ""))


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
