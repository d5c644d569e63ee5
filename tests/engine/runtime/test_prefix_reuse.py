"""Engine.step with a prefix cache over a toy model: what is reused, what is not, and that no answer changes by it.

With states the toy's are spoiled by every cut that is not at a page's end, so that a wrong resume shows in the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine.cache.prefix_cache import Node
from helexa_engine.runtime.engine import Engine
from helexa_engine.runtime.exchange import EngineRequest, StepOutput
from helexa_engine.runtime.sampler import SamplingFailed
from helexa_engine.runtime.scheduler import Chunk
from helexa_engine.runtime.sequence import SequenceStatus
from helexa_engine.sampling_params import SamplingParams
from helexa_engine.testing.toy_model import ToyModel, toy_engine

PAGE = 8
Outputs = dict[tuple[str, int], list[StepOutput]]
both_kinds = pytest.mark.parametrize("states", [False, True], ids=["dense", "hybrid"])


def make_engine(states: bool, *, cached: bool = True, poisoned: int = -1, **changes: Any) -> Engine:
    model = ToyModel(has_states=states, page_size=PAGE, poisoned_token_id=poisoned)
    arguments: dict[str, Any] = {"num_pages": 64, "max_num_batched_tokens": 32, "prefix_cache": cached}
    return toy_engine(model, **(arguments | changes))


def request(
    name: str,
    prompt: Sequence[int],
    last: int | None = None,
    *,
    priority: int = 0,
    owner: str | None = None,
    **fields: Any,
) -> EngineRequest:
    fields = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "logprobs": 2} | fields
    params = SamplingParams(**fields).with_defaults({})
    return EngineRequest(name, tuple(prompt), params, last_message_start=last, priority=priority, owner=owner)


def tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 90, length).tolist()


def run(engine: Engine, *requests: EngineRequest) -> Outputs:
    for r in requests:
        engine.add_request(r)
    outputs: Outputs = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        if engine.scheduler.prefixes is not None:
            check(engine)
    assert engine.scheduler.pool.num_used == 0
    return outputs


def answer(outputs: Outputs, name: str, index: int = 0) -> list[tuple[Any, Any]]:
    """Tokens and their log probabilities, bit for bit."""
    return [(o.token_id, o.logprobs) for o in outputs[name, index]]


def cached_tokens(outputs: Outputs, name: str, index: int = 0) -> int:
    (count,) = {o.cached_tokens for o in outputs[name, index]}
    return count


def check(engine: Engine) -> None:
    """No page or slot lost, none held by two that do not know of each other, and the sums conserved."""
    scheduler, pool = engine.scheduler, engine.scheduler.pool
    prefixes = scheduler.prefixes
    assert prefixes is not None
    nodes: list[Node] = []
    found = [prefixes.root]
    while found:
        node = found.pop()
        found += node.children.values()
        if node is not prefixes.root:
            nodes.append(node)
            assert node.parent is not None and node.parent.children[node.key] is node
            assert node.depth == node.parent.depth + 1
    cached = {node.page: node for node in nodes}
    assert len(cached) == len(nodes), "a page in two places of the tree"
    references = dict.fromkeys(range(pool.num_pages), 0)
    for page in cached:
        references[page] += 1
    for sequence in scheduler.running:
        assert sequence.place is not None and len(set(sequence.pages)) == len(sequence.pages)
        node = sequence.place
        while node is not prefixes.root:
            assert sequence.pages[node.depth - 1] == node.page
            assert node.parent is not None
            node = node.parent
        for i, page in enumerate(sequence.pages):
            references[page] += 1
            assert i < sequence.place.depth or (page not in cached and references[page] == 1), (
                "shared unknown to the tree"
            )
        assert sequence.snapshot is None, "between steps every snapshot is kept or dropped"
    for sequence in scheduler.waiting:
        assert not sequence.pages and sequence.state_slot is None and sequence.place is None
    assert [pool.references(page) for page in range(pool.num_pages)] == list(references.values())
    assert pool.num_free == sum(count == 0 for count in references.values())
    assert pool.num_idle == sum(references[page] == 1 for page in cached)
    assert pool.num_used + pool.num_idle + pool.num_free == pool.num_pages
    slots = [sequence.state_slot for sequence in scheduler.running]
    snapshots = [node.snapshot for node in nodes if node.snapshot is not None]
    if scheduler.states is None:
        assert not snapshots and set(slots) <= {None}
    else:
        assert prefixes.snapshots is not None
        assert len(set(slots)) == len(slots) == scheduler.states.num_used
        assert len(set(snapshots)) == len(snapshots) == prefixes.snapshots.num_used
        assert not set(slots) & set(snapshots)


@both_kinds
@pytest.mark.parametrize("length", [PAGE - 1, PAGE, PAGE + 1, 5 * PAGE - 1, 5 * PAGE, 5 * PAGE + 1, 100])
def test_prefix_hit_equals_cold_run_at_every_border(states: bool, length: int) -> None:
    engine, prompt = make_engine(states), tokens(length)
    first, second = run(engine, request("a", prompt)), run(engine, request("b", prompt))
    assert (
        answer(second, "b")
        == answer(first, "a")
        == answer(run(make_engine(states, cached=False), request("a", prompt)), "a")
    )
    assert cached_tokens(first, "a") == 0 and cached_tokens(second, "b") == (length - 1) // PAGE * PAGE
    stats = engine.stats()
    assert stats.prefix_cache_queries_total == 2 * length
    assert stats.prefix_cache_hits_total == cached_tokens(second, "b")


@both_kinds
def test_the_next_turn_reuses_the_conversation(states: bool) -> None:
    """Of a dense model the generated tokens too; a hybrid computes these again."""
    engine, prompt = make_engine(states), tokens(50)
    first = run(engine, request("a", prompt, max_tokens=30))
    said = [o.token_id for o in first["a", 0] if o.token_id is not None]
    turn = request("b", prompt + said + tokens(20, 1))
    second = run(engine, turn)
    assert cached_tokens(second, "b") == (48 if states else 72)  # of 50 and of 79: the last one was never fed back
    assert answer(second, "b") == answer(run(make_engine(states, cached=False), turn), "b")


@both_kinds
def test_an_edited_turn_and_a_branch_reuse_what_stands_before(states: bool) -> None:
    engine = make_engine(states, num_snapshots=32)
    system, rest = tokens(45), tokens(60, 1)
    run(engine, request("a", system + rest, last=90))
    for name, prompt, cached in (
        (
            "edit",
            system + rest[:30] + tokens(40, 2),
            (72, 64),
        ),  # leaves at 75: snapshots stand at 32, 64 and 96, by the interval
        ("branch", system + rest[:47] + tokens(40, 3), (88, 88)),  # leaves at 92: before the last message
        ("other system", tokens(45, 4) + rest, (0, 0)),
        ("edit again", system + rest[:30] + tokens(40, 2), (112, 112)),
    ):
        r = request(name, prompt)
        got = run(engine, r)
        assert cached_tokens(got, name) == cached[states], name
        assert answer(got, name) == answer(run(make_engine(states, cached=False), r), name)


@both_kinds
def test_two_conversations_share_one_system_prompt(states: bool) -> None:
    engine, system = make_engine(states), tokens(70)
    prompts = {str(i): system + tokens(25, i) for i in range(1, 4)}
    run(engine, request("first", prompts["1"], last=70))
    together = run(engine, *(request(name, prompt, last=70) for name, prompt in prompts.items()))
    assert [cached_tokens(together, name) for name in "123"] == [
        88,
        64,
        64,
    ]  # 95 and 70, but for a last token and whole pages
    for name, prompt in prompts.items():
        assert answer(together, name) == answer(run(make_engine(states, cached=False), request(name, prompt)), name)


@both_kinds
def test_answers_to_one_prompt_share_its_pages(states: bool) -> None:
    engine, r = make_engine(states), request("a", tokens(83), n=3)
    engine.add_request(r)
    while engine.scheduler.waiting:
        engine.step()
    used = engine.scheduler.pool.num_used
    assert used <= 83 // PAGE + 3 * 2, "each has at most the page it began with and the next for itself"
    got = run(engine)
    assert [cached_tokens(got, "a", i) for i in range(3)] == [0, 80, 80]
    alone = run(make_engine(states, cached=False, max_num_seqs=1), r)
    for i in range(3):
        assert answer(alone, "a", i)[-len(got["a", i]) :] == answer(got, "a", i)


@both_kinds
def test_a_request_that_asks_for_all_logits_computes_all(states: bool) -> None:
    engine, prompt = make_engine(states), tokens(60)
    run(engine, request("a", prompt))
    queries = engine.stats().prefix_cache_queries_total
    got = run(engine, request("b", prompt, prompt_logprobs=1))
    scores = got["b", 0][0].prompt_logprobs
    assert scores is not None and len(scores) == 60 and cached_tokens(got, "b") == 0
    rows: list[int] = []
    engine.add_request(request("c", prompt), on_prompt_logits=lambda at, x: rows.extend(range(at, at + len(x))))
    assert cached_tokens(run(engine), "c") == 0 and rows == list(range(60))
    assert engine.stats().prefix_cache_queries_total == queries, "what is not looked up is not counted"


@both_kinds
def test_nothing_is_kept_of_logits_that_are_not_finite(states: bool) -> None:
    engine = make_engine(states, poisoned=95)
    prompt = [*tokens(63), 95]  # the last of eight pages; chunks of four
    got = run(engine, request("bad", prompt))
    assert isinstance(got["bad", 0][-1].error, SamplingFailed)
    sound = 56 if states else 32  # the chunks before the last one, which a hybrid begins at a border of its own
    assert cached_tokens(run(engine, request("b", [*prompt[:63], 5])), "b") == sound
    prompt[31] = 95  # at the end of a chunk that samples nothing
    engine = make_engine(states, poisoned=95)
    engine.add_request(request("bad", prompt))
    (output,) = engine.step()
    assert isinstance(output.error, SamplingFailed) and "prompt token 31 is not finite" in str(output.error)
    check(engine)
    assert not engine.has_work and engine.stats().kv_pages_cached == 0 and engine.stats().snapshots_used == 0


@both_kinds
def test_a_preempted_sequence_resumes_from_the_cache(states: bool) -> None:
    requests = [request(str(i), tokens(30, i), max_tokens=40, seed=i) for i in range(4)]
    tight, roomy = make_engine(states, num_pages=16), make_engine(states, cached=False)
    got, undisturbed = run(tight, *requests), run(roomy, *requests)
    assert tight.stats().preemptions_total > 0
    for r in requests:
        assert answer(got, r.request_id) == answer(undisturbed, r.request_id)
        assert cached_tokens(got, r.request_id) == 0, "its own tokens are no saving"


@both_kinds
@pytest.mark.parametrize("length", [4 * PAGE - 1, 4 * PAGE, 4 * PAGE + 1])
def test_a_preempted_sequence_resumes_right_behind_its_prompt(states: bool, length: int) -> None:
    """Where the prompt ends at a page's end, all of it is cached, and what is computed first is a generated token."""
    r, undisturbed = request("a", tokens(length), max_tokens=10), make_engine(states, cached=False)
    expected = answer(run(undisturbed, r), "a")
    engine = make_engine(states)
    engine.add_request(r)
    outputs: list[StepOutput] = []
    while len(outputs) < 5:
        outputs += engine.step()
    engine.scheduler._preempt(engine.scheduler.running[0])
    outputs += run(engine)["a", 0]
    assert [(o.token_id, o.logprobs) for o in outputs] == expected


