"""The scheduler and the page pool: nothing is lost, nothing waits for ever, whatever comes and goes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine.cache.page_pool import PagePool
from helexa_engine.cache.state_pool import StatePool
from helexa_engine.runtime.scheduler import Scheduler
from helexa_engine.runtime.sequence import Sequence, SequenceStatus

PAGE = 64


def make_sequence(prompt: int, max_tokens: int, name: str = "r") -> Sequence:
    return Sequence(name, 0, list(range(prompt)), prompt, max_tokens)


def make_scheduler(num_pages: int = 16, seqs: int = 4, tokens: int = 128, *, states: bool = False) -> Scheduler:
    return Scheduler(
        PagePool(num_pages),
        page_size=PAGE,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        states=StatePool(seqs) if states else None,
    )


def advance(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step in which every sampled token is 0; sequences at their limit end."""
    chunks = scheduler.schedule(now=1.0)
    seen = []
    for chunk in chunks:
        seen.append((chunk.sequence.request_id, chunk.start, chunk.end))
        scheduler.computed(chunk)
        if chunk.end == chunk.sequence.num_tokens:
            chunk.sequence.append(0, 1.0)
            if chunk.sequence.num_output_tokens == chunk.sequence.max_tokens:
                scheduler.remove(chunk.sequence)
    return seen


def test_long_prompt_goes_in_chunks_that_end_at_page_borders() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(300, 2))
    assert [advance(scheduler)[0][1:] for _ in range(4)] == [(0, 128), (128, 256), (256, 300), (300, 301)]
    assert not scheduler.has_work and scheduler.pool.num_used == 0


def test_decoding_sequences_are_in_every_step_while_a_prompt_is_computed() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(10, 5, "a"))
    advance(scheduler)
    scheduler.add(make_sequence(300, 2, "b"))
    assert advance(scheduler) == [("a", 10, 11), ("b", 0, 64)]  # 127 tokens are left: one whole page of them
    assert advance(scheduler) == [("a", 11, 12), ("b", 64, 128)]


def test_nobody_overtakes_a_request_that_waits_for_pages() -> None:
    scheduler = make_scheduler(num_pages=4, tokens=256)
    scheduler.add(make_sequence(100, 100, "first"))
    advance(scheduler)
    scheduler.add(make_sequence(180, 10, "large"))
    scheduler.add(make_sequence(5, 2, "small"))
    assert advance(scheduler) == [("first", 100, 101)]
    assert [s.request_id for s in scheduler.waiting] == ["large", "small"]


def test_admission_leaves_a_page_to_grow() -> None:
    scheduler = make_scheduler(num_pages=2)
    scheduler.add(make_sequence(64, 64, "a"))
    scheduler.add(make_sequence(1, 2, "b"))
    assert advance(scheduler) == [("a", 0, 64), ("b", 0, 1)]
    scheduler = make_scheduler(num_pages=2)
    scheduler.add(make_sequence(64, 64, "a"))
    scheduler.add(make_sequence(1, 64, "b"))  # would need a second page one day, and one is free
    assert advance(scheduler) == [("a", 0, 64)]


def test_youngest_gives_its_pages_back_and_is_computed_again() -> None:
    scheduler = make_scheduler(num_pages=4)
    old, young = make_sequence(63, 100, "old"), make_sequence(63, 100, "young")
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.num_preemptions:
        advance(scheduler)
    assert young.status is SequenceStatus.WAITING and not young.pages and young.num_computed_tokens == 0
    assert old.status is SequenceStatus.RUNNING
    while scheduler.has_work:
        advance(scheduler)
    assert old.num_output_tokens == young.num_output_tokens == 100
    assert scheduler.pool.num_used == 0


def test_state_pool_refuses_a_double_free() -> None:
    pool = StatePool(2)
    first, second = pool.allocate(), pool.allocate()
    assert {first, second} == {0, 1} and (pool.num_free, pool.num_used) == (0, 2)
    with pytest.raises(AssertionError, match="all 2 state slots are taken"):
        pool.allocate()
    pool.release(first)
    with pytest.raises(AssertionError, match="is not held"):
        pool.release(first)
    assert pool.allocate() == first


