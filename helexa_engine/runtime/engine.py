"""The engine behind one :meth:`Engine.step`: token ids in, token ids out. It knows no text."""

from __future__ import annotations

import hashlib
import heapq
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..errors import HelexaError, Overloaded
from .device_faults import fault_of, out_of_memory, release_cached_memory
from .exchange import EngineRequest, EngineStats, StepOutput
from .memory import LOGITS_ROWS
from .model_runner import ModelRunner
from .sampler import (
    DAMAGED,
    Grammar,
    Logits,
    Logprobs,
    NotFinite,
    Sampler,
    SamplingFailed,
    log_probabilities,
    logprobs_of,
)
from .saved_prefixes import SavedPrefixes
from .scheduler import Chunk, Scheduler
from .sequence import Sequence

if TYPE_CHECKING:
    import torch

_MORE_MEMORY = (
    "end what else uses it, or load the model with a smaller memory_fraction, max_num_batched_tokens or max_num_seqs"
)

#: Called with (position, logits [rows, vocab_size]) for consecutive rows of a prompt; the array is valid during the call only.
OnPromptLogits = Callable[[int, Logits], None]


@dataclass(slots=True, eq=False)
class _Answer:
    """A sequence with what is needed to sample it."""

    request: EngineRequest
    sequence: Sequence
    sampler: Sampler
    end_token_ids: frozenset[int]
    scores_prompt: bool
    on_prompt_logits: OnPromptLogits | None = None
    num_scored: int = 0
    prompt_logprobs: list[Logprobs | None] = field(default_factory=lambda: [None])


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread calls everything.

    Args:
        runner: the model with its KV pages.
        scheduler: over the same pages.
        vocab_size: width of the logits.
        max_model_len: longest prompt plus answer in tokens.
        seed: requests that bring none draw from it by their order of arrival; None draws it.
        clock: seconds, monotonic.

    Attributes:
        saved: the file that the prefix cache is kept in, if it is to outlive the process.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        *,
        vocab_size: int,
        max_model_len: int,
        seed: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert max_model_len <= scheduler.pool.num_pages * scheduler.page_size
        self.runner = runner
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.saved: SavedPrefixes | None = None
        self._clock = clock
        self._seed = secrets.randbits(63) if seed is None else seed
        self._requests: dict[str, list[_Answer]] = {}
        self._answers: dict[Sequence, _Answer] = {}
        self._deadlines: list[
            tuple[float, int, str]
        ] = []  # a heap of (time, serial, request) of those that may not wait for ever
        self._num_requests = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished_answers = 0
        self._steps = 0
        self._step_tokens = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check(self, request: EngineRequest) -> None:
        """Raises what :meth:`add_request` would. Reads only constants, so any thread may call it."""
        request.check(self.vocab_size, self.max_model_len)

    def add_request(
        self,
        request: EngineRequest,
        *,
        make_grammar: Callable[[], Grammar] | None = None,
        on_prompt_logits: OnPromptLogits | None = None,
    ) -> None:
        """Queues the request's answers. ``make_grammar`` gives each of them a constraint of its own.

        Raises as :meth:`EngineRequest.check`.
        """
        self.check(request)
        assert request.request_id not in self._requests, f"request {request.request_id} is already running"
        params, prompt = request.params, request.prompt_token_ids
        room = self.max_model_len - len(prompt)
        seed = self._next_seed() if params.seed is None else params.seed
        eos = frozenset() if params.ignore_eos else request.eos_token_ids
        answers = []
        for index in range(params.n):
            sequence = Sequence(
                request_id=request.request_id,
                index=index,
                token_ids=list(prompt),
                num_prompt_tokens=len(prompt),
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                priority=request.priority,
                owner=request.owner,
                queued_at=self._clock(),
            )
            sampler = Sampler(
                params,
                seed=seed,
                index=index,
                prompt_token_ids=prompt,
                end_token_ids=sorted(request.eos_token_ids.union(params.stop_token_ids)),
                grammar=make_grammar() if make_grammar else None,
            )
            scores_prompt = params.prompt_logprobs is not None or on_prompt_logits is not None
            # The prompt is the same for every answer: the first one scores it, and so has to compute it.
            ends = eos.union(params.stop_token_ids)
            answer = _Answer(request, sequence, sampler, ends, scores_prompt and index == 0, on_prompt_logits)
            sequence.reuses_prefix = not answer.scores_prompt
            answers.append(answer)
        self._requests[request.request_id] = answers
        for answer in answers:
            self._answers[answer.sequence] = answer
            self.scheduler.add(answer.sequence, request.last_message_start)
        if request.max_queue_seconds is not None:
            first = answers[0].sequence
            deadline = first.queued_at + request.max_queue_seconds
            heapq.heappush(self._deadlines, (deadline, first.serial, request.request_id))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its answers, in whatever phase it is, and frees its pages. Unknown ids are no error."""
        for answer in list(self._requests.get(request_id, ())):
            if index is None or answer.sequence.index == index:
                self._drop(answer)

    def stop_thinking(self, request_id: str) -> None:
        """Ends the reasoning of a request's answers, which go on with what follows it. Unknown ids are no error."""
        for answer in self._requests.get(request_id, ()):
            stop = getattr(answer.sampler.grammar, "stop", None)
            if stop is not None:
                stop()

    def step(self) -> list[StepOutput]:
        """Computes one batch and samples. One entry for each answer that got a token, ended or failed.

        Raises whatever the model raises: then no further step is possible. Where the device had no memory left, the requests of the
        batch fail and others go on. A failure to *sample* is the request's own.
        """
        started = self._clock()
        chunks = self.scheduler.schedule(started)
        outputs = self._end_overdue(started)
        if not chunks:
            return outputs
        self._step_tokens = sum(chunk.num_tokens for chunk in chunks)
        try:
            self._compute(chunks, started, outputs)
        except Exception as error:
            if fault_of(error) != "out_of_memory":
                raise
            outputs += self._fail_all(chunks, error)
        self._steps += 1
        self._step_tokens = 0
        return outputs

    def _compute(self, chunks: list[Chunk], started: float, outputs: list[StepOutput]) -> None:
        """What :meth:`step` does with the batch that began at ``started``; appends to ``outputs``."""
        hidden = self.runner.forward(chunks)
        sampling: list[tuple[_Answer, int]] = []
        damaged: dict[_Answer, tuple[Chunk, str]] = {}  # what is not finite there
        chunk_of: dict[_Answer, Chunk] = {}
        unasked: list[tuple[_Answer, Chunk, int]] = []  # whether they are finite waits for the device: last

        def keep_if_finite(answer: _Answer, chunk: Chunk, row: int) -> bool:
            if self.runner.is_finite(hidden, row):
                self.scheduler.keep(chunk.sequence)
                return True
            damaged[answer] = chunk, f"the hidden state of prompt token {chunk.end - 1} is"
            return False

        first = 0
        for chunk in chunks:
            rows = slice(first, first + chunk.num_tokens)
            first = rows.stop
            answer = self._answers.get(chunk.sequence)
            if answer is None:  # its request failed just now
                continue
            self.scheduler.computed(chunk)
            chunk_of[answer] = chunk
            if chunk.samples:
                sampling.append((answer, first - 1))
            elif not answer.scores_prompt:
                unasked.append((answer, chunk, first - 1))
            elif not keep_if_finite(answer, chunk, first - 1):
                continue
            if answer.scores_prompt:
                try:
                    self._score_prompt(answer, chunk, hidden[rows])
                except NotFinite as error:
                    damaged[answer] = chunk, error.what
                except Exception as error:
                    outputs.append(self._fail(answer, error))
        if sampling:
            outcomes = self.runner.sample(
                hidden, [row for _, row in sampling], [answer.sampler for answer, _ in sampling]
            )
            for (answer, _), outcome in zip(sampling, outcomes, strict=True):
                if answer.sequence not in self._answers or answer in damaged:  # its request may have failed just now
                    continue
                if isinstance(outcome, NotFinite):
                    damaged[answer] = chunk_of[answer], outcome.what
                elif isinstance(outcome, Exception):
                    outputs.append(self._fail(answer, outcome))
                else:
                    outputs.append(self._sampled(answer, *outcome))
        for answer, chunk, row in unasked:
            if answer.sequence in self._answers:
                keep_if_finite(answer, chunk, row)
        # Last, for what is computed again writes over this step's rows.
        for answer, (chunk, what) in damaged.items():
            if answer.sequence in self._answers:
                place = self.runner.first_not_finite(chunk)
                request_id = answer.request.request_id
                more = f"first in the output of {place}, for request {request_id}; {DAMAGED}"
                outputs.append(self._fail(answer, NotFinite(what, more)))
        num_decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
        self.scheduler.pace.observe(first - num_decodes, num_decodes, self._clock() - started)

    def stats(self) -> EngineStats:
        """Reads counters only, so any thread may call it."""
        prefixes = self.scheduler.prefixes
        snapshots = None if prefixes is None else prefixes.snapshots
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            kv_pages_used=self.scheduler.pool.num_used,
            kv_pages_total=self.scheduler.pool.num_pages,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            preemptions_total=self.scheduler.num_preemptions,
            steps_total=self._steps,
            kv_pages_cached=self.scheduler.pool.num_idle,
            prefix_cache_queries_total=self.scheduler.num_prefix_queries,
            prefix_cache_hits_total=self.scheduler.num_prefix_hits,
            snapshots_used=0 if snapshots is None else snapshots.num_used,
            snapshots_total=0 if snapshots is None else snapshots.num_slots,
            max_num_seqs=self.scheduler.max_num_seqs,
            num_waiting_tokens=self.scheduler.num_waiting_tokens,
            answers_total=self._finished_answers,
            prompt_tokens_per_second=self.scheduler.pace.prompt_tokens_per_second,
            decode_tokens_per_second=self.scheduler.pace.decode_tokens_per_second,
            step_tokens=self._step_tokens,
        )

    def seconds_to_save(self) -> float | None:
        """How long to wait for work before :meth:`save` is called; None where there is nothing to save."""
        return None if self.saved is None else self.saved.seconds_to_save()

    def save(self, is_wanted: Callable[[], bool]) -> None:
        """Saves the prefix cache, or gives up as soon as the engine ``is_wanted`` for something else."""
        if self.saved is not None:
            self.saved.save(is_wanted)

    def close(self, *, in_order: bool = True) -> None:
        """Frees the model and the memory of the pages; no step may follow. The prefix cache is saved if this comes ``in_order``, not
        after a fault."""
        if self.saved is not None:
            if in_order:
                self.saved.save_at_close()
            self.saved.close()
            self.saved = None
        del self.runner

    def _sampled(self, answer: _Answer, token_id: int, logprobs: Logprobs | None) -> StepOutput:
        """The answer goes on by a token, or ends with it."""
        sequence, params = answer.sequence, answer.request.params
        self.scheduler.keep(sequence)  # its logits are finite
        is_first = sequence.num_output_tokens == 0
        reports_prompt = params.prompt_logprobs is not None and answer.scores_prompt
        if is_first:
            self._prompt_tokens += sequence.num_prompt_tokens
        sequence.append(token_id, self._clock())
        self._generation_tokens += 1
        finish_reason: Literal["stop", "length"] | None = None
        # A grammar that is finished allows end tokens alone: to ignore them would repeat them to the end of the context.
        complete = token_id in answer.request.eos_token_ids and answer.sampler.grammar_is_finished
        if token_id in answer.end_token_ids or complete:
            finish_reason = "stop"
        elif sequence.num_output_tokens >= sequence.max_tokens:
            finish_reason = "length"
        if finish_reason:
            self._finished_answers += 1
            self._drop(answer)
        return StepOutput(
            request_id=sequence.request_id,
            index=sequence.index,
            token_id=token_id,
            logprobs=logprobs,
            prompt_logprobs=tuple(answer.prompt_logprobs) if is_first and reports_prompt else None,
            finish_reason=finish_reason,
            stop_token_id=token_id if finish_reason == "stop" and token_id in params.stop_token_ids else None,
            cached_tokens=sequence.num_cached_tokens,
            timings=sequence.timings(),
        )

    def _end_overdue(self, now: float) -> list[StepOutput]:
        """Fails the requests that got no seat in the time they may wait."""
        outputs: list[StepOutput] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, serial, request_id = heapq.heappop(self._deadlines)
            first = next(iter(self._requests.get(request_id, ())), None)
            if first is None or first.sequence.serial != serial or first.sequence.scheduled_at:
                continue  # it has ended, or its first answer has had a seat
            stats, limit = self.stats(), first.request.max_queue_seconds
            message = (
                f"no place came free within {limit:g} seconds (max_queue_seconds): {stats.num_running} answers run and "
                f"{stats.num_waiting} wait; try again later"
            )
            wait = max(1.0, stats.queue_seconds or limit or 1.0)
            outputs.append(self._fail(first, Overloaded(message, wait, reason="max_queue_seconds")))
        return outputs

    def _score_prompt(self, answer: _Answer, chunk: Chunk, hidden: torch.Tensor) -> None:
        """Logits at the chunk's prompt positions, and log probabilities of the prompt tokens that they predict."""
        request, sequence = answer.request, chunk.sequence
        # After a preemption the chunk may begin before what is scored already.
        start, end = max(chunk.start, answer.num_scored), min(chunk.end, sequence.num_prompt_tokens)
        for block in range(start, end, LOGITS_ROWS):
            rows = range(block, min(block + LOGITS_ROWS, end))
            logits = self.runner.logits(hidden, [row - chunk.start for row in rows])
            if answer.on_prompt_logits is not None:
                answer.on_prompt_logits(block, logits)
            if request.params.prompt_logprobs is not None:
                for row, values in zip(rows, logits, strict=True):
                    if row + 1 < sequence.num_prompt_tokens:
                        token_id = sequence.token_ids[row + 1]
                        scored = logprobs_of(log_probabilities(values), token_id, request.params.prompt_logprobs)
                        answer.prompt_logprobs.append(scored)
            answer.num_scored = rows.stop

    def _fail_all(self, chunks: list[Chunk], error: Exception) -> list[StepOutput]:
        """Every request of a batch ends, for want of the device's memory; what is in their pages and states is not known."""
        doing = f"in a step of {self._step_tokens} tokens for {len(chunks)} sequences"
        failure = out_of_memory(error, doing, _MORE_MEMORY)
        failed = []
        for chunk in chunks:
            answer = self._answers.get(chunk.sequence)
            if answer is not None:  # its request has not failed with another of its answers
                failed.append(self._fail(answer, failure))
        release_cached_memory()
        return failed

    def _fail(self, answer: _Answer, error: Exception) -> StepOutput:
        """The request of ``answer`` ends; the others go on. Raises ``error`` where the device is lost."""
        fault = fault_of(error)
        if fault == "device_lost":
            raise error
        if fault == "out_of_memory":
            error = out_of_memory(error, "for one request", _MORE_MEMORY)
        if not isinstance(error, HelexaError):
            failure = SamplingFailed(f"sampling failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            error = failure
        self.abort(answer.sequence.request_id)
        return StepOutput(answer.sequence.request_id, answer.sequence.index, error=error)

    def _drop(self, answer: _Answer) -> None:
        sequence = answer.sequence
        self.scheduler.remove(sequence)
        self._answers.pop(sequence, None)
        answers = self._requests.get(sequence.request_id, [])
        if answer in answers:
            answers.remove(answer)
        if not answers:
            self._requests.pop(sequence.request_id, None)

    def _next_seed(self) -> int:
        self._num_requests += 1
        text = f"{self._seed}/{self._num_requests}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
