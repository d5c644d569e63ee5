"""The metrics page: Prometheus can read it, and it counts what happened."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from helexa_engine.errors import EngineDied
from helexa_engine.events import Finished, Timings, Usage
from helexa_engine.runtime.exchange import EngineStats
from helexa_engine.testing.fake_engine import FakeEngine, FakeModelInfo
from helexa_server.logs import JsonFormatter
from helexa_server.metrics import Histogram

from .answer_scripts import PROMPT, finished, words
from .live import Live, Serve, wait_until

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"

#: contracts.md 4 and what vLLM's own dashboards ask for beyond, with Prometheus' types.
PROMISED = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:num_preemptions": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "helexa_request_failure": "counter",
    "helexa_engine_steps": "counter",
    "helexa_memory_bytes": "gauge",
    "helexa_load_seconds": "gauge",
    "helexa_info": "gauge",
}


def families(live: Live) -> dict[str, Metric]:
    """What Prometheus' own parser reads on the page, by name."""
    with live.http() as http:
        page = http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = list(text_string_to_metric_families(page.text))
    assert len({family.name for family in found}) == len(found), "samples of a metric must stand together"
    return {family.name: family for family in found}


def scrape(live: Live) -> dict[tuple[str, str], float]:
    """Samples by name and labels."""
    return {
        (sample.name, ",".join(f'{name}="{value}"' for name, value in sample.labels.items())): sample.value
        for family in families(live).values()
        for sample in family.samples
    }


def ask(live: Live, stream: bool = True) -> httpx.Response:
    with live.http() as http:
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
        return http.post("/v1/chat/completions", json=body)


def test_requests_are_counted_and_timed(serve: Serve) -> None:
    script = [PROMPT, 0.12, *[step for word in words("a b c") for step in (word, 0.03)], finished()]
    live = serve(FakeEngine(script), keep_alive_seconds=0.04)
    model = 'model_name="fake"'
    assert scrape(live)["vllm:time_to_first_token_seconds_count", model] == 0
    ask(live)
    success = ("vllm:request_success_total", f'{model},finished_reason="stop"')
    wait_until(lambda: scrape(live)[success] > 0)
    samples = scrape(live)
    assert samples[success] == 1
    assert samples["vllm:time_to_first_token_seconds_count", model] == 1
    assert 0.12 <= samples["vllm:time_to_first_token_seconds_sum", model] < 1.0, "keep-alives are no tokens"
    assert samples["vllm:inter_token_latency_seconds_count", model] == 2
    assert samples["vllm:e2e_request_latency_seconds_bucket", f'{model},le="+Inf"'] == 1
    assert samples["vllm:e2e_request_latency_seconds_bucket", f'{model},le="0.1"'] == 0
    assert samples["vllm:num_requests_running", model] == 0


def test_the_prefix_cache_is_counted(serve: Serve) -> None:
    live, model = serve(FakeEngine([PROMPT, finished()])), 'model_name="fake"'
    samples = scrape(live)
    assert samples["vllm:prefix_cache_queries_total", model] == samples["vllm:prefix_cache_hits_total", model] == 0
    assert ("helexa_snapshot_bytes", model) not in samples, "no snapshots, no figure"
    engine = FakeEngine([PROMPT, finished()], dataclasses.replace(FakeModelInfo(), snapshot_bytes=800))
    stats = EngineStats(0, 0, 0, 1, 0, 0, 0, 0, 3, 100, 64, snapshots_used=2, snapshots_total=8)
    engine.stats = lambda: stats  # type: ignore[method-assign]
    samples = scrape(serve(engine))
    assert (samples["vllm:prefix_cache_queries_total", model], samples["vllm:prefix_cache_hits_total", model]) == (
        100,
        64,
    )
    assert samples["helexa_snapshot_bytes", model] == 200


def test_failures_are_counted_by_code(serve: Serve) -> None:
    live = serve(FakeEngine([EngineDied("gone")]))
    assert ask(live).status_code == 500 and ask(live, stream=False).status_code == 500
    failed = ("helexa_request_failure_total", 'model_name="fake",code="engine_died"')
    wait_until(lambda: scrape(live).get(failed) == 2)


def test_what_reaches_no_model_is_counted_by_code(serve: Serve) -> None:
    """contracts.md 4: rejections by reason."""
    live = serve(FakeEngine([]))
    with live.http() as http:
        for _ in range(2):
            http.get("/nowhere")
        http.post("/v1/chat/completions", json={})
    rejected = {labels: value for (name, labels), value in scrape(live).items() if name.startswith("helexa_rejected")}
    assert rejected == {'code="not_found"': 2, 'code="invalid_request"': 1}


