"""One question with its answer, and what counts as right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One question with its answer.

    Attributes:
        skill: a key of :data:`.conversations.SKILLS`.
        messages: the prompt, in OpenAI's shape; it ends with a user or a tool message.
        answer: the assistant message that should follow: ``content``, and ``reasoning_content`` or ``tool_calls`` where there are any.
        tools: tools in OpenAI's shape, or none.
        chat_template_kwargs: template variables, ``enable_thinking`` where the answer starts with a think block.
        accepted: other answers in words that are as good as the one given.
    """

    skill: str
    messages: list[Message]
    answer: Message
    tools: list[dict[str, Any]] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()

    def check(
        self, answer_text: str, tool_calls: Sequence[tuple[str, str | Mapping[str, Any]]] = (), reasoning: str = ""
    ) -> bool:
        """Whether an answer is right.

        Words must be one of the accepted sentences, JSON must equal the expected value, a tool call needs the right name and
        arguments (given as JSON text or decoded). There must be reasoning exactly when thinking is enabled.
        """
        if bool(reasoning.strip()) != bool(self.chat_template_kwargs.get("enable_thinking")):
            return False
        try:
            calls = [(name, json.loads(a) if isinstance(a, str) else dict(a)) for name, a in tool_calls]
            if calls != [
                (c["function"]["name"], c["function"]["arguments"]) for c in self.answer.get("tool_calls", ())
            ]:
                return False
            text, expected = answer_text.strip(), str(self.answer["content"])
            if expected.startswith("{"):
                return bool(json.loads(text) == json.loads(expected))
        except ValueError:
            return False
        return text == expected or text in self.accepted


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str = "") -> Message:
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})
