"""What goes into an engine and what comes out: plain data, which crosses to a worker process as it is.

Nothing here needs torch, so that the process that only talks to a worker never loads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from ..errors import ContextLengthExceeded, HelexaError, InvalidRequest
from ..events import Timings
from ..sampling_params import SamplingParams
from ..text.structured import Constraint
from .sampler import Logprobs


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt to continue, ``params.n`` times.

    Attributes:
        prompt_token_ids: at least one.
        params: with defaults filled in (:meth:`SamplingParams.with_defaults`).
        eos_token_ids: end-of-turn tokens of the model; they end an answer unless ``ignore_eos``, and then too when a grammar is
            complete.
        constraint: what each answer is held to; compiled beside the sampler.
        last_message_start: where in the prompt the last message begins, if it is a conversation: another prompt may well leave this
            one there, so a snapshot of recurrent states is kept before it.
        priority: lower is earlier.
        owner: who asked; owners share the engine evenly.
        max_queue_seconds: how long it may wait for its first seat; then it fails with :class:`Overloaded`. None: for ever.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    last_message_start: int | None = None
    priority: int = 0
    owner: str | None = None
    max_queue_seconds: float | None = None

    def check(self, vocab_size: int, max_model_len: int) -> None:
        """Whether a model with these limits can answer this.

        Raises:
            ContextLengthExceeded: the prompt leaves no room for a single token of answer.
            InvalidRequest: an empty prompt, or a token id outside the vocabulary.
        """
        prompt = self.prompt_token_ids
        if not prompt:
            raise InvalidRequest("prompt", "expected at least one token, got none")
        if len(prompt) >= max_model_len:
            raise ContextLengthExceeded(len(prompt), max_model_len - 1)
        for name, ids in (
            ("prompt", prompt),
            ("stop_token_ids", self.params.stop_token_ids),
            ("logit_bias", tuple(self.params.logit_bias or ())),
        ):
            if ids and max(ids) >= vocab_size:
                raise InvalidRequest(
                    name, f"token id {max(ids)} is outside the vocabulary; expected less than {vocab_size}"
                )


class StepOutput(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What a step did for one answer: one more token, its end, or the failure of its whole request.

    Attributes:
        token_id: the token; None when the request failed.
        logprobs: of the token, when asked for.
        prompt_logprobs: beside the first token, when asked for; entry 0 is None, nothing predicts the first token.
        finish_reason: ``stop`` (an end token, which is ``token_id``) or ``length``; None while the answer goes on.
        stop_token_id: the member of ``stop_token_ids`` that ended the answer; None for the model's own end-of-turn tokens.
        cached_tokens: prompt tokens that this answer did not have to compute.
        timings: up to this token.
        error: why the request failed; its answers are gone.
    """

    request_id: str
    index: int = 0
    token_id: int | None = None
    timings: Timings = Timings(0.0, 0.0, 0.0)
    finish_reason: Literal["stop", "length"] | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    error: HelexaError | None = None


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges of now and counters since the start. A prompt counts when it is complete, once for each answer.

    Attributes:
        kv_pages_used: pages of running sequences; those that only the prefix cache holds are free for all who need them.
        kv_pages_cached: the latter.
        prefix_cache_queries_total, prefix_cache_hits_total: prompt tokens looked up in the prefix cache, and those found.
        snapshots_used, snapshots_total: slots for snapshots of recurrent states.
        max_num_seqs: most that run at once.
        num_waiting_tokens: tokens that those without a seat have to compute, if nothing of them is cached.
        answers_total: answers that came to their end.
        prompt_tokens_per_second, decode_tokens_per_second: measured lately, the latter of all sequences together; 0 before that.
        step_tokens: tokens of the step that is being computed; 0 between steps.
    """

    num_running: int
    num_waiting: int
    kv_pages_used: int
    kv_pages_total: int
    prompt_tokens_total: int
    generation_tokens_total: int
    preemptions_total: int
    steps_total: int
    kv_pages_cached: int = 0
    prefix_cache_queries_total: int = 0
    prefix_cache_hits_total: int = 0
    snapshots_used: int = 0
    snapshots_total: int = 0
    max_num_seqs: int = 0
    num_waiting_tokens: int = 0
    answers_total: int = 0
    prompt_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    step_tokens: int = 0

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV pages in use by running sequences, 0 to 1."""
        return self.kv_pages_used / self.kv_pages_total

    @property
    def queue_seconds(self) -> float | None:
        """How long those that wait now will take: their prompts and answers of the usual length, at the measured rates. None before
        an answer was measured."""
        if not (self.answers_total and self.prompt_tokens_per_second and self.decode_tokens_per_second):
            return None
        answers = self.num_waiting * self.generation_tokens_total / self.answers_total
        return self.num_waiting_tokens / self.prompt_tokens_per_second + answers / self.decode_tokens_per_second
