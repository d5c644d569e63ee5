"""Who computes what in the next step. Ids only: no tensors, no model names.

Continuous batching: every step holds one token of each decoding sequence, and what the token budget leaves goes to prompts,
oldest first, in chunks that end at the prompt's end or at a multiple of the page size.

Nothing deadlocks: a sequence is admitted when its whole prompt and one further page are available; when a decoding sequence
finds no page, the youngest running one gives its pages back and is computed again later. The oldest therefore always
advances, and alone it always fits, because no sequence may grow beyond the pool.

With a prefix cache a sequence begins after the pages that others have computed, and its own are kept once they are known to be
sound (:meth:`Scheduler.keep`). Cached pages that nobody runs on count as available and are evicted when they are needed.

A model with recurrent states has a slot for every sequence that may run, so only pages are ever short. The last bits of a state
depend on how its tokens were cut into chunks: cutting at multiples of the page size makes that the same for every chunk size, and
after a preemption what was generated token by token is computed token by token again. So of these only prompts are kept, with
snapshots of the states: chunks end at the borders where one is wanted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..cache.page_pool import PagePool
from ..cache.prefix_cache import Node, PrefixCache, extend_keys
from ..cache.state_pool import StatePool
from .sequence import Sequence, SequenceStatus


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


class Scheduler:
    """Waiting and running sequences and their pages.

    Args:
        pool: the pages.
        page_size: tokens a page holds.
        max_num_seqs: most sequences running at once.
        max_num_batched_tokens: most tokens in a step, at least ``page_size + max_num_seqs - 1``.
        states: at least ``max_num_seqs`` slots of recurrent state; None for a model without any.
        prefixes: what is kept of the pages, over the same pool; None keeps nothing.
        snapshot_interval: tokens of prefill from one snapshot to the next, a multiple of the page size.

    Attributes:
        num_prefix_queries, num_prefix_hits: prompt tokens that were looked up, and those found.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
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
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

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
        self.waiting.append(sequence)

    def schedule(self, now: float) -> list[Chunk]:
        """The next step's chunks, decoding sequences first; empty only when there is no work."""
        chunks = self._schedule_decodes()
        budget = self.max_num_batched_tokens - len(chunks)
        for sequence in self.running:
            if sequence.num_uncomputed_tokens > 1 and budget > 0:
                budget -= self._schedule_prefill(sequence, budget, chunks)
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_num_seqs or budget <= 0:
                break
            if self._waits_for_sibling(sequence):
                continue
            taken = self._admit(sequence, budget, chunks, now)
            if not taken:
                break  # strictly first come, first served: nobody overtakes a long prompt
            budget -= taken
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
        (self.waiting if sequence.status is SequenceStatus.WAITING else self.running).remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _admit(self, sequence: Sequence, budget: int, chunks: list[Chunk], now: float) -> int:
        """Lets a waiting sequence run. Returns the tokens of its first chunk; 0 when it has to wait for pages or for budget."""
        node = self._resumes_at(sequence)
        start = node.depth * self.page_size if node is not None else 0
        room = min(sequence.num_tokens + self.page_size, sequence.max_num_tokens)
        available = self.pool.num_available
        if self.prefixes is not None and node is not None:
            available += node.depth - self.prefixes.num_idle(node)
        if self._pages_for(room) > available or self._chunk_end(sequence, start, budget) == start:
            return 0
        self.waiting.remove(sequence)
        resume_from = None
        if self.prefixes is not None and node is not None:
            resume_from = node.snapshot
            sequence.pages.extend(self.prefixes.take(node))
            sequence.place = node
            sequence.num_computed_tokens = start
        sequence.pages.extend(self._allocate(self._pages_for(sequence.num_tokens) - len(sequence.pages)))
        if self.states is not None:
            sequence.state_slot = self.states.allocate()
        sequence.status = SequenceStatus.RUNNING
        if not sequence.scheduled_at:
            sequence.scheduled_at = now
            sequence.num_cached_tokens = start
            if self.prefixes is not None and sequence.reuses_prefix:
                self.num_prefix_queries += sequence.num_prompt_tokens
                self.num_prefix_hits += start
        self.running.append(sequence)
        return self._schedule_prefill(sequence, budget, chunks, resume_from)

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

    def _waits_for_sibling(self, sequence: Sequence) -> bool:
        """Whether another answer to the same prompt is computing it: this one then begins with the pages of that one."""
        return (
            self.prefixes is not None
            and sequence.index > 0
            and sequence.num_prompt_tokens > self.page_size
            and any(
                other.request_id == sequence.request_id and other.num_computed_tokens < other.num_prompt_tokens
                for other in self.running
            )
        )

    def _schedule_decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING or sequence.num_uncomputed_tokens != 1:
                continue
            missing = self._pages_for(sequence.num_tokens) - len(sequence.pages)
            while missing > self.pool.num_available and sequence.status is SequenceStatus.RUNNING:
                self._preempt(self.running[-1])
            if sequence.status is SequenceStatus.RUNNING:
                sequence.pages.extend(self._allocate(missing))
                chunks.append(Chunk(sequence, sequence.num_computed_tokens, sequence.num_tokens))
        return chunks

    def _schedule_prefill(
        self, sequence: Sequence, budget: int, chunks: list[Chunk], resume_from: int | None = None
    ) -> int:
        start, end = sequence.num_computed_tokens, self._chunk_end(sequence, sequence.num_computed_tokens, budget)
        if end > start:
            sequence.snapshot = self._snapshot_slot(sequence, end)
            chunks.append(Chunk(sequence, start, end, resume_from, sequence.snapshot))
        return end - start

    def _chunk_end(self, sequence: Sequence, start: int, budget: int) -> int:
        """Where a chunk of at most ``budget`` tokens ends: the end of the sequence (of its prompt, then of each
        token, where states must be as they were), a border where a snapshot is wanted, or a multiple of the page size."""
        end = sequence.num_tokens
        if self.states is not None and end > sequence.num_prompt_tokens:
            end = max(start + 1, sequence.num_prompt_tokens)
        end = next((border for border in sequence.borders if start < border < end), end)
        if end - start <= budget:
            return end
        return max(start, (start + budget) // self.page_size * self.page_size)

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
        if self.prefixes is not None and sequence.snapshot is not None:
            self.prefixes.drop_snapshot_slot(sequence.snapshot)
            sequence.snapshot = None
        sequence.place = None
        del sequence.pages[:]
        sequence.num_computed_tokens = 0

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)
