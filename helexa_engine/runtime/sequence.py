"""One answer being generated: its tokens, its pages, its clock."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field

from ..cache.prefix_cache import Node
from ..events import Timings


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Answer ``index`` of a request: the prompt and the tokens generated so far.

    Attributes:
        token_ids: prompt, then output.
        num_prompt_tokens: how many of them are the prompt.
        max_tokens: most output tokens, already cut to the context.
        priority: lower is earlier.
        owner: who asked; sequences of several owners share the engine evenly.
        serial: its place in the order of arrival, given by the scheduler.
        num_preemptions: how often it had to give its pages back.
        num_computed_tokens: tokens whose keys and values are in ``pages``; 0 again after a preemption.
        num_cached_tokens: prompt tokens it did not have to compute, because another sequence had.
        pages: KV pages in order, int32.
        state_slot: where its recurrent states are while it runs; None in a model without any, and while it waits.
        reuses_prefix: whether it may begin with what others computed; not when every logit of its prompt is asked for.
        borders: multiples of the page size in its prompt where a snapshot of its states is wanted, ascending.
        place: the end of what the prefix cache keeps of it, None as long as it holds no pages.
        page_keys: its pages as the prefix cache compares them.
        snapshot: slot that the chunk under way writes its states to.
        queued_at, scheduled_at, first_token_at, last_token_at: seconds of a monotonic clock; 0 until it happened.
    """

    request_id: str
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    owner: str | None = None
    serial: int = -1
    num_preemptions: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))
    state_slot: int | None = None
    num_cached_tokens: int = 0
    reuses_prefix: bool = True
    borders: tuple[int, ...] = ()
    place: Node | None = None
    page_keys: list[bytes] = field(default_factory=list)
    snapshot: int | None = None
    queued_at: float = 0.0
    scheduled_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def max_num_tokens(self) -> int:
        """Length this sequence may grow to."""
        return self.num_prompt_tokens + self.max_tokens

    def append(self, token_id: int, now: float) -> None:
        if not self.first_token_at:
            self.first_token_at = now
        self.last_token_at = now
        self.token_ids.append(token_id)

    def timings(self) -> Timings:
        """Phases that did not begin count 0 seconds."""
        scheduled = self.scheduled_at or self.queued_at
        first = self.first_token_at or scheduled
        return Timings(
            queue_seconds=scheduled - self.queued_at,
            prefill_seconds=first - scheduled,
            decode_seconds=max(0.0, self.last_token_at - first),
        )
