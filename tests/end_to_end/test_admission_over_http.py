"""Requests that wait for a seat of a real engine: what they are sent meanwhile, how long they wait, and that they can leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import openai
import pytest

from helexa_engine.config import EngineConfig
from helexa_engine.runtime.async_engine import AsyncEngine
from tests.long_demo import demo_with_context
from tests.server.live import Live, live_server, wait_until

QUESTION: Any = [{"role": "user", "content": "What is helexa?"}]
#: A processor of 2026 writes the demo's own 2048 tokens in a third of a second: too soon for those who are to wait.
CONTEXT = 32768
#: To the end of the context, unless the client goes before.
LONG = {"prompt": "Hi", "ignore_eos": True, "stream": True, "logprobs": 5}
SHORT = {"messages": QUESTION, "max_tokens": 3}


OneSeat = Callable[..., AbstractContextManager[Live]]


@pytest.fixture(scope="module")
def one_seat(tmp_path_factory: pytest.TempPathFactory) -> OneSeat:
    """A server, with the options given, whose engine answers one request at a time."""
    model = demo_with_context(tmp_path_factory.mktemp("demo") / "demo.gguf", CONTEXT)

    @contextmanager
    def serve(**options: Any) -> Iterator[Live]:
        engine: Any = AsyncEngine(model, EngineConfig(max_num_seqs=1))
        try:
            with live_server(engine, **options) as live:
                yield live
        finally:
            asyncio.run(engine.aclose())

    return serve


@contextmanager
def seated(live: Live) -> Iterator[None]:
    """While the context is open, the seat is taken."""
    with live.http(timeout=60.0) as http, http.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()  # to drop it would close the stream
        next(lines)
        yield


def waiting(live: Live) -> int:
    engine: Any = live.model.engine
    return int(engine.stats().num_waiting)


def test_who_waits_for_a_seat_gets_keep_alives_and_then_its_answer(one_seat: OneSeat) -> None:
    with one_seat(keep_alive_seconds=0.05) as live, live.http(timeout=60.0) as http:
        with seated(live):
            stream = http.stream("POST", "/v1/chat/completions", json={**SHORT, "stream": True})
            response = stream.__enter__()
            lines = (line for line in response.iter_lines() if line)
            first = [next(lines) for _ in range(3)]
            assert all('"delta":{}' in line for line in first) and waiting(live) == 1
        assert "[DONE]" in list(lines)[-1]
        stream.__exit__(None, None, None)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_the_queue_is_gone_from_the_engine(one_seat: OneSeat, stream: bool) -> None:
    """Hazard 19: the place, and the seat's reservation, while the one before still runs."""
    with one_seat() as live, seated(live):
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout), live.http(timeout=0.2) as http:
                http.post("/v1/chat/completions", json={**SHORT, "stream": stream})
            wait_until(lambda: waiting(live) == 0 and live.app.state.admission.inside("fake") == 1)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_who_gets_no_seat_in_time_is_told_when_to_come_back(one_seat: OneSeat, path: str) -> None:
    """contracts.md 3: 429 rate_limit_exceeded with Retry-After; in a stream that has begun, that wire's error event."""
    body: dict[str, Any] = {"max_tokens": 3, "messages": QUESTION, "prompt": "Hi", "input": "Hi"}
    if path != "/v1/completions":
        del body["prompt"]
    with one_seat(max_queue_seconds=0.3, keep_alive_seconds=0.1) as live, seated(live), live.http(timeout=60.0) as http:
        refused = http.post(path, json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (429, "rate_limit_exceeded")
        assert "no place came free within 0.3 seconds" in error["message"] and error["reason"] == "max_queue_seconds"
        assert int(refused.headers["retry-after"]) >= 1
        streamed = http.post(path, json={**body, "stream": True})
        assert streamed.status_code == 200 and "no place came free" in streamed.text
        assert waiting(live) == 0


def test_a_saturated_engine_still_answers_its_health_check(one_seat: OneSeat) -> None:
    """Hazards 16 and 24."""
    with one_seat() as live, seated(live), live.http() as http:
        for path in ("/health", "/ready", "/v1/models", "/metrics"):
            assert http.get(path).status_code == 200
        assert "vllm:num_requests_running" in http.get("/metrics").text


def test_an_urgent_request_overtakes_those_that_wait(one_seat: OneSeat) -> None:
    ends: list[str] = []
    with one_seat() as live:
        client = live.openai(timeout=60.0)
        with seated(live):

            def ask(name: str, priority: int, max_tokens: int) -> None:
                extra = {"priority": priority, "ignore_eos": True}
                client.completions.create(model="fake", prompt="Hi", max_tokens=max_tokens, extra_body=extra)
                ends.append(name)

            threads = []
            for i, asked in enumerate([("usual", 0, 400), ("urgent", -1, 2)]):
                threads.append(threading.Thread(target=ask, args=asked))
                threads[-1].start()
                wait_until(lambda i=i: waiting(live) == i + 1)  # type: ignore[misc]
        for thread in threads:
            thread.join(timeout=60)
    assert ends == ["urgent", "usual"]


def test_a_prompt_that_can_never_fit_is_refused_at_once(one_seat: OneSeat) -> None:
    """Hazard 12: before it takes a place behind the one that runs."""
    with one_seat() as live, seated(live):
        with pytest.raises(openai.BadRequestError, match="prompt is too long") as caught:
            live.openai().completions.create(model="fake", prompt=[5] * 50_000, max_tokens=1)
        assert caught.value.code == "context_length_exceeded" and waiting(live) == 0
