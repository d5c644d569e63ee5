"""Engine.step over a toy model whose pages are real: batching, chunks, preemption, aborts, failures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from helexa_engine.runtime.engine import Engine
from helexa_engine.runtime.exchange import EngineRequest, StepOutput
from helexa_engine.runtime.sampler import SamplingFailed
from helexa_engine.sampling_params import SamplingParams
from helexa_engine.testing.toy_model import ToyModel, toy_engine

EOS = 0


def request(name: str, prompt: Any, eos: frozenset[int] = frozenset(), **fields: Any) -> EngineRequest:
    fields.setdefault("temperature", 0.0)
    fields.setdefault("max_tokens", 8)
    return EngineRequest(name, tuple(prompt), SamplingParams(**fields).with_defaults({}), eos)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 90, length).tolist()


def run(engine: Engine, *requests: EngineRequest) -> dict[tuple[str, int], list[StepOutput]]:
    for r in requests:
        engine.add_request(r)
    outputs: dict[tuple[str, int], list[StepOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
    assert engine.scheduler.pool.num_used == 0
    return outputs


def tokens(engine: Engine, r: EngineRequest, index: int = 0) -> list[int | None]:
    return [o.token_id for o in run(engine, r)[r.request_id, index]]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 200, 300])
def test_chunked_prefill_equals_whole_prefill(length: int) -> None:
    r = request("a", prompt_of(length), temperature=1.0, seed=5, logprobs=3, prompt_logprobs=2)
    whole = run(toy_engine(max_num_batched_tokens=1024), r)["a", 0]
    chunked_engine = toy_engine(max_num_seqs=1, max_num_batched_tokens=64)
    chunked = run(chunked_engine, r)["a", 0]
    assert chunked_engine.stats().steps_total == -(-length // 64) + 7
    assert [(o.token_id, o.logprobs, o.prompt_logprobs) for o in chunked] == [
        (o.token_id, o.logprobs, o.prompt_logprobs) for o in whole
    ]


def test_batch_of_many_equals_each_alone() -> None:
    requests = [
        request(str(i), prompt_of(length, i), temperature=0.8, top_k=20, seed=i, max_tokens=4 + i)
        for i, length in enumerate([1, 5, 64, 65, 130, 200, 17, 63, 3, 90])
    ]
    together = run(toy_engine(max_num_seqs=4), *requests)
    for r in requests:
        assert tokens(toy_engine(), r) == [o.token_id for o in together[r.request_id, 0]]


def test_preempted_sequences_give_the_same_tokens() -> None:
    requests = [
        request(str(i), prompt_of(60, i), temperature=1.0, seed=i, max_tokens=80, prompt_logprobs=1) for i in range(4)
    ]
    tight = toy_engine(num_pages=4)
    got = run(tight, *requests)
    assert tight.stats().preemptions_total > 0
    roomy = run(toy_engine(), *requests)
    for key, outputs in roomy.items():
        assert [(o.token_id, o.prompt_logprobs) for o in got[key]] == [(o.token_id, o.prompt_logprobs) for o in outputs]


def test_end_of_turn_and_stop_tokens_end_an_answer() -> None:
    r = request("a", [3, 4], max_tokens=30)
    free = tokens(toy_engine(), r)
    place = 5
    end = free[place]
    assert end is not None
    place = free.index(end)
    by_eos = run(toy_engine(), request("a", [3, 4], frozenset({end}), max_tokens=30))["a", 0]
    assert [o.token_id for o in by_eos] == free[: place + 1]
    assert (by_eos[-1].finish_reason, by_eos[-1].stop_token_id) == ("stop", None)
    by_stop = run(toy_engine(), request("a", [3, 4], stop_token_ids=(end,), max_tokens=30))["a", 0]
    assert [o.token_id for o in by_stop] == free[: place + 1]
    assert (by_stop[-1].finish_reason, by_stop[-1].stop_token_id) == ("stop", end)
    ignoring = run(toy_engine(), request("a", [3, 4], frozenset({end}), max_tokens=30, ignore_eos=True))["a", 0]
    assert [o.token_id for o in ignoring] == free and ignoring[-1].finish_reason == "length"
    late = run(toy_engine(), request("a", [3, 4], frozenset({end}), max_tokens=30, min_tokens=20))["a", 0]
    assert len(late) >= 20 and end not in [o.token_id for o in late[:20]]


def test_max_tokens_is_clamped_to_the_context() -> None:
    outputs = run(toy_engine(num_pages=2, max_model_len=100), request("a", prompt_of(90), max_tokens=10_000))["a", 0]
    assert len(outputs) == 10 and outputs[-1].finish_reason == "length"
    outputs = run(toy_engine(num_pages=2, max_model_len=100), request("a", prompt_of(90), max_tokens=None))["a", 0]
    assert len(outputs) == 10


def test_n_answers_are_independent_and_reproducible() -> None:
    r = request("a", prompt_of(20), n=3, temperature=1.0, seed=9)
    first, second = run(toy_engine(), r), run(toy_engine(max_num_seqs=1), r)
    answers = [[o.token_id for o in first["a", i]] for i in range(3)]
    assert answers == [[o.token_id for o in second["a", i]] for i in range(3)]
    assert len({tuple(a) for a in answers}) == 3
    assert answers[0] == tokens(toy_engine(), request("b", prompt_of(20), temperature=1.0, seed=9))


def test_requests_without_a_seed_draw_from_the_engines() -> None:
    def three(seed: int | None) -> list[list[int | None]]:
        engine = toy_engine(seed=seed)
        return [tokens(engine, request(str(i), [5, 6], temperature=1.0)) for i in range(3)]

    assert three(1) == three(1)
    assert three(1) != three(2)
    assert len({tuple(t) for t in three(1)}) == 3
    assert three(None) != three(None)


def test_prompt_logprobs_score_each_prompt_token_once() -> None:
    prompt = prompt_of(150)
    model = ToyModel()
    output = run(
        toy_engine(model, max_num_seqs=1, max_num_batched_tokens=64), request("a", prompt, prompt_logprobs=2, n=2)
    )
    scores = output["a", 0][0].prompt_logprobs
    assert scores is not None and len(scores) == 150 and scores[0] is None
    assert all(o.prompt_logprobs is None for o in output["a", 0][1:] + output["a", 1])
    rows: dict[int, np.ndarray] = {}
    r = request("b", prompt, max_tokens=1)
    engine = toy_engine(model)
    engine.add_request(r, on_prompt_logits=lambda at, x: rows.update({at + i: v.copy() for i, v in enumerate(x)}))
    run(engine)
    assert sorted(rows) == list(range(150))
    for position in range(1, 150):
        x = rows[position - 1].astype(np.float64)
        score = scores[position]
        assert score is not None and score.token_id == prompt[position]
        assert score.logprob == pytest.approx(x[prompt[position]] - np.log(np.exp(x).sum()), abs=1e-4)
        assert len(score.top) == 2


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_abort_frees_every_page_in_every_phase(steps: int) -> None:
    engine = toy_engine(max_num_seqs=2, max_num_batched_tokens=66)
    engine.add_request(request("a", prompt_of(180), n=3, max_tokens=50))  # one waits, one or two are computed
    engine.add_request(request("b", prompt_of(10), max_tokens=50))
    for _ in range(steps):
        engine.step()
    engine.abort("a")
    assert {s.request_id for s in [*engine.scheduler.running, *engine.scheduler.waiting]} == {"b"}
    assert engine.scheduler.pool.num_used == sum(len(s.pages) for s in engine.scheduler.running)
    engine.abort("b")
    engine.abort("b")
    engine.abort("never heard of")
    assert engine.scheduler.pool.num_used == 0 and not engine.has_work
    assert engine.step() == []


def test_abort_of_one_answer_leaves_the_others() -> None:
    engine = toy_engine()
    engine.add_request(request("a", [1, 2], n=2))
    engine.step()
    engine.abort("a", 0)
    rest = run(engine)
    assert list(rest) == [("a", 1)] and len(rest["a", 1]) == 7


def test_one_failed_sample_fails_one_request_and_never_the_batch() -> None:
    """Hazard 27."""
    model = ToyModel(poisoned_token_id=77)
    good = request("good", [1, 2, 3])
    alone = tokens(toy_engine(model), good)
    outputs = run(toy_engine(model), request("bad", [5, 77], n=2), good, request("scored", [77, 5], prompt_logprobs=1))
    assert [o.token_id for o in outputs["good", 0]] == alone
    assert ("bad", 1) not in outputs
    for name in ("bad", "scored"):
        (output,) = outputs[name, 0]
        assert isinstance(output.error, SamplingFailed)
        assert f"the logits (nan) are not finite, first in the output of layer 0, for request {name}" in str(
            output.error
        )


def test_a_grammar_that_raises_fails_its_request_only() -> None:
    class Broken:
        def apply(self, logits: np.ndarray) -> None:
            raise KeyError("state")

        def accept(self, token_id: int) -> None: ...

        def is_finished(self) -> bool:
            return False

    engine = toy_engine()
    bad = EngineRequest("bad", (1, 2), SamplingParams(max_tokens=3).with_defaults({}))
    engine.add_request(bad, make_grammar=Broken)
    outputs = run(engine, request("good", [1, 2, 3]))
    error = outputs["bad", 0][0].error
    assert isinstance(error, SamplingFailed) and isinstance(error.__cause__, KeyError)
    assert len(outputs["good", 0]) == 8


def test_a_prompt_over_the_context_is_refused_with_the_words_agents_look_for() -> None:
    engine = toy_engine(num_pages=2)
    with pytest.raises(ContextLengthExceeded, match="prompt is too long: 128 tokens > 127 maximum") as caught:
        engine.add_request(request("a", prompt_of(128)))
    assert caught.value.facts == {"prompt_len": 128, "max": 127}
    assert not engine.has_work
    run(engine, request("a", prompt_of(127)))


@pytest.mark.parametrize(
    ("prompt", "fields", "path"),
    [
        ([], {}, "prompt"),
        ([96], {}, "prompt"),
        ([1], {"stop_token_ids": (96,)}, "stop_token_ids"),
        ([1], {"logit_bias": {96: 1.0}}, "logit_bias"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(prompt: list[int], fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        toy_engine().add_request(request("a", prompt, **fields))
    assert caught.value.path == path


def test_timings_and_stats() -> None:
    engine = toy_engine()
    output = run(engine, request("a", prompt_of(70)))["a", 0][-1]
    assert (
        output.timings.queue_seconds >= 0 and output.timings.prefill_seconds > 0 and output.timings.decode_seconds > 0
    )
    stats = engine.stats()
    assert (stats.prompt_tokens_total, stats.generation_tokens_total, stats.kv_cache_usage) == (70, 8, 0.0)


class Clock:
    """Seconds that go on by one a look."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def waiting_request(name: str, seconds: float | None, **fields: Any) -> EngineRequest:
    return replace(request(name, prompt_of(10), max_tokens=40, **fields), max_queue_seconds=seconds)


