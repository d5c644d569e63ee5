"""The offline library: :class:`LLM`. Start reading here; a request goes llm > runtime.load > runtime.engine_thread > runtime.engine."""

from __future__ import annotations

import dataclasses
import math
import queue
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from .config import EngineConfig
from .errors import EngineDied, InvalidRequest
from .events import Collector, Event, Failed, Finished, GenerationResult
from .generate_request import GenerateRequest, new_request_id
from .sampling_params import SamplingParams, StructuredOutput

if TYPE_CHECKING:
    import torch

    from .runtime.exchange import EngineStats, StepOutput
    from .runtime.load import LoadedModel
    from .runtime.model_info import ModelInfo, Progress
    from .text.tokenizer import Tokenizer

#: A chat turn in OpenAI's shape.
Message = Mapping[str, Any]


class LLM:
    """A loaded model. A context manager; :meth:`close` frees everything.

    >>> with LLM("demo") as llm:
    ...     print(llm.chat([{"role": "user", "content": "What is helexa?"}]).text)

    Args:
        model: a ``.gguf`` file (the first part of a split one too), a HuggingFace folder (``config.json`` and safetensors), a hub
            id ``org/name[@revision][:quant-or-file-glob]``, or ``demo`` for the small model that ships with helexa. A hub id is
            downloaded unless it is complete in the hub's cache.
        tensor_parallel_size: 1; more is not built yet.
        progress: called while loading with (stage, share done from 0 to 1).

    The other arguments are the fields of :class:`EngineConfig` and documented there.

    Raises:
        ModelNotFound: no such file, folder, repository or quant.
        DownloadFailed: the hub cannot be reached, refuses, or the disk is full.
        UnsupportedCheckpoint: the file is malformed or of a kind helexa cannot read.
        ModelDoesNotFit: weights and the context do not fit the memory; raised before anything is loaded.
        InvalidRequest: a bad argument, named.
        BackendUnavailable: the device that was asked for cannot be used; the message says why.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        quant: str | None = None,
        imatrix: str | None = None,
        quant_cache: bool = True,
        quant_cache_limit: str = "100GiB",
        kv_dtype: Literal["auto", "float32", "float16", "bfloat16", "q8_0"] = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 512,
        cuda_graphs: bool = True,
        max_step_seconds: float = 0.5,
        memory_fraction: float = 0.9,
        prefix_cache: bool = True,
        state_snapshots: int = 32,
        snapshot_interval: int = 1024,
        prefix_cache_folder: str | None = None,
        prefix_cache_limit: str = "4GiB",
        tensor_parallel_size: int = 1,
        seed: int | None = None,
        mmap_experts: bool = False,
        num_threads: int | None = None,
        pin_threads: bool = False,
        offline: bool = False,
        progress: Progress | None = None,
    ) -> None:
        given = locals()  # the signature is the one list; a test holds it to EngineConfig's fields
        if tensor_parallel_size != 1:
            raise InvalidRequest("tensor_parallel_size", f"expected 1 on this device, got {tensor_parallel_size!r}")
        config = EngineConfig(**{field.name: given[field.name] for field in dataclasses.fields(EngineConfig)})
        from .runtime.load import load_model  # brings torch

        self._loaded: LoadedModel = load_model(model, config, progress)

    @classmethod
    def of(cls, loaded: LoadedModel) -> LLM:
        """Around a model that is loaded already."""
        llm = cls.__new__(cls)
        llm._loaded = loaded
        return llm

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def model_info(self) -> ModelInfo:
        return self._loaded.info

    @property
    def vocab_size(self) -> int:
        """Width of the logits; may exceed the tokenizer's vocabulary."""
        return self._loaded.info.vocab_size

    def stats(self) -> EngineStats:
        return self._loaded.thread.stats()

    @overload
    def generate(
        self,
        prompts: str | list[int],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]] | list[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompts: str | list[int] | list[str] | list[list[int]] | list[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """Continues prompts, computed together.

        Args:
            prompts: one prompt, as text (special tokens in it stay text) or as token ids; or a list of prompts.
            sampling_params: for all prompts, or a list with one for each.
            use_tqdm: show a progress bar on stderr; None: for a list, on a terminal.

        Returns:
            The result of one prompt, or a list of results in the order of the prompts.

        Raises:
            HelexaError: of the first request that is refused or fails; the others are aborted.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        several: list[Any] = [prompts] if single else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(several)
        elif single or len(sampling_params) != len(several):
            raise InvalidRequest(
                "sampling_params", f"expected one or {len(several)}, one for each prompt; got {len(sampling_params)}"
            )
        else:
            params = list(sampling_params)
        requests = [GenerateRequest(prompt=p, sampling_params=s) for p, s in zip(several, params, strict=True)]
        bar = use_tqdm if use_tqdm is not None else not single and sys.stderr.isatty()
        results = self._run(requests, bar)
        return results[0] if single else results

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        response_format: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool | None = None,
    ) -> GenerationResult: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        response_format: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[GenerationResult]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        response_format: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """The assistant's next turn of one conversation, or of each in a list.

        Args:
            messages: turns with ``role`` and ``content`` in OpenAI's shape, rendered by the model's chat template.
            tools, tool_choice: see :class:`GenerateRequest`.
            response_format: OpenAI's ``{"type": "json_object"}`` or ``{"type": "json_schema", "json_schema": {"schema": ...}}``.
            chat_template_kwargs: variables for the template, such as ``enable_thinking``.

        Raises:
            TemplateRenderFailed: the template refused the messages.
            HelexaError: as :meth:`generate`.
        """
        several: list[Any] = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        single = not messages or isinstance(messages[0], Mapping)
        requests = [
            _request(turns, None, sampling_params, tools, tool_choice, response_format, chat_template_kwargs)
            for turns in several
        ]
        results = self._run(requests, use_tqdm if use_tqdm is not None else not single and sys.stderr.isatty())
        return results[0] if single else results

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        response_format: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Event]:
        """The events of one request as they come (see :mod:`helexa_engine.events`): of a prompt, or of a conversation.

        Closing the iterator, or leaving the loop over it, aborts the request. A failure is raised, never yielded.

        Raises:
            HelexaError: when the iteration begins, if the request is refused; later, if it fails.
        """
        request = _request(messages, prompt, sampling_params, tools, tool_choice, response_format, chat_template_kwargs)
        return self.stream_request(request)

    def stream_request(self, request: GenerateRequest) -> Iterator[Event]:
        """The events of one request as they come; as :meth:`stream`."""
        outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        engine_request, events = self._loaded.prepare(request)
        self._loaded.submit(engine_request, outputs.put)
        try:
            while not events.finished:
                for event in events.push(outputs.get()):
                    if isinstance(event, Failed):
                        raise event.error
                    yield event
        finally:
            self._loaded.abort(request.request_id)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """What the model predicts at each position of ``token_ids``, for people who compare.

        Returns:
            [T, vocab_size] float32.

        Raises:
            ContextLengthExceeded, InvalidRequest.
        """
        import torch

        logits = torch.full((len(token_ids), self.vocab_size), math.nan)

        def collect(position: int, rows: Any) -> None:
            logits[position : position + len(rows)] = torch.from_numpy(rows)

        params = SamplingParams(max_tokens=1, temperature=0.0)
        request = GenerateRequest(prompt=list(token_ids), sampling_params=params)
        outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        engine_request, events = self._loaded.prepare(request)
        self._loaded.submit(engine_request, outputs.put, on_prompt_logits=collect)
        try:
            while not events.finished:
                for event in events.push(outputs.get()):
                    if isinstance(event, Failed):
                        raise event.error
        finally:
            self._loaded.abort(request.request_id)
        return logits

    def perplexity(self, text: str) -> float:
        """exp of the mean negative log probability of the tokens of ``text``, each given those before it.

        A text longer than the context is cut into windows of that length, without overlap; the first token of a window is not
        scored.

        Raises:
            InvalidRequest: fewer than two tokens.
        """
        token_ids = self.tokenizer.encode(text)
        if len(token_ids) < 2:
            raise InvalidRequest("text", f"expected at least two tokens, got {len(token_ids)}")
        window = self.model_info.max_model_len - 1
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        windows = [token_ids[i : i + window] for i in range(0, len(token_ids), window)]
        results = self.generate([w for w in windows if len(w) > 1], params, use_tqdm=False)
        scores = [p.logprob for r in results for p in r.prompt_logprobs or [] if p.logprob is not None]
        return math.exp(-math.fsum(scores) / len(scores))

    def close(self) -> None:
        """Ends what runs and frees the model. Doing it twice is harmless.

        Raises:
            EngineDied: the step under way did not end within a minute.
        """
        if not self._loaded.close(timeout=60.0):
            raise EngineDied("the engine did not stop within 60 seconds")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, requests: Sequence[GenerateRequest], bar: bool) -> list[GenerationResult]:
        """Submits all requests at once and collects their events."""
        outputs: queue.SimpleQueue[tuple[int, StepOutput]] = queue.SimpleQueue()
        collectors = [Collector(r.sampling_params.n, r.sampling_params.logprobs is not None) for r in requests]
        prepared = [self._loaded.prepare(request) for request in requests]
        unfinished = sum(request.sampling_params.n for request in requests)
        with ExitStack() as stack:
            advance = stack.enter_context(_progress_bar(unfinished)) if bar else lambda: None
            for i, (engine_request, _) in enumerate(prepared):
                self._loaded.submit(engine_request, _tagged(outputs, i))
                stack.callback(self._loaded.abort, engine_request.request_id)
            while unfinished:
                i, output = outputs.get()
                for event in prepared[i][1].push(output):
                    collectors[i].push(event)
                    if isinstance(event, Finished):
                        unfinished -= 1
                        advance()
        return [collector.result() for collector in collectors]


def _tagged(outputs: queue.SimpleQueue[tuple[int, StepOutput]], index: int) -> Any:
    return lambda output: outputs.put((index, output))


@contextmanager
def _progress_bar(total: int) -> Iterator[Any]:
    """Yields a function to call when an answer is complete."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda: progress.advance(task)


def _request(
    messages: Sequence[Message] | None,
    prompt: str | Sequence[int] | None,
    sampling_params: SamplingParams | None,
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any],
    response_format: Mapping[str, Any] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> GenerateRequest:
    params = sampling_params or SamplingParams()
    structured = StructuredOutput.of_response_format(response_format)
    if structured is not None:
        if params.structured is not None:
            raise InvalidRequest("response_format", "expected either this or sampling_params.structured, got both")
        params = dataclasses.replace(params, structured=structured)
    return GenerateRequest(
        prompt=prompt,
        messages=messages,
        tools=tools,
        tool_choice=tool_choice,
        chat_template_kwargs=chat_template_kwargs or {},
        sampling_params=params,
        request_id=new_request_id(),
    )
