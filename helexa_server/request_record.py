"""What the log and the metrics say about one request when it has ended, however it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from helexa_engine.errors import HelexaError
from helexa_engine.events import Event, Failed, Finished, PromptProcessed

from .logs import log_fields
from .metrics import ModelMetrics

log = logging.getLogger("helexa_server.requests")


@dataclass
class RequestRecord:
    """Watches the events of one request; :meth:`close` writes its one log line and counts it. ``spend`` is told of its tokens."""

    path: str
    model: str
    request_id: str
    metrics: ModelMetrics
    client_id: str | None = None
    spend: Callable[[int], None] = lambda tokens: None
    started: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasons: list[str] = field(default_factory=list)
    first_token_seconds: float | None = None
    client_gone: bool = False
    error: HelexaError | None = None
    _last_token: dict[tuple[int, int], float] = field(default_factory=dict)  # by prompt and answer

    def push(self, event: Event, prompt_index: int = 0) -> None:
        """Takes in the next event of the answer to prompt ``prompt_index``."""
        if isinstance(event, PromptProcessed):
            self.prompt_tokens += len(event.prompt_token_ids)
            self.spend(len(event.prompt_token_ids))
            self.cached_tokens += event.cached_tokens
            self.metrics.prompt_tokens.observe(len(event.prompt_token_ids))
        elif not isinstance(event, Failed):
            if event.token_ids:
                self._tokens(len(event.token_ids), (prompt_index, event.index))
            if isinstance(event, Finished):
                self.reasons.append(event.finish_reason)
                self.metrics.answered(event.usage.completion_tokens, event.timings)

    def _tokens(self, count: int, answer: tuple[int, int]) -> None:
        now = time.monotonic()
        self.completion_tokens += count
        self.spend(count)
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self.started
            self.metrics.time_to_first_token.observe(self.first_token_seconds)
        if answer in self._last_token:
            for _ in range(count):  # tokens that came together shared the interval
                self.metrics.inter_token_latency.observe((now - self._last_token[answer]) / count)
        self._last_token[answer] = now

    def close(self) -> None:
        """Writes the log line and counts the request; to be called once, when it has ended."""
        seconds = time.monotonic() - self.started
        if self.error is not None:
            self.metrics.failed[self.error.code] += 1
        else:
            self.metrics.request_latency.observe(seconds)
            self.metrics.finished.update(self.reasons or ["abort"])
        fields: dict[str, Any] = {"id": self.request_id}
        if self.client_id is not None:
            fields["client_id"] = self.client_id
        fields |= {
            "model": self.model,
            "prompt": self.prompt_tokens,
            "cached": self.cached_tokens,
            "completion": self.completion_tokens,
            "reason": self.error.code if self.error else ",".join(self.reasons) or "abort",
            "ttft": self.first_token_seconds,
            "seconds": seconds,
            "client": "gone" if self.client_gone else "here",
        }
        if self.error is not None:
            fields["error"] = self.error.message
        log_fields(log, self.path, fields)
