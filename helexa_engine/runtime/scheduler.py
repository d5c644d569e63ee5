"""Who computes what in the next step. Ids only: no tensors, no model names.

Continuous batching: every step holds one token of each decoding sequence, and what the token budget leaves goes to prompts, in
chunks that end at the prompt's end or at a multiple of the page size. So a running answer waits for one step from token to token;
while there is one, chunks are cut so that a step lasts ``max_step_seconds`` at most by the rates measured lately, but for the one
page that prompts get always.

**Who comes first.** The tokens for prompts are dealt a page at a time, in turn between owners. Three pages of four go to the most
urgent priority, and there to the prompt with the least left, so that a short one never waits for a long one; every fourth goes to
the prompt that came first, whatever its priority, so that nothing starves. Seats (``max_num_seqs``) are given likewise: three of
four to the most urgent priority, there to the owner with the fewest seats, and of its sequences to the first; every fourth to
whoever waits longest, and until its pages are there nobody else is seated. With one owner and one priority that is the order of
arrival, but that a sequence whose pages are not there lets up to three others pass.

**Nothing deadlocks, and every request ends.** A sequence takes the pages of its whole prompt and one further page before it takes a
seat, so a seated prompt never waits for memory, and it gets its share of the pages that every step deals. A decoding sequence that
finds no page takes those of the last one in rank (the least urgent; among equals the one that came last), which is computed again
later; the first in rank therefore always advances, and alone it always fits, because no sequence may grow beyond the pool. Whoever
lost its pages ``MOST_PREEMPTIONS`` times ranks before all who did not, so urgent requests delay others but never end their
progress. Running sequences so come to their ends, their seats and pages go to others, and who waits longest is seated after at most
three others: that bounds its wait whatever arrives.

With a prefix cache a sequence begins after the pages that others have computed, and its own are kept once they are known to be
sound (:meth:`Scheduler.keep`). Cached pages that nobody runs on count as available and are evicted when they are needed.

A model with recurrent states has a slot for every sequence that may run, so only pages are ever short. The last bits of a state
depend on how its tokens were cut into chunks: cutting at multiples of the page size makes that the same for every chunk size, and
after a preemption what was generated token by token is computed token by token again. So of these only prompts are kept, with
snapshots of the states: chunks end at the borders where one is wanted.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from dataclasses import dataclass
from itertools import chain, islice

from ..cache.page_pool import PagePool
from ..cache.prefix_cache import Node, PrefixCache, extend_keys
from ..cache.state_pool import StatePool
from .sequence import Sequence, SequenceStatus
from .step_pace import StepPace

#: Every so many pages of prompts, and every so many seats, one goes by age alone.
TURNS = 4

#: Who lost its pages so often does not lose them again to one that did not.
MOST_PREEMPTIONS = 3

#: How many waiting sequences are tried for a seat in a step; those before may lack pages.
MOST_TRIED = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start:end`` of a sequence, to be computed in this step.

    Attributes:
        resume_from: state slot of the snapshot that holds the states before ``start``, to be copied before anything is computed.
        save_to: state slot for a snapshot of the states after ``end``, to be copied when everything is computed.
    """

    sequence: Sequence
    start: int
    end: int
    resume_from: int | None = None
    save_to: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the sequence's last token, so that the next one is sampled from it."""
        return self.end == self.sequence.num_tokens