def test_a_preempted_sequence_computes_only_what_was_evicted() -> None:
    engine = make_engine(False, num_pages=12)
    engine.add_request(request("old", tokens(30, 1), max_tokens=60))
    engine.add_request(request("young", tokens(30, 2), max_tokens=40))
    young = engine._requests["young"][0].sequence
    while young.status is not SequenceStatus.WAITING or not young.num_output_tokens:
        engine.step()
        check(engine)
    engine.abort("old")
    engine.step()
    assert young.num_computed_tokens == young.num_tokens - 1 and young.place is not None
    assert engine.stats().preemptions_total == 1


def test_what_a_hybrid_generated_is_not_resumed_from_a_prompt_that_says_the_same() -> None:
    """A state after tokens that were generated one by one is not the one after the same tokens in a prompt."""
    r, undisturbed = request("a", tokens(30), max_tokens=40), make_engine(True, cached=False)
    expected = answer(run(undisturbed, r), "a")
    said = [token for token, _ in expected]
    engine = make_engine(True, num_snapshots=32, snapshot_interval=PAGE)
    run(engine, request("prompt", [*r.prompt_token_ids, *said[:33]]))
    engine.add_request(r)
    outputs: list[StepOutput] = []
    while len(outputs) < 36:
        outputs += engine.step()
    engine.scheduler._preempt(engine.scheduler.running[0])
    outputs += run(engine)["a", 0]
    assert [(o.token_id, o.logprobs) for o in outputs] == expected