def test_a_request_that_gets_no_seat_in_time_fails_and_the_others_go_on() -> None:
    engine = toy_engine(max_num_seqs=2)
    engine._clock = Clock()
    outputs = run(
        engine,
        waiting_request("seated", 5.0, n=2),
        waiting_request("overdue", 20.0, n=2),
        waiting_request("patient", 10_000.0),
        waiting_request("for ever", None),
        waiting_request("overdue too", 21.0),
    )
    for name in ("overdue", "overdue too"):
        (output,) = outputs[name, 0]
        error = output.error
        assert isinstance(error, Overloaded) and error.retry_after_seconds > 0
        assert "no place came free within 2" in error.message and "2 answers run" in error.message
    assert ("overdue", 1) not in outputs, "a request fails once"
    for key in (("seated", 0), ("seated", 1), ("patient", 0), ("for ever", 0)):
        assert len(outputs[key]) == 40
    assert engine._deadlines[0][2] == "patient", "known until its time is over, by its name alone"


def test_who_waits_for_a_seat_again_is_not_overdue() -> None:
    """A preempted one has begun to answer; another with the id of one that has ended is not that one."""
    engine = toy_engine(num_pages=4, max_num_seqs=3)
    engine._clock = Clock()
    run(engine, replace(waiting_request("b", 500.0), params=request("b", [1], max_tokens=1).params))
    outputs = run(
        engine,
        *(replace(request(name, prompt_of(60), max_tokens=80), max_queue_seconds=30.0) for name in "a"),
        replace(request("b", prompt_of(60), max_tokens=80)),
        replace(request("c", prompt_of(60), max_tokens=80), max_queue_seconds=30.0),
    )
    assert engine.stats().preemptions_total > 0
    assert all(len(outputs[name, 0]) == 80 for name in "abc")


