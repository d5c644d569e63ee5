"""Who computes what in the next step. Ids only: no tensors, no model names.

Continuous batching: every step holds one token of each decoding sequence, and what the token budget leaves goes to prompts,
oldest first, in chunks that end at the prompt's end or at a multiple of the page size.

Nothing deadlocks: a sequence is admitted when its whole prompt and one further page are free; when a decoding sequence
finds no page, the youngest running one gives its pages back and is computed again later. The oldest therefore always
advances, and alone it always fits, because no sequence may grow beyond the pool.

A model with recurrent states has a slot for every sequence that may run, so only pages are ever short. The last bits of a state
depend on how its tokens were cut into chunks: cutting at multiples of the page size makes that the same for every chunk size, and
after a preemption what was generated token by token is computed token by token again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..cache.page_pool import PagePool
from ..cache.state_pool import StatePool
from .sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start:end`` of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the sequence's last token, so that the next one is sampled from it."""
        return self.end == self.sequence.num_tokens


class Scheduler:
    """Waiting and running sequences and their pages.

    Args:
        pool: the pages.
        page_size: tokens a page holds.
        max_num_seqs: most sequences running at once.
        max_num_batched_tokens: most tokens in a step, at least ``page_size + max_num_seqs - 1``.
        states: at least ``max_num_seqs`` slots of recurrent state; None for a model without any.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        states: StatePool | None = None,
    ) -> None:
        assert max_num_batched_tokens >= page_size + max_num_seqs - 1, "a chunk must fit beside every decoding sequence"
        assert states is None or states.num_slots >= max_num_seqs, "a state slot for every sequence that may run"
        self.pool = pool
        self.states = states
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        assert sequence.num_tokens > 0
        assert self._pages_for(sequence.max_num_tokens) <= self.pool.num_pages, "sequence can never fit"
        self.waiting.append(sequence)

    def schedule(self, now: float) -> list[Chunk]:
        """The next step's chunks, decoding sequences first; empty only when there is no work."""
        chunks = self._schedule_decodes()
        budget = self.max_num_batched_tokens - len(chunks)
        for sequence in self.running:
            if sequence.num_uncomputed_tokens > 1 and budget > 0:
                budget -= self._schedule_prefill(sequence, budget, chunks)
        while self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            sequence = self.waiting[0]
            room = min(sequence.num_tokens + self.page_size, sequence.max_num_tokens)
            if self._pages_for(room) > self.pool.num_free:
                break  # strictly first come, first served: nobody overtakes a long prompt
            if self._chunk_end(sequence, budget) == sequence.num_computed_tokens:
                break
            self.waiting.popleft()
            sequence.pages.extend(self.pool.allocate(self._pages_for(sequence.num_tokens)))
            if self.states is not None:
                sequence.state_slot = self.states.allocate()
            sequence.status = SequenceStatus.RUNNING
            sequence.scheduled_at = sequence.scheduled_at or now
            self.running.append(sequence)
            budget -= self._schedule_prefill(sequence, budget, chunks)
        assert chunks or not self.has_work, "work is waiting and nothing was scheduled"
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the pages."""
        chunk.sequence.num_computed_tokens = chunk.end

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence in whatever phase it is and frees its pages. Doing it twice is harmless."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        (self.waiting if sequence.status is SequenceStatus.WAITING else self.running).remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _schedule_decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING or sequence.num_uncomputed_tokens != 1:
                continue
            missing = self._pages_for(sequence.num_tokens) - len(sequence.pages)
            while missing > self.pool.num_free and sequence.status is SequenceStatus.RUNNING:
                self._preempt(self.running[-1])
            if sequence.status is SequenceStatus.RUNNING:
                sequence.pages.extend(self.pool.allocate(missing))
                chunks.append(Chunk(sequence, sequence.num_computed_tokens, sequence.num_tokens))
        return chunks

    def _schedule_prefill(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        start, end = sequence.num_computed_tokens, self._chunk_end(sequence, budget)
        if end > start:
            chunks.append(Chunk(sequence, start, end))
        return end - start

    def _chunk_end(self, sequence: Sequence, budget: int) -> int:
        """Where a chunk of at most ``budget`` tokens ends: the end of the sequence (of its prompt, then of each
        token, where states must be as they were) or a multiple of the page size."""
        start, end = sequence.num_computed_tokens, sequence.num_tokens
        if self.states is not None and end > sequence.num_prompt_tokens:
            end = max(start + 1, sequence.num_prompt_tokens)
        if end - start <= budget:
            return end
        return max(start, (start + budget) // self.page_size * self.page_size)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)  # younger than all that run, older than all that wait
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        if self.states is not None and sequence.state_slot is not None:
            self.states.release(sequence.state_slot)
            sequence.state_slot = None
        del sequence.pages[:]
        sequence.num_computed_tokens = 0

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)