@both_kinds
@pytest.mark.parametrize("steps", range(7))
def test_abort_in_every_phase_leaves_nothing_held(states: bool, steps: int) -> None:
    """Hazard 19: waiting, waiting for the answer beside it, in the prompt, in the answer."""
    engine = make_engine(states, max_num_seqs=3, num_snapshots=2)
    run(engine, request("before", tokens(40)))
    engine.add_request(request("a", tokens(40) + tokens(60, 1), n=3, max_tokens=50))
    engine.add_request(request("b", tokens(90, 2), max_tokens=50))
    for _ in range(steps):
        engine.step()
        check(engine)
    engine.abort("a")
    check(engine)
    engine.abort("b")
    check(engine)
    assert engine.scheduler.pool.num_used == 0 and not engine.has_work


def test_cached_pages_are_free_space_for_whoever_comes() -> None:
    """Hazard 14."""
    engine = make_engine(False, num_pages=16)
    run(engine, request("a", tokens(100), max_tokens=1))
    stats = engine.stats()
    assert (stats.kv_pages_used, stats.kv_pages_cached, stats.kv_cache_usage) == (0, 12, 0.0)
    got = run(engine, request("b", tokens(110, 1), max_tokens=10))
    assert len(got["b", 0]) == 10 and engine.stats().preemptions_total == 0