@dataclass(slots=True, eq=False)
class _Owner:
    """What one owner has.

    Attributes:
        num_sequences: waiting or running.
        num_seats: running.
        served: the turn in which it got its last page, by urgency and by age.
    """

    served: list[int]
    num_sequences: int = 0
    num_seats: int = 0


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt that may get tokens in this step: it has ``start:end`` so far and takes no more than ``limit``.

    Attributes:
        node: where a sequence without a seat would begin in the prefix cache.
        resume_from: as in :class:`Chunk`.
    """

    sequence: Sequence
    start: int
    end: int
    limit: int
    node: Node | None = None
    resume_from: int | None = None


class Scheduler:
    """Waiting and running sequences and their pages.

    Args:
        pool: the pages.
        page_size: tokens a page holds.
        max_num_seqs: most sequences running at once: the seats.
        max_num_batched_tokens: most tokens in a step, at least ``page_size + max_num_seqs - 1``.
        max_step_seconds: how long a step may last while an answer runs, as far as chunks of whole pages allow; None: any time.
        states: at least ``max_num_seqs`` slots of recurrent state; None for a model without any.
        prefixes: what is kept of the pages, over the same pool; None keeps nothing.
        snapshot_interval: tokens of prefill from one snapshot to the next, a multiple of the page size.

    Attributes:
        running: by rank, see above.
        num_waiting, num_waiting_tokens: sequences without a seat, and the tokens they have to compute, if nothing is cached.
        num_prefix_queries, num_prefix_hits: prompt tokens that were looked up, and those found.
        pace: the rates of the steps, told by whoever runs them.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_step_seconds: float | None = None,
        states: StatePool | None = None,
        prefixes: PrefixCache | None = None,
        snapshot_interval: int = 1024,
    ) -> None:
        assert prefixes is None or (states is None) == (prefixes.snapshots is None), (
            "states resume from snapshots alone"
        )
        assert snapshot_interval % page_size == 0, "snapshots are taken at page borders"
        assert max_num_batched_tokens >= page_size + max_num_seqs - 1, "a chunk must fit beside every decoding sequence"
        assert states is None or states.num_slots >= max_num_seqs, "a state slot for every sequence that may run"
        self.pool = pool
        self.states = states
        self.prefixes = prefixes
        self.snapshot_interval = snapshot_interval
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_step_seconds = max_step_seconds
        self.pace = StepPace()
        self.running: list[Sequence] = []
        self.num_waiting = 0
        self.num_waiting_tokens = 0
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        # Without a seat, by (priority, first time, owner) and therein by serial: who lost its pages comes before who had none.
        self._queues: dict[tuple[int, bool, str | None], deque[Sequence]] = {}
        self._owners: dict[str | None, _Owner] = {}
        self._num_arrivals = 0
        self._num_seated = 0
        self._num_turns = 0

    @property
    def has_work(self) -> bool:
        return bool(self.num_waiting or self.running)

    @property
    def waiting(self) -> list[Sequence]:
        """Without a seat, the most urgent first, and in the order they came."""
        return sorted(chain(*self._queues.values()), key=lambda s: (s.priority, not s.num_preemptions, s.serial))

    def add(self, sequence: Sequence, last_message_start: int | None = None) -> None:
        """Queues a sequence. Before ``last_message_start`` another prompt may well leave this one: a snapshot is kept there."""
        assert sequence.num_tokens > 0
        assert self._pages_for(sequence.max_num_tokens) <= self.pool.num_pages, "sequence can never fit"
        if self.prefixes is not None and self.prefixes.snapshots is not None:
            length, step = sequence.num_prompt_tokens, self.snapshot_interval
            # Before the last token: where the very same prompt resumes. Behind it: where one that goes on does.
            ends = (length - 1, length, last_message_start or 0)
            wanted = {*range(step, length, step), *(end // self.page_size * self.page_size for end in ends)}
            sequence.borders = tuple(sorted(wanted - {0}))
        sequence.serial = self._num_arrivals
        self._num_arrivals += 1
        turn = self._num_turns  # a new owner's turn comes after those of the others
        owner = self._owners.setdefault(sequence.owner, _Owner([turn, turn]))
        owner.num_sequences += 1
        self._enqueue(sequence)

    def schedule(self, now: float) -> list[Chunk]:
        """The next step's chunks, decoding sequences first; empty only when there is no work."""
        num_preemptions = self.num_preemptions
        chunks = self._schedule_decodes()
        # Pages that were just taken away for want of others go to nobody new.
        may_seat = num_preemptions == self.num_preemptions
        self._schedule_prompts(self._prompt_budget(len(chunks)), may_seat, chunks, now)
        assert chunks or not self.has_work, "work is waiting and nothing was scheduled"
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the pages."""
        chunk.sequence.num_computed_tokens = chunk.end

    def keep(self, sequence: Sequence) -> None:
        """What is computed of a running sequence is sound: others may begin with it. Whole pages of it, that is, and of a model
        with states only those of the prompt, and the snapshot that its last chunk took."""
        if self.prefixes is None or sequence.place is None:
            return
        length = sequence.num_computed_tokens
        if self.states is not None:
            length = min(length, sequence.num_prompt_tokens)
        num_pages = length // self.page_size
        if num_pages > sequence.place.depth:
            keys = self._keys(sequence, num_pages)
            sequence.place = self.prefixes.keep(sequence.place, keys, sequence.pages)
        if sequence.snapshot is not None:
            assert sequence.place.depth * self.page_size == sequence.num_computed_tokens
            self.prefixes.keep_snapshot(sequence.place, sequence.snapshot)
            sequence.snapshot = None

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence in whatever phase it is and frees its pages. Doing it twice is harmless."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.WAITING:
            self._dequeue(sequence)
        else:
            self._unseat(sequence)
        sequence.status = SequenceStatus.FINISHED
        owner = self._owners[sequence.owner]
        owner.num_sequences -= 1
        if not owner.num_sequences:
            del self._owners[sequence.owner]

    # -- Decoding

    def _schedule_decodes(self) -> list[Chunk]:
        """One token of each sequence that has its prompt behind it."""
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING or not self._decodes(sequence):
                continue
            missing = self._pages_for(sequence.num_tokens) - len(sequence.pages)
            while missing > self.pool.num_available and sequence.status is SequenceStatus.RUNNING:
                self._preempt(self.running[-1])
            if sequence.status is SequenceStatus.RUNNING:
                sequence.pages.extend(self._allocate(missing))
                start = sequence.num_computed_tokens
                chunks.append(Chunk(sequence, start, start + 1))
        return chunks

    def _decodes(self, sequence: Sequence) -> bool:
        """Whether a running sequence is at its last token; or, where states must be as they were, at one that it generated before a
        preemption."""
        computed = sequence.num_computed_tokens
        return computed + 1 == sequence.num_tokens or (
            self.states is not None and computed >= sequence.num_prompt_tokens
        )

    def _preempt(self, sequence: Sequence) -> None:
        self._unseat(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(sequence)

    # -- Prompts

    def _prompt_budget(self, num_decodes: int) -> int:
        """Most prompt tokens of a step beside so many that decode: a page at least."""
        budget = self.max_num_batched_tokens - num_decodes
        if num_decodes and self.max_step_seconds is not None:
            tokens = self.pace.prompt_tokens_within(self.max_step_seconds)
            budget = min(budget, max(self.page_size, tokens // self.page_size * self.page_size))
        return budget

    def _schedule_prompts(self, budget: int, may_seat: bool, chunks: list[Chunk], now: float) -> None:
        """Deals ``budget`` tokens by the page. A sequence without a seat that is next to get one takes part, and gets it with its
        first page."""
        prompts = [self._prompt(sequence) for sequence in self.running if not self._decodes(sequence)]
        dealt = list(prompts)
        newcomer = self._next_to_seat() if may_seat else None
        if newcomer is not None:
            prompts.append(newcomer)
        while prompts and budget > 0:
            prompt = prompts[0] if len(prompts) == 1 else self._next_turn(prompts)
            taken = min(prompt.limit, (prompt.end // self.page_size + 1) * self.page_size) - prompt.end
            if taken > budget:
                prompts.remove(prompt)
                continue
            prompt.end += taken
            budget -= taken
            if prompt is newcomer:
                self._seat(prompt, now)
                dealt.append(prompt)
                newcomer = self._next_to_seat() if budget else None
                if newcomer is not None:
                    prompts.append(newcomer)
            if prompt.end == prompt.limit:
                prompts.remove(prompt)
        for prompt in dealt:
            if prompt.end > prompt.start:
                sequence = prompt.sequence
                sequence.snapshot = self._snapshot_slot(sequence, prompt.end)
                chunks.append(Chunk(sequence, prompt.start, prompt.end, prompt.resume_from, sequence.snapshot))

    def _next_turn(self, prompts: list[_Prompt]) -> _Prompt:
        """Whose the next page is."""
        self._num_turns += 1
        by_age = self._num_turns % TURNS == 0

        def urgency(prompt: _Prompt) -> tuple[int, ...]:
            sequence = prompt.sequence
            served = self._owners[sequence.owner].served[by_age]
            if by_age:
                return (sequence.status is SequenceStatus.WAITING, served, sequence.serial)
            return (sequence.priority, served, sequence.num_tokens - prompt.end, sequence.serial)

        prompt = min(prompts, key=urgency)
        self._owners[prompt.sequence.owner].served[by_age] = self._num_turns
        return prompt

    def _prompt(self, sequence: Sequence, start: int | None = None, node: Node | None = None) -> _Prompt:
        """A sequence that is computed up to ``start``. It takes tokens up to its end (of its prompt, where states must be as they
        were) or the next border where a snapshot is wanted."""
        start = sequence.num_computed_tokens if start is None else start
        limit = sequence.num_tokens if self.states is None else max(start + 1, sequence.num_prompt_tokens)
        limit = next((border for border in sequence.borders if start < border < limit), limit)
        return _Prompt(sequence, start, start, limit, node)

    # -- Seats

    def _next_to_seat(self) -> _Prompt | None:
        """The sequence that gets the next seat, if there is one and its pages are there."""
        if not self.num_waiting or len(self.running) >= self.max_num_seqs:
            return None
        ready = [filter(self._is_ready, queue) for queue in self._queues.values()]
        if self._num_seated % TURNS == TURNS - 1:
            heads = (next(queue, None) for queue in ready)
            oldest = min((head for head in heads if head is not None), key=lambda s: s.serial, default=None)
            return None if oldest is None else self._if_it_fits(oldest)
        order = heapq.merge(
            *ready, key=lambda s: (s.priority, not s.num_preemptions, self._owners[s.owner].num_seats, s.serial)
        )
        for sequence in islice(order, MOST_TRIED):
            prompt = self._if_it_fits(sequence)
            if prompt is not None:
                return prompt
            if sequence.num_preemptions:
                return None  # who took its pages would lose them to it
        return None

    def _is_ready(self, sequence: Sequence) -> bool:
        """Not while another answer to the same prompt is computing it: this one then begins with the pages of that one."""
        return (
            self.prefixes is None
            or sequence.index == 0
            or sequence.num_prompt_tokens <= self.page_size
            or all(
                other.request_id != sequence.request_id or other.num_computed_tokens >= other.num_prompt_tokens
                for other in self.running
            )
        )

    def _if_it_fits(self, sequence: Sequence) -> _Prompt | None:
        """A waiting sequence at the place where it would begin; None when there are not enough pages."""
        node = self._resumes_at(sequence)
        room = min(sequence.num_tokens + self.page_size, sequence.max_num_tokens)
        available = self.pool.num_available
        if self.prefixes is not None and node is not None:
            available += node.depth - self.prefixes.num_idle(node)
        if self._pages_for(room) > available:
            return None
        return self._prompt(sequence, node.depth * self.page_size if node is not None else 0, node)

    def _seat(self, prompt: _Prompt, now: float) -> None:
        """Lets a waiting sequence run: its pages first, then the seat."""
        sequence, node, start = prompt.sequence, prompt.node, prompt.start
        self._dequeue(sequence)
        if self.prefixes is not None and node is not None:
            prompt.resume_from = node.snapshot
            sequence.pages.extend(self.prefixes.take(node))
            sequence.place = node
            sequence.num_computed_tokens = start
        sequence.pages.extend(self._allocate(self._pages_for(sequence.num_tokens) - len(sequence.pages)))
        if self.states is not None:
            sequence.state_slot = self.states.allocate()
        sequence.status = SequenceStatus.RUNNING
        bisect.insort(self.running, sequence, key=_rank)
        self._owners[sequence.owner].num_seats += 1
        self._num_seated += 1
        if not sequence.scheduled_at:
            sequence.scheduled_at = now
            sequence.num_cached_tokens = start
            if self.prefixes is not None and sequence.reuses_prefix:
                self.num_prefix_queries += sequence.num_prompt_tokens
                self.num_prefix_hits += start

    def _unseat(self, sequence: Sequence) -> None:
        """The seat, the pages and the slots of a running sequence are free."""
        self.running.remove(sequence)
        self._owners[sequence.owner].num_seats -= 1
        self.pool.release(sequence.pages)
        if self.states is not None and sequence.state_slot is not None:
            self.states.release(sequence.state_slot)
            sequence.state_slot = None
        if self.prefixes is not None and sequence.snapshot is not None:
            self.prefixes.drop_snapshot_slot(sequence.snapshot)
            sequence.snapshot = None
        sequence.place = None
        del sequence.pages[:]
        sequence.num_computed_tokens = 0

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        queue = self._queues.setdefault(_queue_of(sequence), deque())
        if queue and queue[-1].serial > sequence.serial:  # one that ran before
            bisect.insort(queue, sequence, key=lambda s: s.serial)
        else:
            queue.append(sequence)
        self.num_waiting += 1
        self.num_waiting_tokens += sequence.num_tokens

    def _dequeue(self, sequence: Sequence) -> None:
        queue = self._queues[_queue_of(sequence)]
        queue.remove(sequence)
        if not queue:
            del self._queues[_queue_of(sequence)]
        self.num_waiting -= 1
        self.num_waiting_tokens -= sequence.num_tokens

    # -- Pages and what is cached

    def _resumes_at(self, sequence: Sequence) -> Node | None:
        """The end of the cached pages that a waiting sequence begins with; None without a cache. One token at least is left to
        compute, for its logits; and with states, all that was generated."""
        if self.prefixes is None:
            return None
        if not sequence.reuses_prefix:
            return self.prefixes.root
        length = sequence.num_tokens - 1
        if self.states is not None:
            length = min(length, sequence.num_prompt_tokens)
        return self.prefixes.match(self._keys(sequence, length // self.page_size))

    def _snapshot_slot(self, sequence: Sequence, end: int) -> int | None:
        """Where the states after a chunk that ends at ``end`` are to be saved; None where they are not wanted or saved already."""
        if self.prefixes is None or end not in sequence.borders:
            return None
        if self.prefixes.has_snapshot(self._keys(sequence, end // self.page_size)):
            return None
        return self.prefixes.take_snapshot_slot()

    def _allocate(self, count: int) -> list[int]:
        """``count`` of the available pages."""
        if self.prefixes is not None and count > self.pool.num_free:
            self.prefixes.evict(count - self.pool.num_free)
        return self.pool.allocate(count)

    def _keys(self, sequence: Sequence, num_pages: int) -> list[bytes]:
        """The first ``num_pages`` pages of a sequence as the prefix cache compares them."""
        extend_keys(sequence.page_keys, sequence.token_ids, num_pages, self.page_size)
        return sequence.page_keys[:num_pages]

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


def _rank(sequence: Sequence) -> tuple[float, int]:
    """Running sequences lose their pages from the last to the first."""
    is_safe = sequence.num_preemptions >= MOST_PREEMPTIONS
    return (float("-inf") if is_safe else sequence.priority, sequence.serial)


def _queue_of(sequence: Sequence) -> tuple[int, bool, str | None]:
    return (sequence.priority, not sequence.num_preemptions, sequence.owner)