def test_a_model_that_is_loading_has_no_engine_figures(serve: Serve) -> None:
    names = {name for name, _ in scrape(serve(None))}
    assert "vllm:num_requests_running" not in names and "vllm:time_to_first_token_seconds_count" in names


def test_every_promised_metric_has_its_type_and_model(serve: Serve) -> None:
    """contracts.md 4: Prometheus, label model_name, vLLM's names; hazard 41: histograms."""
    live = serve(FakeEngine([PROMPT, EngineDied("gone")]))
    live.model.life.load_seconds = 1.5
    ask(live, stream=False)
    wait_until(lambda: "helexa_request_failure" in families(live))
    found = families(live)
    assert {name: found[name].type for name in PROMISED if name in found} == PROMISED
    for name in PROMISED.keys() - {"helexa_info"}:
        assert {sample.labels["model_name"] for sample in found[name].samples} == {"fake"}, name
    reasons = {sample.labels["finished_reason"]: sample.value for sample in found["vllm:request_success"].samples}
    assert reasons == {"stop": 0, "length": 0, "tool_calls": 0, "abort": 0}
    sizes = {sample.labels["kind"]: sample.value for sample in found["helexa_memory_bytes"].samples}
    assert sizes == {"weight": 1000, "kv": 100, "state": 0, "snapshot": 0}


def test_every_answer_is_counted_with_its_tokens_and_phases(serve: Serve) -> None:
    timings = Timings(queue_seconds=0.25, prefill_seconds=0.5, decode_seconds=3.0)
    first, second = (Finished(i, "length", Usage(5, tokens), timings) for i, tokens in enumerate((4, 1)))
    live = serve(FakeEngine([PROMPT, *words("a"), *words("b", index=1), first, second]))
    with live.http() as http:
        http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "n": 2})
    success = ("vllm:request_success_total", 'model_name="fake",finished_reason="length"')
    wait_until(lambda: scrape(live)[success] == 2)
    sums = {name: value for (name, _), value in scrape(live).items() if name.endswith(("_sum", "_count"))}
    assert sums["vllm:request_prompt_tokens_sum"] == 5 and sums["vllm:request_prompt_tokens_count"] == 1
    assert sums["vllm:request_generation_tokens_sum"] == 5 and sums["vllm:request_generation_tokens_count"] == 2
    assert sums["vllm:request_queue_time_seconds_sum"] == 0.5
    assert sums["vllm:request_prefill_time_seconds_sum"] == 1.0
    assert sums["vllm:request_decode_time_seconds_sum"] == 6.0
    assert sums["vllm:request_time_per_output_token_seconds_sum"] == 1.0, "one token has no time between tokens"
    assert sums["vllm:request_time_per_output_token_seconds_count"] == 1


def test_the_dashboard_asks_only_for_metrics_that_exist(serve: Serve) -> None:
    live = serve(FakeEngine([EngineDied("gone")]))
    live.model.life.load_seconds = 1.5
    ask(live, stream=False)
    with live.http() as http:
        http.get("/nowhere")
    wait_until(lambda: "helexa_request_failure" in families(live))
    names = {sample.name for family in families(live).values() for sample in family.samples}
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"(?:vllm:|helexa_)\w+", query)}
    assert len(queries) >= 20 and asked <= names, asked - names
    assert all("model_name" in query for query in queries if "vllm:" in query)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_json_log_lines_carry_the_fields_of_a_request(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """contracts.md 4, hazard 36: tokens in, cached, out, reason, seconds, client gone or not."""
    caplog.set_level(logging.INFO, "helexa_server.requests")
    live = serve(FakeEngine([PROMPT, *words("a b"), finished()]))
    with live.http(headers={"x-request-id": "mine"}) as http:
        http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        http.get("/no where")
    wait_until(lambda: len(caplog.records) == 2)
    answered, lost = (json.loads(JsonFormatter().format(record)) for record in caplog.records)
    assert answered["message"].startswith("/v1/chat/completions id=") and answered["level"] == "info"
    assert answered.items() >= {
        "client_id": "mine", "model": "fake", "prompt": 5, "cached": 2, "completion": 2, "reason": "stop", "client": "here",
    }.items()  # fmt: skip
    assert 0 <= answered["ttft"] <= answered["seconds"] < 10
    assert lost["id"] == "mine" and lost["status"] == 404 and lost["error"].startswith("not_found: ")


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert list(histogram.samples()) == [
        ("_bucket", ',le="1.0"', 2),
        ("_bucket", ',le="2.0"', 4),
        ("_bucket", ',le="+Inf"', 5),
        ("_sum", "", 14.0),
        ("_count", "", 5),
    ]