def test_snapshots_stand_every_interval_before_the_last_message_and_at_the_last_border() -> None:
    engine = make_engine(True, snapshot_interval=3 * PAGE, max_num_batched_tokens=64)
    engine.add_request(request("a", tokens(100), last=70, max_tokens=5))
    ends = []
    while not ends or ends[-1] < 100:
        engine.step()
        ends.append(engine.scheduler.running[0].num_computed_tokens)
    assert ends == [24, 48, 64, 72, 96, 100]
    prefixes = engine.scheduler.prefixes
    assert prefixes is not None and sorted(node.depth * PAGE for node in prefixes._with_snapshot) == ends[:-1]


def test_resume_replays_less_than_the_interval_wherever_a_prompt_branches() -> None:
    interval, trunk = 3 * PAGE, tokens(120)
    for at in range(1, 120, 7):
        engine = make_engine(True, num_snapshots=32, snapshot_interval=interval)
        run(engine, request("trunk", trunk, max_tokens=1))
        got = run(engine, request("branch", trunk[:at] + tokens(20, 1), max_tokens=1))
        assert at - interval < cached_tokens(got, "branch") <= at


@both_kinds
def test_what_is_not_cached_is_what_was_computed(states: bool) -> None:
    """``cached_tokens`` is exact: it and the tokens that went through the model are the prompt, each once."""
    engine, computed = make_engine(states, num_snapshots=32), []
    forward = engine.runner.forward

    def counting(chunks: Sequence[Chunk]) -> torch.Tensor:
        computed.append(sum(chunk.num_tokens for chunk in chunks))
        return forward(chunks)

    engine.runner.forward = counting  # type: ignore[method-assign]
    for i, prompt in enumerate((tokens(100), tokens(100), tokens(75) + tokens(40, 1), tokens(30, 2), tokens(100)[:64])):
        del computed[:]
        got = run(engine, request(str(i), prompt, last=70, max_tokens=1))
        assert sum(computed) + cached_tokens(got, str(i)) == len(prompt)


