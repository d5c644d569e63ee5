"""The metrics page: Prometheus can read it, and it counts what happened."""

from __future__ import annotations

import re

import httpx

from helexa_engine.errors import EngineDied
from helexa_engine.testing.fake_engine import FakeEngine
from helexa_server.metrics import Histogram

from .answer_scripts import PROMPT, finished, words
from .live import Live, Serve, wait_until

LINE = re.compile(r'(?P<name>[a-zA-Z_:][\w:]*)\{(?P<labels>(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)+)\} (?P<value>[-+\d.e]+)')


def scrape(live: Live) -> dict[tuple[str, str], float]:
    """Samples by name and labels. Every line must be a sample or a TYPE, and samples of a metric must stand together."""
    with live.http() as http:
        page = http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples, metric, seen = {}, "", set()
    for line in page.text.splitlines():
        if line.startswith("# TYPE "):
            metric = line.split()[2]
            assert metric not in seen
            seen.add(metric)
            continue
        match = LINE.fullmatch(line)
        assert match, line
        assert match["name"].startswith(metric)
        samples[match["name"], match["labels"]] = float(match["value"])
    return samples


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
    wait_until(lambda: success in scrape(live))
    samples = scrape(live)
    assert samples[success] == 1
    assert samples["vllm:time_to_first_token_seconds_count", model] == 1
    assert 0.12 <= samples["vllm:time_to_first_token_seconds_sum", model] < 1.0, "keep-alives are no tokens"
    assert samples["vllm:inter_token_latency_seconds_count", model] == 2
    assert samples["vllm:e2e_request_latency_seconds_bucket", f'{model},le="+Inf"'] == 1
    assert samples["vllm:e2e_request_latency_seconds_bucket", f'{model},le="0.1"'] == 0
    assert samples["vllm:num_requests_running", model] == 0


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
