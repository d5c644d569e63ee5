"""The scheduler and the page pool: nothing is lost, nothing waits for ever, whatever comes and goes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine.cache.page_pool import PagePool
from helexa_engine.cache.state_pool import StatePool
from helexa_engine.runtime.scheduler import MOST_PREEMPTIONS, TURNS, Scheduler
from helexa_engine.runtime.sequence import Sequence, SequenceStatus

PAGE = 64


def make_sequence(prompt: int, max_tokens: int, name: str = "r", **fields: Any) -> Sequence:
    return Sequence(name, 0, list(range(prompt)), prompt, max_tokens, **fields)


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


def test_a_request_that_waits_for_pages_lets_three_pass_and_then_holds_back_the_others() -> None:
    """Hazard 12: it is pages that admit, and the seats that are free meanwhile are not wasted."""
    scheduler = make_scheduler(num_pages=6, tokens=256)
    scheduler.add(make_sequence(300, 40, "first"))
    scheduler.add(make_sequence(250, 10, "large"))  # needs five pages, and one is left
    for i in range(4):
        scheduler.add(make_sequence(5, 2, f"small {i}"))
    seen = []
    while len(seen) < 8:
        seen += [name for name, start, _ in advance(scheduler) if start == 0]
        if "small 1" in seen and scheduler.running:
            assert ("small 3" in seen) <= ("large" in seen), "nobody passes after the third seat"
        if not scheduler.has_work:
            break
    assert seen == ["first", "small 0", "small 1", "large", "small 2", "small 3"]


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


# -- Fairness


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_the_other_way_round() -> None:
    scheduler = make_scheduler(num_pages=600, tokens=512, seqs=8)
    scheduler.add(make_sequence(30_000, 1, "long"))
    advance(scheduler)
    for i in range(20):  # two steps each, one after the other
        scheduler.add(make_sequence(300, 1, f"short {i}"))
        steps = [advance(scheduler), advance(scheduler)]
        assert ("short", 300) in [(name.split()[0], end) for step in steps for name, _, end in step]
        for step in steps:
            of_long = sum(end - start for name, start, end in step if name == "long")
            assert of_long >= 512 // TURNS
            assert all(end % PAGE == 0 for name, _, end in step if name == "long")


def test_equal_prompts_are_not_computed_all_at_once_but_one_before_the_other() -> None:
    """Sharing evenly would end them all at the end."""
    scheduler = make_scheduler(num_pages=100, tokens=256)
    for name in "abc":
        scheduler.add(make_sequence(1024, 1, name))
    ends = {}
    for step in range(12):
        ends |= {name: step for name, _, end in advance(scheduler) if end == 1024}
    assert ends == {"a": 3, "b": 7, "c": 11}


def test_owners_share_the_tokens_of_prompts() -> None:
    scheduler = make_scheduler(num_pages=200, tokens=256, seqs=8)
    for i in range(6):
        scheduler.add(make_sequence(1280, 1, f"many {i}", owner="a"))
    scheduler.add(make_sequence(1280, 1, "single", owner="b"))
    shares = []
    for _ in range(10):
        shares.append(sum(end - start for name, start, end in advance(scheduler) if name == "single"))
    assert shares == [64, *9 * [128]], "half of each step, but for the first turn"


def test_an_owner_that_comes_and_goes_gets_no_more_than_its_turn() -> None:
    scheduler = make_scheduler(num_pages=100, tokens=PAGE + 3)
    scheduler.add(make_sequence(40 * PAGE, 1, "steady", owner="a"))
    for i in range(20):
        scheduler.add(make_sequence(PAGE, 1, f"visit {i}", owner="b"))
        advance(scheduler)
        advance(scheduler)
    steady = scheduler.running[0]
    assert steady.request_id == "steady" and steady.num_computed_tokens >= 20 * PAGE


def test_the_next_seat_goes_to_the_owner_with_the_fewest() -> None:
    scheduler = make_scheduler(num_pages=64, seqs=2, tokens=512)
    for i in range(8):
        scheduler.add(make_sequence(10, 3 if i == 0 else 50, f"a{i}", owner="a"))
    advance(scheduler)
    scheduler.add(make_sequence(10, 3, "b", owner="b"))
    while len(scheduler.running) == 2:
        advance(scheduler)
    advance(scheduler)
    assert [s.request_id for s in scheduler.running] == ["a1", "b"]


def test_lower_priorities_are_earlier_in_seats_and_tokens() -> None:
    scheduler = make_scheduler(num_pages=64, seqs=2, tokens=256)
    scheduler.add(make_sequence(2048, 1, "later", priority=1))
    advance(scheduler)
    scheduler.add(make_sequence(1024, 1, "sooner", priority=0))
    scheduler.add(make_sequence(1024, 1, "soonest", priority=-7))
    seen: dict[str, int] = {}
    for _ in range(4):
        for name, start, end in advance(scheduler):
            seen[name] = seen.get(name, 0) + end - start
    assert seen == {"soonest": 4 * 192, "later": 4 * 64}, "all but one page of four"
    assert [s.request_id for s in scheduler.waiting] == ["sooner"]


def test_who_is_less_urgent_gives_its_pages_back_though_it_came_first() -> None:
    scheduler = make_scheduler(num_pages=4)
    old, young = make_sequence(63, 100, "old", priority=1), make_sequence(63, 100, "young")
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.num_preemptions:
        advance(scheduler)
    assert old.status is SequenceStatus.WAITING and young.status is SequenceStatus.RUNNING


@pytest.mark.parametrize("memory", ["roomy", "tight"])
def test_a_stream_of_urgent_requests_starves_nobody(memory: str) -> None:
    """Hazard 13. Urgent ones come faster than they are answered, for ever."""
    num_pages = 64 if memory == "roomy" else 8
    scheduler = make_scheduler(num_pages=num_pages, seqs=3, tokens=PAGE + 2)
    patient = make_sequence(190, 150, "patient", priority=5)
    scheduler.add(make_sequence(100, 90, "urgent", priority=-1))
    scheduler.add(patient)
    step = 0
    while patient.status is not SequenceStatus.FINISHED:
        scheduler.add(make_sequence(100, 80, f"urgent {step}", priority=-1, owner=str(step % 3)))
        advance(scheduler)
        step += 1
        # A seat after three others, each of 2 pages and 80 tokens; then every fourth page of a step is its own. All that again
        # for each time that its pages are taken.
        assert step < (1 + MOST_PREEMPTIONS) * (TURNS * (2 * TURNS + 80) + TURNS * 6 + 150)
    assert patient.num_preemptions <= MOST_PREEMPTIONS and patient.num_output_tokens == 150
    assert (scheduler.num_preemptions > 0) == (memory == "tight")


def test_a_step_beside_a_running_answer_is_cut_to_what_its_seconds_hold() -> None:
    scheduler = make_scheduler(num_pages=100, tokens=512)
    scheduler.max_step_seconds = 0.5
    scheduler.add(make_sequence(10, 50, "answer"))
    advance(scheduler)

    def chunk() -> int:
        return sum(end - start for name, start, end in advance(scheduler) if name == "prompt")

    scheduler.add(make_sequence(6000, 1, "prompt"))
    assert chunk() == PAGE, "before any rate is known"
    scheduler.pace.observe(512, 0, 1.024)  # 2 ms a token
    scheduler.pace.observe(0, 1, 0.05)
    assert chunk() == 192  # 0.45 s hold 225
    for _ in range(8):
        scheduler.pace.observe(512, 0, 51.2)  # 100 ms a token
    assert chunk() == PAGE, "never less than a page"
    for _ in range(40):
        scheduler.pace.observe(512, 1, 0.07)
    assert chunk() == 448, "never more than max_num_batched_tokens"
    scheduler.remove(next(s for s in scheduler.running if s.request_id == "answer"))
    scheduler.pace.observe(512, 0, 51.2)
    assert chunk() == 512, "nobody waits"


def test_a_running_answer_gets_a_token_in_every_step() -> None:
    scheduler = make_scheduler(num_pages=640, tokens=512, seqs=64)
    scheduler.add(make_sequence(10, 100, "answer"))
    advance(scheduler)
    for i in range(63):
        scheduler.add(make_sequence(500 + i, 3, str(i), priority=-i, owner=str(i % 5)))
        step = advance(scheduler)
        assert ("answer", 10 + i, 11 + i) in step and sum(end - start for _, start, end in step) <= 512


def test_64_sequences_run_together() -> None:
    scheduler = make_scheduler(num_pages=256, tokens=512, seqs=64, states=True)
    for i in range(80):
        scheduler.add(make_sequence(100 + i, 40, str(i)))
    most, steps = 0, 0
    while scheduler.has_work:
        advance(scheduler)
        most, steps = max(most, len(scheduler.running)), steps + 1
    assert most == 64 and scheduler.pool.num_used == 0 and scheduler.states is not None
    assert scheduler.states.num_used == 0 and steps < 200


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode", "preempted"])
@pytest.mark.parametrize("states", [False, True], ids=["dense", "hybrid"])
def test_an_aborted_sequence_is_gone_before_the_next_step(phase: str, states: bool) -> None:
    """Hazard 19."""
    scheduler = make_scheduler(num_pages=8, seqs=2, states=states)
    other, gone = make_sequence(50, 300, "other"), make_sequence(190, 200, "gone")
    scheduler.add(other)
    scheduler.add(gone)
    reached = {
        "waiting": lambda: gone.status is SequenceStatus.WAITING,
        "prefill": lambda: 0 < gone.num_computed_tokens < 190,
        "decode": lambda: gone.num_output_tokens > 3,
        "preempted": lambda: gone.num_preemptions > 0 and gone.status is SequenceStatus.WAITING,
    }[phase]
    while not reached():
        advance(scheduler)
    scheduler.remove(gone)
    scheduler.remove(gone)
    assert scheduler.pool.num_used == len(other.pages) and gone not in [*scheduler.waiting, *scheduler.running]
    assert states is False or (
        scheduler.states is not None and scheduler.states.num_used == (other.status is SequenceStatus.RUNNING)
    )
    while scheduler.has_work:
        assert "gone" not in [name for name, _, _ in advance(scheduler)]
    assert other.num_output_tokens == 300 and not scheduler._owners and not scheduler._queues
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (0, 0)


Arrival = tuple[int, int, int, int | None, int, str | None]


@settings(max_examples=200, deadline=None)
@given(
    states=st.booleans(),
    num_pages=st.integers(2, 12),
    seqs=st.integers(1, 5),
    budgets=st.lists(st.integers(70, 200), min_size=1, max_size=5),
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 40),  # step of arrival
            st.integers(1, 600),  # prompt tokens
            st.integers(1, 200),  # answer tokens
            st.none() | st.integers(0, 80),  # step of an abort
            st.integers(-1, 1),  # priority
            st.sampled_from([None, "a", "b"]),  # owner
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_every_request_ends_and_no_page_or_slot_is_lost(
    states: bool, num_pages: int, seqs: int, budgets: list[int], arrivals: list[Arrival]
) -> None:
    """Hazards 11 to 13: what was reserved is all there is, the sums are conserved, and nobody waits for ever."""
    scheduler = make_scheduler(num_pages, seqs, max(budgets), states=states)
    capacity = num_pages * PAGE
    sequences = []
    for i, (arrival, prompt, answer, abort, priority, owner) in enumerate(arrivals):
        prompt = min(prompt, capacity - 1)
        sequence = make_sequence(prompt, min(answer, capacity - prompt), str(i), priority=priority, owner=owner)
        sequences.append((arrival, sequence, abort))
    step = 0
    while scheduler.has_work or any(arrival >= step for arrival, _, _ in sequences):
        scheduler.max_num_batched_tokens = budgets[step % len(budgets)]
        for arrival, sequence, abort in sequences:
            if arrival == step:
                scheduler.add(sequence)
            elif abort is not None and step == max(abort, arrival + 1):
                scheduler.remove(sequence)
        decoding = {s.request_id for s in scheduler.running if s.num_computed_tokens == s.num_tokens - 1}
        seen = advance(scheduler)
        assert sum(end - start for _, start, end in seen) <= scheduler.max_num_batched_tokens
        waiting, running = scheduler.waiting, scheduler.running
        preempted = {s.request_id for s in waiting}
        assert decoding <= {name for name, _, _ in seen} | preempted, "a running answer missed a step"
        assert all(
            end % PAGE == 0 or end - start == 1 or end >= _prompt_of(sequences, name) for name, start, end in seen
        )
        held = [page for s in running for page in s.pages]
        assert len(held) == len(set(held)) == scheduler.pool.num_used
        assert scheduler.pool.num_used + scheduler.pool.num_free == num_pages
        assert len(running) <= seqs and all(s.status is SequenceStatus.RUNNING for s in running)
        if scheduler.states is not None:
            assert len({s.state_slot for s in running}) == len(running) == scheduler.states.num_used
        for sequence in running:
            assert len(sequence.pages) * PAGE >= sequence.num_computed_tokens
        for sequence in waiting:
            assert not sequence.pages and sequence.state_slot is None and sequence.num_computed_tokens == 0
        assert scheduler.num_waiting == len(waiting)
        assert scheduler.num_waiting_tokens == sum(s.num_tokens for s in waiting)
        for owner, held_by in scheduler._owners.items():
            assert held_by.num_seats == sum(s.owner == owner for s in running)
            assert held_by.num_sequences == held_by.num_seats + sum(s.owner == owner for s in waiting)
        step += 1
        # Each step generates a token or computes a page or a replayed token of one of them, and an abort makes that no more.
        assert step <= 42 + sum(_most_steps(s) for _, s, _ in sequences), "a step was wasted"
    assert scheduler.pool.num_used == 0 and not scheduler._owners and not scheduler._queues
    assert scheduler.states is None or scheduler.states.num_used == 0
    for _, sequence, abort in sequences:
        assert sequence.status is SequenceStatus.FINISHED
        assert abort is not None or sequence.num_output_tokens == sequence.max_tokens


def _prompt_of(sequences: list[tuple[int, Sequence, int | None]], name: str) -> int:
    return sequences[int(name)][1].num_prompt_tokens


def _most_steps(sequence: Sequence) -> int:
    pages = -(-sequence.max_num_tokens // PAGE)
    return sequence.max_tokens + (1 + sequence.num_preemptions) * (pages + sequence.max_tokens)