Arrival = tuple[int, int, int, int, int, int, int | None, int, str | None]


@settings(max_examples=120, deadline=None)
@given(
    states=st.booleans(),
    num_pages=st.integers(4, 14),
    seqs=st.integers(1, 4),
    budgets=st.lists(st.integers(PAGE + 3, 40), min_size=1, max_size=4),
    num_snapshots=st.integers(1, 4),
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 12),  # step of arrival
            st.integers(0, 3),  # trunk it shares with others
            st.integers(0, 60),  # tokens of the trunk
            st.integers(1, 30),  # tokens of its own, the last message
            st.integers(1, 20),  # tokens of answer
            st.integers(1, 2),  # answers
            st.none() | st.integers(0, 25),  # step of an abort
            st.integers(-1, 1),  # priority
            st.sampled_from([None, "a", "b"]),  # owner
        ),
        min_size=2,
        max_size=7,
    ),
)
def test_random_arrivals_branches_aborts_and_evictions_change_no_answer(
    states: bool, num_pages: int, seqs: int, budgets: list[int], num_snapshots: int, arrivals: list[Arrival]
) -> None:
    """Against an engine that computes each request alone and keeps nothing. Requests branch from a few trunks anywhere; every third
    goes on from the first answer to the one before it, if that has ended. Budgets, and with them chunks, change from step to step."""
    engine = make_engine(
        states, num_pages=num_pages, max_num_seqs=seqs, max_num_batched_tokens=max(budgets), num_snapshots=num_snapshots
    )
    capacity = num_pages * PAGE
    sent: dict[str, EngineRequest] = {}
    outputs: Outputs = {}
    last_arrival, step = max(arrival for arrival, *_ in arrivals), 0
    while engine.has_work or step <= last_arrival:
        engine.scheduler.max_num_batched_tokens = budgets[step % len(budgets)]
        for i, (arrival, trunk, shared, own, length, n, abort, priority, owner) in enumerate(arrivals):
            if arrival == step:
                prompt = tokens(60, 100 + trunk)[:shared]
                if i % 3 == 2 and str(i - 1) in sent:
                    said = [o.token_id for o in outputs.get((str(i - 1), 0), ()) if o.token_id is not None]
                    prompt = [*sent[str(i - 1)].prompt_token_ids, *said]
                prompt = (prompt + tokens(own, i))[: capacity - 1]
                last = max(0, len(prompt) - own)
                sent[str(i)] = request(
                    str(i), prompt, last, max_tokens=length, n=n, seed=i, priority=priority, owner=owner
                )
                engine.add_request(sent[str(i)])
            elif abort is not None and step == max(abort, arrival + 1):
                engine.abort(str(i))
            check(engine)
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        check(engine)
        step += 1
        assert step < 3000, "a request never ends"
    assert engine.scheduler.pool.num_used == 0 and not engine._answers and not engine._requests
    for i, (*_, n, abort, _, _) in enumerate(arrivals):
        alone = make_engine(states, cached=False, num_pages=num_pages, max_num_seqs=1, max_num_batched_tokens=1024)
        naive = run(alone, sent[str(i)])
        for index in range(n):
            got, expected = (
                answer(outputs, str(i), index) if (str(i), index) in outputs else [],
                answer(naive, str(i), index),
            )
            assert got == expected if abort is None else got == expected[: len(got)]
