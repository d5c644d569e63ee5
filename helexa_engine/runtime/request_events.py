"""From the engine's steps to the events of one request: the seam between token ids and text."""

from __future__ import annotations

from ..events import Event, PromptProcessed, TokenLogprob
from ..generate_request import GenerateRequest
from ..text.request_processor import OutputProcessor, PreparedRequest, RequestProcessor
from .engine import EngineRequest, StepOutput
from .sampler import Logprobs


class RequestEvents:
    """Feeds each answer's tokens to its :class:`OutputProcessor`, with :class:`PromptProcessed` ahead of the first."""

    def __init__(self, processor: RequestProcessor, prepared: PreparedRequest) -> None:
        self._processor = processor
        self._prepared = prepared
        self._outputs: dict[int, OutputProcessor] = {}

    def push(self, output: StepOutput) -> list[Event]:
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
        prepared.make_grammar,
        last_message_start=prepared.last_message_start,
        priority=request.priority,
        owner=request.owner,
        max_queue_seconds=request.max_queue_seconds,
    )
