"""Who is let in, and what the others are told: places, shares, windows and budgets, in every wire's own form."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from helexa_engine.errors import Overloaded
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.runtime.engine import EngineStats
from helexa_engine.sampling_params import SamplingParams
from helexa_engine.testing.fake_engine import FakeEngine
from helexa_server.admission import Account, Admission, Window
from helexa_server.auth import fingerprint
from helexa_server.config import KeyLimits, Keys, ServerConfig
from helexa_server.errors import InsufficientQuota
from helexa_server.served_model import ServedModel

from .answer_scripts import PROMPT, answer, finished, words
from .live import Live, Serve, wait_until
from .test_metrics import scrape

USER: Any = [{"role": "user", "content": "Hi"}]

#: Bodies of the same question in every wire format.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": USER, "max_tokens": 9},
}


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def stats(**fields: Any) -> EngineStats:
    return EngineStats(0, 0, 0, 1, 0, 0, 0, 0, **fields)


def model_with(now: EngineStats | None) -> ServedModel:
    model = ServedModel("m")
    if now is not None:
        engine = FakeEngine([])
        engine.stats = lambda: now  # type: ignore[method-assign]
        model.life.loaded(engine)
    return model


def call(n: int = 1) -> list[GenerateRequest]:
    return [GenerateRequest(prompt="Hi", sampling_params=SamplingParams(n=n))]


def admission(keys: Keys | None = None, clock: Any = None, **config: Any) -> Admission:
    return Admission(ServerConfig(**config), keys or Keys(), clock or Clock())


# -- Places


def test_a_model_holds_as_many_answers_as_it_has_seats_and_the_queue_more() -> None:
    """Hazard 12: what is counted here are answers; which of them run is up to their pages."""
    gate, model = admission(max_queued_requests=3), model_with(stats(max_num_seqs=2))
    places = [gate.enter(model, None, call()) for _ in range(3)]
    places.append(gate.enter(model, None, call(n=2)))
    with pytest.raises(Overloaded, match="5 answers run or wait, and there are 5 places") as caught:
        gate.enter(model, None, call())
    assert caught.value.facts["reason"] == "queue_full"
    with places.pop():
        pass
    places += [gate.enter(model, None, call()) for _ in range(2)]
    assert gate.inside("m") == 5
    for place in places:
        with place:
            pass
    assert gate.inside("m") == 0 and not gate._inside_of
    with gate.enter(model, None, call(n=100)):
        assert gate.inside("m") == 100, "whoever comes first is never refused for good"


def test_models_have_places_of_their_own_also_while_they_load() -> None:
    gate = admission(max_queued_requests=1)
    loading, other = model_with(None), ServedModel("other")
    gate.enter(loading, None, call())
    gate.enter(other, None, call())
    with pytest.raises(Overloaded) as caught:
        gate.enter(loading, None, call())
    assert caught.value.retry_after_seconds == 5.0, "before anything was measured"


@pytest.mark.parametrize(
    ("rates", "seconds"),
    [
        ({"prompt_tokens_per_second": 100.0, "decode_tokens_per_second": 20.0}, 3000 / 100 + 5 * 40 / 20),
        ({"prompt_tokens_per_second": 1e6, "decode_tokens_per_second": 1e6}, 1.0),
        ({"prompt_tokens_per_second": 0.1, "decode_tokens_per_second": 1.0}, 600.0),
    ],
)
def test_retry_after_is_the_queue_at_the_measured_rates(rates: dict[str, float], seconds: float) -> None:
    now = EngineStats(1, 5, 0, 1, 0, 400, 0, 0, max_num_seqs=1, num_waiting_tokens=3000, answers_total=10, **rates)
    gate, model = admission(max_queued_requests=0), model_with(now)
    gate.enter(model, None, call())
    with pytest.raises(Overloaded) as caught:
        gate.enter(model, None, call())
    assert caught.value.retry_after_seconds == pytest.approx(seconds)


def test_one_key_cannot_fill_the_queue() -> None:
    gate = admission(Keys(("a", "b", "c")), max_queued_requests=15)
    model = model_with(stats(max_num_seqs=1))

    def fill(owner: str) -> int:
        for count in range(20):
            try:
                gate.enter(model, owner, call())
            except Overloaded as error:
                assert error.facts["reason"] in ("key_share", "queue_full")
                return count
        raise AssertionError("never refused")

    assert [fill(owner) for owner in "abc"] == [8, 4, 2], "half of what the others left"
    assert [fill(owner) for owner in "abcd"] == [0, 0, 0, 1]
    alone = admission(Keys(("a",)), max_queued_requests=15)
    for _ in range(16):
        alone.enter(model, "a", call())


# -- Windows and budgets


def test_a_window_fills_up_again() -> None:
    window = Window(60, 0.0)
    assert window.seconds_until(1, 0.0) == 0
    for _ in range(60):
        window.use(1)
    assert window.seconds_until(1, 0.0) == pytest.approx(1.0)
    assert window.seconds_until(1, 1.0) == 0
    window.use(100)  # overdrawn: 99 and the one that is asked for
    assert window.seconds_until(1, 1.0) == pytest.approx(100.0)
    assert window.seconds_until(1, 1000.0) == 0
    assert window.seconds_until(100, 1000.0) == 0, "more than there can be is asked for never in vain"


def test_limits_of_a_key() -> None:
    """contracts.md 3: rate window 429, budget gone 429 insufficient_quota."""
    account = Account(KeyLimits(requests_per_minute=2, tokens_per_minute=100, token_budget=500), 0.0)
    account.enter(0.0)
    account.enter(0.0)
    with pytest.raises(Overloaded, match="2 requests a minute") as caught:
        account.enter(0.0)
    assert caught.value.retry_after_seconds == pytest.approx(30.0)
    account.use(400)
    with pytest.raises(Overloaded, match="100 tokens a minute") as caught:
        account.enter(60.0)
    assert caught.value.facts["reason"] == "tokens_per_minute"
    assert caught.value.retry_after_seconds == pytest.approx(201 * 0.6)
    account.enter(60.0 + 202 * 0.6)
    account.use(100)
    with pytest.raises(InsufficientQuota, match="500 of its 500 tokens"):
        account.enter(10_000.0)


def test_a_refused_request_uses_nothing() -> None:
    clock = Clock()
    gate = admission(Keys(("a",), limits={"a": KeyLimits(requests_per_minute=1)}), clock, max_queued_requests=1)
    model, owner = model_with(stats()), fingerprint("a")
    blocker = gate.enter(model, None, call())
    for _ in range(3):
        with pytest.raises(Overloaded) as caught:
            gate.enter(model, owner, call())
        assert caught.value.facts["reason"] == "queue_full"
    with blocker:
        pass
    with gate.enter(model, owner, call()):
        pass
    with pytest.raises(Overloaded) as caught:
        gate.enter(model, owner, call())
    assert caught.value.facts["reason"] == "requests_per_minute" and gate.inside("m") == 0
    clock.now += 60
    with gate.enter(model, owner, call()):
        pass


def test_what_the_engine_is_told_of_a_request() -> None:
    limits = {"batch": KeyLimits(priority=10), "vip": KeyLimits(priority=-5)}
    gate = admission(Keys(("batch", "vip", "plain"), limits=limits), max_queue_seconds=7.5)
    model = model_with(stats())

    def priority(key: str, asked: int) -> int:
        owner = fingerprint(key)
        marked = gate.enter(model, owner, call()).marked(GenerateRequest(prompt="Hi", priority=asked))
        assert (marked.owner, marked.max_queue_seconds) == (owner, 7.5)
        return marked.priority

    assert [priority("batch", asked) for asked in (-3, 0, 20)] == [10, 10, 20]
    assert [priority("vip", asked) for asked in (-9, 0)] == [-5, 0]
    assert [priority("plain", asked) for asked in (-9, 0)] == [-9, 0]


# -- Over the wires


class Held:
    """A server whose only place is taken by a stream that goes on until it is closed."""

    def __init__(self, live: Live) -> None:
        self.client = live.http()
        self.stream = self.client.stream("POST", "/v1/chat/completions", json={"messages": USER, "stream": True})
        self.response = self.stream.__enter__()

    def close(self) -> None:
        self.stream.__exit__(None, None, None)
        self.client.close()


def endless() -> list[Any]:
    return [PROMPT, *words("Hello"), 30.0, finished()]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_full_queue_is_told_in_the_wires_own_form(serve: Serve, path: str, stream: bool) -> None:
    """contracts.md 3: queue full is 429 rate_limit_exceeded with Retry-After; 4: rejections by reason."""
    live = serve(FakeEngine(endless()), max_queued_requests=1)
    held = Held(live)
    with live.http() as http:
        got = http.post(path, json={**BODIES[path], "stream": stream})
    error = got.json()["error"]
    assert (got.status_code, error["code"], error["reason"]) == (429, "rate_limit_exceeded", "queue_full")
    assert got.headers["retry-after"] == "5" and "x-should-retry" not in got.headers
    kind = "rate_limit_error"
    assert error["type"] == kind and got.json().get("type") == ("error" if path == "/v1/messages" else None)
    wait_until(
        lambda: (
            scrape(live).get(("helexa_rejected_requests_total", 'code="rate_limit_exceeded",reason="queue_full"')) == 1
        )
    )
    held.close()


def test_clients_see_their_own_kind_of_error(serve: Serve) -> None:
    live = serve(FakeEngine(endless()), max_queued_requests=1)
    held = Held(live)
    with pytest.raises(openai.RateLimitError) as by_openai:
        live.openai().chat.completions.create(model="fake", messages=USER)
    assert by_openai.value.code == "rate_limit_exceeded"
    with pytest.raises(anthropic.RateLimitError):
        live.anthropic().messages.create(model="fake", max_tokens=9, messages=USER)
    held.close()


@pytest.mark.parametrize("loaded", [True, False], ids=["running", "waiting for the load"])
def test_a_client_that_leaves_frees_its_place(serve: Serve, loaded: bool) -> None:
    """Hazard 19, in the queue and after it."""
    live = serve(FakeEngine(endless()) if loaded else None, max_queued_requests=1, keep_alive_seconds=0.02)
    admission: Admission = live.app.state.admission
    for _ in range(3):
        held = Held(live)  # its stream has begun: with a token, or with a no-op chunk
        assert admission.inside("fake") == 1
        held.close()
        wait_until(lambda: admission.inside("fake") == 0)
    assert live.model.engine is None or len(live.model.engine.aborted) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("script", [answer(), [Overloaded("no seat", 3.0, reason="max_queue_seconds")], [OSError()]])
def test_every_end_frees_the_place(serve: Serve, script: list[Any]) -> None:
    live = serve(FakeEngine(script), max_queued_requests=1)
    with live.http() as http:
        for path, body in BODIES.items():
            http.post(path, json=body)
            http.post(path, json={**body, "stream": True})
    wait_until(lambda: live.app.state.admission.inside("fake") == 0)


def test_a_request_that_got_no_seat_in_time_is_a_rejection(serve: Serve) -> None:
    live = serve(FakeEngine([Overloaded("no place came free", 12.0, reason="max_queue_seconds")]))
    with live.http() as http:
        for path, body in BODIES.items():
            got = http.post(path, json=body)
            assert (got.status_code, got.headers["retry-after"]) == (429, "12")
            assert got.json()["error"]["code"] == "rate_limit_exceeded"
    rejected = ("helexa_rejected_requests_total", 'code="rate_limit_exceeded",reason="max_queue_seconds"')
    wait_until(lambda: scrape(live).get(rejected) == len(BODIES))


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("HELEXA_API_KEY", raising=False)
    monkeypatch.delenv("HELEXA_ADMIN_KEY", raising=False)

    def write(text: str) -> str:
        path = tmp_path / "keys"
        path.write_text(text)
        path.chmod(0o600)
        return str(path)

    return write


def ask(live: Live, key: str, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    with live.http(headers={"x-api-key": key}) as http:
        return http.post(path, json={**BODIES[path], **fields})


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_key_whose_tokens_are_used_up(serve: Serve, key_file: Any, path: str, stream: bool) -> None:
    """contracts.md 3: 429 insufficient_quota, never 402. Every wire counts the prompt's five tokens and the answer's three."""
    live = serve(FakeEngine(answer()), api_key_file=key_file("spent token_budget=16\nother\n"))
    for _ in range(2):
        assert ask(live, "spent", path, stream=stream).status_code == 200
    got = ask(live, "spent", path, stream=stream)
    assert (got.status_code, got.json()["error"]["code"]) == (429, "insufficient_quota")
    assert "16 of its 16 tokens" in got.json()["error"]["message"]
    assert "retry-after" not in got.headers and got.headers["x-should-retry"] == "false"
    assert ask(live, "other", path).status_code == 200


def test_a_stream_that_is_cut_has_paid_for_what_it_got(serve: Serve, key_file: Any) -> None:
    """Hazard 53."""
    live = serve(FakeEngine(endless()), api_key_file=key_file("cut token_budget=6\n"))
    with (
        live.http(headers={"x-api-key": "cut"}) as http,
        http.stream("POST", "/v1/chat/completions", json={"messages": USER, "stream": True}) as response,
    ):
        next(response.iter_lines())  # the prompt, a word, and the client goes
    wait_until(lambda: live.app.state.admission.inside("fake") == 0)
    assert ask(live, "cut").json()["error"]["code"] == "insufficient_quota"


def test_a_key_that_asks_too_fast(serve: Serve, key_file: Any) -> None:
    live = serve(FakeEngine(answer()), api_key_file=key_file("fast requests_per_minute=2\nslow\n"))
    assert [ask(live, "fast").status_code for _ in range(3)] == [200, 200, 429]
    got = ask(live, "fast", "/v1/messages")
    assert got.json()["error"]["type"] == "rate_limit_error" and 1 <= int(got.headers["retry-after"]) <= 30
    assert ask(live, "slow").status_code == 200


def test_a_key_has_its_share_of_the_places(serve: Serve, key_file: Any) -> None:
    live = serve(FakeEngine(endless()), api_key_file=key_file("greedy\nmodest\n"), max_queued_requests=4)
    threads = [threading.Thread(target=ask, args=(live, "greedy")) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: live.app.state.admission.inside("fake") == 2)
    got = ask(live, "greedy")
    assert (got.status_code, got.json()["error"]["reason"]) == (429, "key_share")
    modest = threading.Thread(target=ask, args=(live, "modest"))
    modest.start()
    wait_until(lambda: live.app.state.admission.inside("fake") == 3)
    engine: Any = live.model.engine
    owners = [request.owner for request in engine.requests]
    assert owners == [fingerprint("greedy"), fingerprint("greedy"), fingerprint("modest")]
    live.stop()  # ends them
    for thread in (*threads, modest):
        thread.join(timeout=20)


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/v1/messages"])
def test_priority_reaches_the_engine(serve: Serve, path: str) -> None:
    engine = FakeEngine(answer())
    with serve(engine).http() as http:
        http.post(path, json={**BODIES[path], "priority": -3})
        http.post(path, json=BODIES[path])
        refused = http.post(path, json={**BODIES[path], "priority": 2**40})
    assert [request.priority for request in engine.requests] == [-3, 0]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