def test_the_queue_is_told_in_seconds_at_measured_rates() -> None:
    engine = toy_engine(max_num_seqs=1)
    engine._clock = Clock()
    assert engine.stats().queue_seconds is None
    run(engine, request("a", prompt_of(70)))
    for i in range(4):
        engine.add_request(request(str(i), prompt_of(50, i), max_tokens=10))
    engine.step()
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_waiting_tokens, stats.answers_total) == (3, 150, 1)
    assert stats.prompt_tokens_per_second > 0 and stats.decode_tokens_per_second > 0
    mean_answer = 9 / 1  # the eight of the first, and one that is under way
    expected = 150 / stats.prompt_tokens_per_second + 3 * mean_answer / stats.decode_tokens_per_second
    assert stats.queue_seconds == pytest.approx(expected)


def test_an_urgent_request_is_answered_first() -> None:
    engine = toy_engine(max_num_seqs=1)
    requests = [replace(request(str(i), prompt_of(10, i)), priority=-i) for i in range(3)]
    outputs = run(engine, request("first", [1, 2]), *requests)
    firsts = {name: i for i, (name, _) in enumerate(outputs)}
    assert sorted(firsts, key=firsts.__getitem__) == ["2", "1", "first", "0"]
    for r in requests:
        assert tokens(toy_engine(), r) == [o.token_id for o in outputs[r.request_id, 0]]


