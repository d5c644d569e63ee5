"""The engine's thread: outputs come step by step, aborts come within a step, and a death is told to everybody."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from typing import Any

import pytest

from helexa_engine.errors import ContextLengthExceeded, EngineDied, HelexaError, InvalidRequest
from helexa_engine.runtime.engine_thread import EngineThread
from helexa_engine.runtime.exchange import EngineRequest, StepOutput
from helexa_engine.sampling_params import SamplingParams
from helexa_engine.testing.toy_model import ToyModel, toy_engine


class Outputs:
    """What a thread delivers, by request."""

    def __init__(self) -> None:
        self.steps: list[list[StepOutput]] = []
        self._queues: dict[str, queue.SimpleQueue[StepOutput]] = {}

    def __call__(self, outputs: list[StepOutput]) -> None:
        self.steps.append(outputs)
        for output in outputs:
            self.of(output.request_id).put(output)

    def of(self, request_id: str) -> queue.SimpleQueue[StepOutput]:
        return self._queues.setdefault(request_id, queue.SimpleQueue())

    def until_end(self, request_id: str) -> list[StepOutput]:
        """Everything up to the end of a request with one answer."""
        seen: list[StepOutput] = []
        while not seen or not (seen[-1].finish_reason or seen[-1].error):
            seen.append(self.of(request_id).get(timeout=10))
        return seen


class Gate(ToyModel):
    """Computes a step only when it is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def forward(self, batch: Any) -> Any:
        self.entered.release()
        self.steps.acquire()
        return super().forward(batch)


def request(name: str, prompt: tuple[int, ...] = (1, 2, 3), **fields: Any) -> EngineRequest:
    fields.setdefault("max_tokens", 5)
    return EngineRequest(name, prompt, SamplingParams(temperature=0.0, **fields).with_defaults({}))


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_each_step_is_delivered_whole() -> None:
    outputs = Outputs()
    thread = EngineThread(toy_engine(), outputs)
    for i in range(3):
        thread.submit(request(str(i), (i + 1,), max_tokens=3 + i))
    assert [len(outputs.until_end(str(i))) for i in range(3)] == [3, 4, 5]
    assert thread.stats().num_running == 0
    assert thread.close(10)
    assert any(len(step) == 3 for step in outputs.steps)


def test_one_answer_of_several_can_be_ended() -> None:
    """As when a stop string is found in its text: it costs no further step, and the other goes on."""
    model = Gate()
    engine, outputs = toy_engine(model), Outputs()
    thread = EngineThread(engine, outputs)
    thread.submit(request("a", max_tokens=6, n=2))
    model.entered.acquire()
    model.steps.release()
    model.entered.acquire()  # both have their first token
    thread.abort("a", 0)
    model.steps.release(100)
    wait_for(lambda: not engine.has_work)
    thread.close(10)
    indexes = [output.index for step in outputs.steps for output in step]
    assert indexes.count(0) == 1 and indexes.count(1) == 6
    assert engine.scheduler.pool.num_used == 0


def test_abort_takes_effect_before_the_next_step() -> None:
    model = Gate()
    engine, outputs = toy_engine(model), Outputs()
    thread = EngineThread(engine, outputs)
    thread.submit(request("a", max_tokens=100))
    model.entered.acquire()
    thread.abort("a")  # in the middle of the first step
    model.steps.release()
    wait_for(lambda: engine.scheduler.pool.num_used == 0)
    assert model.num_forwards == 1 and not engine.has_work and outputs.of("a").empty()
    thread.submit(request("a", max_tokens=1))  # the id is free again
    model.steps.release()
    assert outputs.until_end("a")[-1].finish_reason == "length"
    thread.close(10)


def test_the_stats_of_an_abort_are_delivered_too() -> None:
    engine, seen = toy_engine(Gate()), queue.SimpleQueue[int]()
    thread = EngineThread(engine, lambda _: seen.put(engine.stats().num_running))
    thread.submit(request("a", max_tokens=100))
    engine.runner.model.entered.acquire()  # type: ignore[attr-defined]
    thread.abort("a")
    engine.runner.model.steps.release()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while seen.get(timeout=10) != 0:
        assert time.monotonic() < deadline
    thread.close(10)


def test_an_id_that_runs_is_refused() -> None:
    model = Gate()
    thread = EngineThread(toy_engine(model), Outputs())
    thread.submit(request("a"))
    with pytest.raises(InvalidRequest, match="already running"):
        thread.submit(request("a"))
    model.steps.release(10)
    thread.close(10)


def test_a_bad_request_is_refused_where_it_is_made() -> None:
    thread = EngineThread(toy_engine(num_pages=1), Outputs())
    with pytest.raises(ContextLengthExceeded):
        thread.submit(request("a", (1,) * 64))
    thread.close(10)


def test_death_fails_what_runs_and_refuses_what_comes() -> None:
    class Dying(Gate):
        def forward(self, batch: Any) -> Any:
            super().forward(batch)
            raise MemoryError("pages on fire")

    model, outputs = Dying(), Outputs()
    thread = EngineThread(toy_engine(model), outputs)
    for name in "ab":
        thread.submit(request(name))
    model.steps.release()
    for name in "ab":
        (output,) = outputs.until_end(name)
        assert isinstance(output.error, EngineDied) and isinstance(output.error.__cause__, MemoryError)
    with pytest.raises(EngineDied):
        thread.submit(request("late"))
    assert thread.died is not None and thread.close(10)


def test_close_frees_the_model() -> None:
    model = ToyModel()
    freed = weakref.ref(model)
    thread = EngineThread(toy_engine(model), Outputs())
    del model
    assert freed() is not None
    assert thread.close(10)
    gc.collect()
    assert freed() is None
    assert thread.stats().num_running == 0


def test_close_tells_what_runs_and_is_bounded() -> None:
    model, outputs = Gate(), Outputs()
    thread = EngineThread(toy_engine(model), outputs)
    thread.submit(request("a"))
    model.entered.acquire()
    started = time.monotonic()
    assert not thread.close(0.05)
    assert time.monotonic() - started < 2
    model.steps.release()
    assert thread.close(10)
    assert isinstance(outputs.until_end("a")[-1].error, EngineDied)
    with pytest.raises(EngineDied):
        thread.submit(request("late"))


def test_a_grammar_that_cannot_begin_is_its_requests_own_fault() -> None:
    def no_grammar() -> Any:
        raise KeyError("state")

    engine, outputs = toy_engine(), Outputs()
    thread = EngineThread(engine, outputs)
    thread.submit(request("bad", max_tokens=50), make_grammar=no_grammar)
    thread.submit(request("good"))
    assert len(outputs.until_end("good")) == 5
    (failed,) = outputs.until_end("bad")
    assert type(failed.error) is HelexaError and "KeyError" in failed.error.message
    assert thread.died is None and engine.scheduler.pool.num_used == 0
    thread.close(10)
