"""The neutral question: every wire format and the Python API build a :class:`GenerateRequest`, and nothing else goes in."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidRequest
from .sampling_params import SamplingParams

#: Priorities lie in minus this to this: what a client may send fits any integer it crosses.
MAX_PRIORITY = 2**31 - 1


def new_request_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request for text, in words or in token ids. Exactly one of ``prompt`` and ``messages`` is given.

    Attributes:
        prompt: text (encoded as it is, special tokens in it stay text) or token ids.
        messages: chat turns, each a mapping with ``role`` and ``content`` (OpenAI's shape), rendered by the model's template.
        tools: function tools in OpenAI's shape, ``{"type": "function", "function": {...}}``.
        tool_choice: ``"none"``, ``"auto"``, ``"required"`` or the name of one function as ``{"name": ...}``.
        parallel_tool_calls: whether a forced call may be followed by more of them.
        chat_template_kwargs: extra template variables, such as ``enable_thinking``.
        add_generation_prompt: open the assistant's turn after the messages.
        echo: repeat the prompt's text ahead of the answer (completions wire).
        suffix: what follows the answer, which is to fill the middle between a ``prompt`` in words and this; only for models that know how.
        sampling_params: unset fields take the model's defaults.
        request_id: echoed in events and logs.
        priority: lower is earlier; the order among requests that wait, and who gives way when memory is short.
        owner: who asks; requests of several owners share the engine evenly.
        max_queue_seconds: how long the request may wait for its turn; then it fails with :class:`Overloaded`. None: for ever.
    """

    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    echo: bool = False
    suffix: str | None = None
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = field(default_factory=new_request_id)
    priority: int = 0
    owner: str | None = None
    max_queue_seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("prompt", "expected exactly one of prompt and messages")
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise InvalidRequest("suffix", "expected a prompt in words beside it, got token ids or messages")
        if self.messages is not None and not self.messages:
            raise InvalidRequest("messages", "expected at least one message, got none")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int) or abs(self.priority) > MAX_PRIORITY:
            raise InvalidRequest(
                "priority", f"expected an integer in [{-MAX_PRIORITY}, {MAX_PRIORITY}], got {self.priority!r:.80}"
            )
        if self.prompt is not None and not isinstance(self.prompt, str):
            for i, token_id in enumerate(self.prompt):
                if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                    raise InvalidRequest(f"prompt[{i}]", f"expected a token id >= 0, got {token_id!r:.80}")