@settings(max_examples=25, deadline=None)
@given(
    num_pages=st.integers(2, 8),
    seqs=st.integers(1, 4),
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 20),
            st.integers(1, 200),
            st.integers(1, 40),
            st.integers(1, 3),
            st.none() | st.integers(0, 40),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_random_arrivals_and_aborts_lose_no_page(
    num_pages: int, seqs: int, arrivals: list[tuple[int, int, int, int, int | None]]
) -> None:
    engine = toy_engine(num_pages=num_pages, max_num_seqs=seqs, max_num_batched_tokens=128)
    ended: dict[tuple[str, int], str] = {}
    step = 0
    while engine.has_work or any(arrival >= step for arrival, *_ in arrivals):
        for i, (arrival, prompt, answer, n, abort) in enumerate(arrivals):
            if arrival == step:
                engine.add_request(
                    request(str(i), prompt_of(min(prompt, num_pages * 64 - 1), i), max_tokens=answer, n=n)
                )
            elif abort is not None and step == max(abort, arrival + 1):
                engine.abort(str(i))
        for output in engine.step():
            if output.finish_reason:
                ended[output.request_id, output.index] = output.finish_reason
        step += 1
        assert step < 5000
    assert engine.scheduler.pool.num_used == 0 and not engine._answers and not engine._requests
    for i, (_, _, _, n, abort) in enumerate(arrivals):
        if abort is None:
            assert all((str(i), index) in ended for index in range(n))
