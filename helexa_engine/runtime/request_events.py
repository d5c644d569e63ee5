"""From the engine's steps to the events of one request: the seam between token ids and text.

It runs beside whoever reads the events, never in the engine's step loop: :class:`LLM` in the caller's thread, :class:`AsyncEngine` in
the reader's event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..errors import HelexaError
from ..events import Event, Failed, Finished, PromptProcessed, TokenLogprob
from ..generate_request import GenerateRequest
from ..text.request_processor import OutputProcessor, PreparedRequest, RequestProcessor
from .exchange import EngineRequest, StepOutput
from .sampler import Logprobs

log = logging.getLogger(__name__)


class RequestEvents:
    """Feeds each answer's tokens to its :class:`OutputProcessor`, with :class:`PromptProcessed` ahead of the first.

    Args:
        abort: tells the engine that the answer of this index is complete, or that all are (None): its text ended it.

    Attributes:
        finished: every answer has ended, or the request failed.
    """

    def __init__(
        self, processor: RequestProcessor, prepared: PreparedRequest, abort: Callable[[int | None], None]
    ) -> None:
        self._processor = processor
        self._prepared = prepared
        self._abort = abort
        self._outputs: dict[int, OutputProcessor] = {}
        self._unfinished = set(range(prepared.params.n))

    @property
    def finished(self) -> bool:
        return not self._unfinished

    def push(self, output: StepOutput) -> list[Event]:
        """Events of one step of one answer. None for what the engine computed before it heard of the end."""
        if output.error is not None:
            self._unfinished.clear()
            return [Failed(output.error)]
        if output.index not in self._unfinished:
            return []
        try:
            events = self._events(output)
        except Exception as error:  # a parser's fault
            log.error("a request failed", exc_info=error)
            self._unfinished.clear()
            self._abort(None)
            failure = HelexaError(f"the request failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return [Failed(failure)]
        if any(isinstance(event, Finished) for event in events):
            self._unfinished.discard(output.index)
            if output.finish_reason is None:
                self._abort(output.index)
        return events

    def _events(self, output: StepOutput) -> list[Event]:
        assert output.token_id is not None
        events: list[Event] = [] if self._outputs else [self._prompt_processed(output)]
        answer = self._outputs.get(output.index)
        if answer is None:
            answer = self._outputs[output.index] = self._prepared.make_output(output.index)
        events += answer.push(
            [output.token_id],
            [self._with_text(output.logprobs)] if output.logprobs is not None else [],
            output.finish_reason,
            stop_token_id=output.stop_token_id,
            cached_tokens=output.cached_tokens,
            timings=output.timings,
        )
        return events

    def _prompt_processed(self, output: StepOutput) -> PromptProcessed:
        token_ids = self._prepared.prompt_token_ids
        scores: tuple[TokenLogprob, ...] | None = None
        if output.prompt_logprobs is not None:
            first = self._processor.token_logprob(token_ids[0], None)
            scores = (first, *(self._with_text(entry) for entry in output.prompt_logprobs if entry is not None))
        return PromptProcessed(token_ids, output.cached_tokens, scores, self._prepared.prompt_text)

    def _with_text(self, entry: Logprobs) -> TokenLogprob:
        return self._processor.token_logprob(entry.token_id, entry.logprob, entry.top)


def engine_request(request: GenerateRequest, prepared: PreparedRequest) -> EngineRequest:
    """What the engine needs of a prepared request."""
    return EngineRequest(
        request.request_id,
        prepared.prompt_token_ids,
        prepared.params,
        prepared.eos_token_ids,
        prepared.constraint,
        last_message_start=prepared.last_message_start,
        priority=request.priority,
        owner=request.owner,
        max_queue_seconds=request.max_queue_seconds,
    )