def test_running_sequences_hold_a_state_slot_each() -> None:
    scheduler = make_scheduler(seqs=2, states=True)
    sequences = [make_sequence(10, 3, name) for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    advance(scheduler)
    assert [s.state_slot for s in sequences] == [0, 1, None]
    scheduler.remove(sequences[0])
    assert sequences[0].state_slot is None
    advance(scheduler)
    assert sequences[2].state_slot == 0
    while scheduler.has_work:
        advance(scheduler)
    assert scheduler.states is not None and scheduler.states.num_used == 0


def test_after_a_preemption_states_are_made_in_the_same_steps() -> None:
    """The prompt in its chunks, then token by token what was generated token by token; without states, whole."""
    for states in (False, True):
        scheduler = make_scheduler(num_pages=4, tokens=256, states=states)
        scheduler.add(make_sequence(63, 70, "old"))
        scheduler.add(make_sequence(70, 100, "young"))
        while not scheduler.num_preemptions:
            advance(scheduler)
        length = scheduler.waiting[0].num_tokens
        assert length > 73
        replayed: list[tuple[int, int]] = []
        while len(replayed) < 4:
            replayed += [(start, end) for name, start, end in advance(scheduler) if name == "young"]
        assert replayed[0] == ((0, 70) if states else (0, length))
        assert replayed[1:] == [(i, i + 1) for i in range(replayed[0][1], replayed[0][1] + 3)]


def test_a_chunk_must_fit_beside_the_decoding_sequences() -> None:
    with pytest.raises(AssertionError, match="a chunk must fit"):
        make_scheduler(seqs=66, tokens=128)


@settings(max_examples=150, deadline=None)
@given(
    states=st.booleans(),
    num_pages=st.integers(2, 12),
    seqs=st.integers(1, 5),
    tokens=st.integers(70, 200),
    arrivals=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 600), st.integers(1, 200), st.none() | st.integers(0, 80)),
        min_size=1,
        max_size=12,
    ),
)
def test_every_request_ends_and_no_page_or_slot_is_lost(
    states: bool, num_pages: int, seqs: int, tokens: int, arrivals: list[tuple[int, int, int, int | None]]
) -> None:
    """Arrivals are (step, prompt tokens, answer tokens, step of an abort)."""
    scheduler = make_scheduler(num_pages, seqs, tokens, states=states)
    capacity = num_pages * PAGE
    sequences = []
    for i, (arrival, prompt, answer, abort) in enumerate(arrivals):
        prompt = min(prompt, capacity - 1)
        sequences.append((arrival, make_sequence(prompt, min(answer, capacity - prompt), str(i)), abort))
    total = sum(s.max_num_tokens for _, s, _ in sequences)
    step = 0
    while scheduler.has_work or any(arrival >= step for arrival, _, _ in sequences):
        for arrival, sequence, abort in sequences:
            if arrival == step:
                scheduler.add(sequence)
            elif abort is not None and step == max(abort, arrival + 1):
                scheduler.remove(sequence)
        seen = advance(scheduler)
        assert sum(end - start for _, start, end in seen) <= tokens
        running = [s for _, s, _ in sequences if s.status is SequenceStatus.RUNNING]
        held = [page for s in running for page in s.pages]
        assert len(held) == len(set(held)) == scheduler.pool.num_used
        assert len(running) <= seqs
        if scheduler.states is not None:
            assert len({s.state_slot for s in running}) == len(running) == scheduler.states.num_used
        for sequence in running:
            assert len(sequence.pages) * PAGE >= sequence.num_computed_tokens
        step += 1
        assert step < 50 + total * len(sequences), "a request never ends"
    assert scheduler.pool.num_used == 0
    assert scheduler.states is None or scheduler.states.num_used == 0
    for _, sequence, abort in sequences:
        assert sequence.status is SequenceStatus.FINISHED
        assert abort is not None or sequence.num_output_tokens == sequence.max_tokens
