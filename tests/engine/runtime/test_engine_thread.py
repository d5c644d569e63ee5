"""The engine's thread: events reach their request, aborts come within a step, and a death is told to everybody."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from typing import Any

import pytest

from helexa_engine.errors import ContextLengthExceeded, EngineDied, HelexaError, InvalidRequest
from helexa_engine.events import ContentDelta, Event, Failed, Finished, Usage
from helexa_engine.runtime.engine import EngineRequest, StepOutput
from helexa_engine.runtime.engine_thread import EngineThread
from helexa_engine.sampling_params import SamplingParams
from helexa_engine.testing.toy_model import ToyModel, toy_engine


class Ids:
    """An event maker without text: every token is a delta; ``stop_after`` tokens end the answer from this side."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.count: dict[int, int] = {}

    def push(self, output: StepOutput) -> list[Event]:
        assert output.token_id is not None
        self.count[output.index] = count = self.count.get(output.index, 0) + 1
        events: list[Event] = [ContentDelta(output.index, "", (output.token_id,))]
        if output.finish_reason or count == self.stop_after:
            events.append(Finished(output.index, output.finish_reason or "stop", Usage(1, count), output.timings))
        return events


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


def drain(events: queue.SimpleQueue[list[Event]]) -> list[Event]:
    """Everything up to the end of a request with one answer."""
    seen: list[Event] = []
    while not seen or not isinstance(seen[-1], (Finished, Failed)):
        seen += events.get(timeout=10)
    return seen


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_events_reach_their_own_request() -> None:
    thread = EngineThread(toy_engine())
    queues: list[queue.SimpleQueue[list[Event]]] = [queue.SimpleQueue() for _ in range(3)]
    for i, events in enumerate(queues):
        thread.submit(request(str(i), (i + 1,), max_tokens=3 + i), Ids(), events.put)
    counts = [len(drain(events)) for events in queues]
    assert counts == [4, 5, 6]
    assert thread.stats().num_running == 0
    assert thread.close(10)


def test_an_answer_ended_by_its_text_costs_no_further_step() -> None:
    engine = toy_engine()
    thread = EngineThread(engine)
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    thread.submit(request("a", max_tokens=100), Ids(stop_after=4), events.put)
    assert len(drain(events)) == 5
    wait_for(lambda: not engine.has_work)
    assert engine.stats().steps_total == 4 and engine.scheduler.pool.num_used == 0
    thread.close(10)


def test_abort_takes_effect_before_the_next_step() -> None:
    model = Gate()
    engine = toy_engine(model)
    thread = EngineThread(engine)
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    thread.submit(request("a", max_tokens=100), Ids(), events.put)
    model.entered.acquire()
    thread.abort("a")  # in the middle of the first step
    model.steps.release()
    wait_for(lambda: engine.scheduler.pool.num_used == 0)
    assert model.num_forwards == 1 and not engine.has_work and events.empty()
    thread.submit(request("a", max_tokens=1), Ids(), events.put)  # the id is free again
    model.steps.release()
    assert isinstance(drain(events)[-1], Finished)
    thread.close(10)


def test_an_id_that_runs_is_refused() -> None:
    model = Gate()
    thread = EngineThread(toy_engine(model))
    thread.submit(request("a"), Ids(), lambda _: None)
    with pytest.raises(InvalidRequest, match="already running"):
        thread.submit(request("a"), Ids(), lambda _: None)
    model.steps.release(10)
    thread.close(10)


def test_a_bad_request_is_refused_where_it_is_made() -> None:
    thread = EngineThread(toy_engine(num_pages=1))
    with pytest.raises(ContextLengthExceeded):
        thread.submit(request("a", (1,) * 64), Ids(), lambda _: None)
    thread.close(10)


def test_death_fails_what_runs_and_refuses_what_comes() -> None:
    class Dying(Gate):
        def forward(self, batch: Any) -> Any:
            super().forward(batch)
            raise MemoryError("pages on fire")

    model = Dying()
    thread = EngineThread(toy_engine(model))
    queues: list[queue.SimpleQueue[list[Event]]] = [queue.SimpleQueue() for _ in range(2)]
    for i, events in enumerate(queues):
        thread.submit(request(str(i)), Ids(), events.put)
    model.steps.release()
    for events in queues:
        (event,) = drain(events)
        assert isinstance(event, Failed) and isinstance(event.error, EngineDied)
        assert isinstance(event.error.__cause__, MemoryError)
    with pytest.raises(EngineDied):
        thread.submit(request("late"), Ids(), lambda _: None)
    assert thread.died is not None and thread.close(10)


def test_close_frees_the_model() -> None:
    model = ToyModel()
    freed = weakref.ref(model)
    thread = EngineThread(toy_engine(model))
    del model
    assert freed() is not None
    assert thread.close(10)
    gc.collect()
    assert freed() is None
    assert thread.stats().num_running == 0


def test_close_tells_what_runs_and_is_bounded() -> None:
    model = Gate()
    thread = EngineThread(toy_engine(model))
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    thread.submit(request("a"), Ids(), events.put)
    model.entered.acquire()
    started = time.monotonic()
    assert not thread.close(0.05)
    assert time.monotonic() - started < 2
    model.steps.release()
    assert thread.close(10)
    (*_, event) = drain(events)
    assert isinstance(event, Failed) and isinstance(event.error, EngineDied)
    with pytest.raises(EngineDied):
        thread.submit(request("late"), Ids(), lambda _: None)


@pytest.mark.parametrize("where", ["events", "deliver", "grammar"])
def test_a_fault_of_one_request_is_its_own(where: str) -> None:
    class Broken(Ids):
        def push(self, output: StepOutput) -> list[Event]:
            raise KeyError("parser")

    def no_grammar() -> Any:
        raise InvalidRequest("structured.regex", "unbalanced parenthesis")

    calls: list[list[Event]] = []

    def deliver(events: list[Event]) -> None:
        calls.append(events)
        if where == "deliver":
            raise RuntimeError("Event loop is closed")

    engine = toy_engine()
    thread = EngineThread(engine)
    bad = request("bad", max_tokens=50)
    if where == "grammar":
        bad = EngineRequest("bad", (1,), bad.params, make_grammar=no_grammar)
    good: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    thread.submit(bad, Broken() if where == "events" else Ids(), deliver)
    thread.submit(request("good"), Ids(), good.put)
    assert len(drain(good)) == 6
    wait_for(lambda: not engine.has_work)
    assert engine.stats().steps_total <= 7
    failed = calls[-1][0]
    assert isinstance(failed, Failed) and isinstance(failed.error, HelexaError)
    assert thread.died is None and engine.scheduler.pool.num_used == 0
    thread.close(10)
