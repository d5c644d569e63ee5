"""A stand-in for :class:`AsyncEngine` that answers from a script: for tests of what lies above the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import EngineDied
from ..events import ContentDelta, Event, Finished, PromptProcessed, Timings, Usage
from ..generate_request import GenerateRequest
from ..runtime.exchange import EngineStats

#: A step of a script: an event, a pause in seconds, or an exception to raise.
Step = Event | float | BaseException


class ByteTokenizer:
    """One token a byte of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode(errors="replace")


@dataclass(frozen=True, slots=True)
class FakeModelInfo:
    """The figures of ``runtime.load.ModelInfo`` that tests ask for."""

    name: str = "fake"
    architecture: str = "qwen3"
    vocab_size: int = 256
    max_model_len: int = 4096
    weight_bytes: int = 1000
    kv_bytes: int = 100
    kv_dtype: str = "float16"
    state_bytes: int = 0
    snapshot_bytes: int = 0
    reserved_bytes: int = 1100
    capabilities: dict[str, bool] = field(default_factory=lambda: {"chat": True, "tools": True})
    limit: dict[str, int] = field(default_factory=lambda: {"context": 4096, "input": 4095, "output": 4095})


def scripted_answer(text: str, *, prompt: str = "", index: int = 0, pause: float = 0.0) -> list[Step]:
    """The steps of an answer that comes one character at a time, ``pause`` seconds apart."""
    steps: list[Step] = [PromptProcessed(tuple(prompt.encode()))]
    for character in text:
        if pause:
            steps.append(pause)
        steps.append(ContentDelta(index, character, tuple(character.encode())))
    usage = Usage(len(prompt.encode()), len(text.encode()))
    steps.append(Finished(index, "stop", usage, Timings(0.0, 0.01, 0.01)))
    return steps


class FakeEngine:
    """Same interface as :class:`AsyncEngine`.

    Args:
        script: the steps of every answer, or a function of the request that gives them.
        model_info: anything with the fields of :class:`FakeModelInfo`.

    Attributes:
        requests: what came, in order.
        told_to_answer: ids of requests whose thinking was ended from outside.
        aborted: ids of requests whose iterator was closed before its last event.
        num_running: iterators that are open.
        generation_tokens_total: what its statistics say.
    """

    def __init__(
        self, script: Sequence[Step] | Callable[[GenerateRequest], Sequence[Step]], model_info: Any = None
    ) -> None:
        self._script = script
        self.model_info = model_info or FakeModelInfo()
        self.tokenizer = ByteTokenizer()
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.told_to_answer: list[str] = []
        self.num_running = 0
        self.generation_tokens_total = 0
        self.closed = False
        self._dead: asyncio.Queue[EngineDied] = asyncio.Queue()

    async def encode_chat(self, request: GenerateRequest) -> list[int]:
        """The contents of the messages, one token a byte."""
        contents = [message.get("content") or "" for message in request.messages or ()]
        return self.tokenizer.encode("\n".join(contents))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if self.closed:
            raise EngineDied("the engine is closed")
        self.requests.append(request)
        self.num_running += 1
        complete = False
        try:
            for step in self._script(request) if callable(self._script) else self._script:
                if isinstance(step, BaseException):
                    complete = True
                    raise step
                if isinstance(step, (int, float)):
                    await asyncio.sleep(step)
                else:
                    yield step
            complete = True
        finally:
            self.num_running -= 1
            if not complete:
                self.aborted.append(request.request_id)

    def stop_thinking(self, request_id: str) -> bool:
        self.told_to_answer.append(request_id)
        return True

    def stats(self) -> EngineStats:
        return EngineStats(self.num_running, 0, 0, 1, 0, self.generation_tokens_total, 0, 0)

    def die(self, error: EngineDied) -> None:
        """Lets :meth:`until_dead` return; scripts end by themselves."""
        self.closed = True
        self._dead.put_nowait(error)

    async def until_dead(self) -> EngineDied:
        return await self._dead.get()

    async def aclose(self, timeout: float = 10.0) -> None:
        self.closed = True
