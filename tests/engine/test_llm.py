"""The public Python interface over tiny checkpoints: answers, streams, comparisons, and every bad input."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import shutil
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

from helexa_engine import LLM, SamplingParams
from helexa_engine.config import EngineConfig
from helexa_engine.errors import (
    ContextLengthExceeded,
    EngineDied,
    HelexaError,
    InvalidRequest,
    ModelDoesNotFit,
    ModelNotFound,
    UnsupportedCheckpoint,
)
from helexa_engine.events import ContentDelta, Finished, PromptProcessed, collect
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.runtime import load
from helexa_engine.runtime.sampler import SamplingFailed
from helexa_engine.testing.checkpoints import write_qwen3_folder

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)
TEXT = "The quick brown fox jumps over the lazy dog."
HELLO = [{"role": "user", "content": "Hello fox"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, max_model_len=512) as model:
        yield model
        assert model.stats().kv_pages_used == 0, "a test left pages behind"


def test_its_settings_are_those_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """A knob is a field of EngineConfig; LLM spells it out only so that editors, type checkers and help() know it."""
    own = {"model", "progress", "tensor_parallel_size"}
    signature = inspect.signature(LLM.__init__).parameters
    spelled = {name: (p.annotation, p.default) for name, p in signature.items() if name not in own | {"self"}}
    assert spelled == {f.name: (f.type, f.default) for f in dataclasses.fields(EngineConfig)}
    assert all(signature[name].kind is inspect.Parameter.KEYWORD_ONLY for name in spelled)

    loaded: list[Any] = []
    monkeypatch.setattr(load, "load_model", lambda *arguments: loaded.append(arguments))
    settings = {name: True if default is False else default for name, (_, default) in spelled.items()}
    settings |= {
        "device": "cpu",
        "dtype": "float16",
        "quant": "Q4_0",
        "imatrix": "i.gguf",
        "quant_cache": False,
        "quant_cache_limit": "1GiB",
    }
    settings |= {"kv_dtype": "float32", "max_model_len": 7, "max_num_seqs": 3, "max_num_batched_tokens": 99}
    settings |= {"max_step_seconds": 0.25, "memory_fraction": 0.5, "seed": 11, "num_threads": 2}
    settings |= {"prefix_cache": False, "prefix_cache_folder": "prefixes", "prefix_cache_limit": "1GiB"}
    settings |= {"state_snapshots": 5, "snapshot_interval": 128, "cuda_graphs": False}
    LLM("somewhere", **settings)
    assert loaded == [("somewhere", EngineConfig(**settings), None)]
    assert all(settings[name] != default for name, (_, default) in spelled.items()), "a value of its own for each"


def test_one_prompt_gives_one_result_and_a_list_gives_a_list_in_order(llm: LLM) -> None:
    prompts = ["Hello", TEXT, "a page holds"]
    results = llm.generate(prompts, GREEDY)
    assert [r.prompt_token_ids for r in results] == [llm.tokenizer.encode(p) for p in prompts]
    for prompt, result in zip(prompts, results, strict=True):
        alone = llm.generate(prompt, GREEDY)
        assert (alone.text, alone.token_ids) == (result.text, result.token_ids)
        assert len(result.token_ids) == 12 and result.finish_reason == "length"
        assert result.text == llm.tokenizer.decode(result.token_ids, skip_special_tokens=True)
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(result.prompt_token_ids), 12)
        assert result.timings.prefill_seconds > 0 and result.timings.decode_seconds > 0
    by_ids = llm.generate(llm.tokenizer.encode(TEXT), GREEDY)
    assert by_ids.token_ids == results[1].token_ids
    assert [r.token_ids for r in llm.generate([[5, 6], [7]], GREEDY)] == [
        llm.generate([5, 6], GREEDY).token_ids,
        llm.generate([7], GREEDY).token_ids,
    ]
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (2, 5)]
    assert [len(r.token_ids) for r in llm.generate(["a", "b"], params)] == [2, 5]
    with pytest.raises(InvalidRequest, match="one for each prompt"):
        llm.generate(["a"], params)


def test_greedy_tokens_equal_transformers(llm: LLM, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = llm.tokenizer.encode(TEXT)
    ours = llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)).token_ids
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :]
        logits = theirs(torch.tensor([ids])).logits[0]
    assert ours == expected.tolist()
    assert (llm.logits(ids) - logits).abs().max() < 1e-4


def test_logits_and_perplexity_and_prompt_logprobs_agree(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT * 12)
    assert len(ids) > 128  # more than one page
    logits = llm.logits(ids)
    assert logits.shape == (len(ids), llm.vocab_size) and logits.dtype == torch.float32
    scores = logits.double().log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert llm.perplexity(TEXT * 12) == pytest.approx(math.exp(-scores.mean()), rel=1e-4)
    result = llm.generate(ids, SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == len(ids)
    assert result.prompt_logprobs[0].logprob is None
    for position, entry in enumerate(result.prompt_logprobs[1:], 1):
        assert entry.token_id == ids[position] and entry.token_bytes == llm.tokenizer.token_bytes(ids[position])
        assert entry.logprob == pytest.approx(float(scores[position - 1]), abs=1e-4)
        assert len(entry.top) == 2 and entry.top[0].logprob >= entry.top[1].logprob  # type: ignore[operator]


def test_perplexity_of_a_text_longer_than_the_context_is_windowed(llm: LLM) -> None:
    text = TEXT * 60
    assert len(llm.tokenizer.encode(text)) > llm.model_info.max_model_len
    assert llm.perplexity(text) > 1
    with pytest.raises(InvalidRequest, match="at least two tokens"):
        llm.perplexity("")


def test_logprobs_of_generated_tokens(llm: LLM) -> None:
    result = llm.generate(TEXT, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=3))
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    sequence = result.prompt_token_ids + result.token_ids
    scores = llm.logits(sequence).log_softmax(-1)
    for i, entry in enumerate(result.logprobs):
        row = scores[len(result.prompt_token_ids) + i - 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [top.token_id for top in entry.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"logprobs": 1}, {"stop": ("o",)}], ids=str)
def test_streamed_answer_equals_the_whole_one(llm: LLM, fields: dict[str, Any]) -> None:
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=40, ignore_eos=True, **fields)
    whole = llm.generate(TEXT, params)
    events = list(llm.stream(TEXT, params))
    assert isinstance(events[0], PromptProcessed)
    assert sum(isinstance(e, Finished) for e in events) == params.n
    streamed = collect(events, n=params.n, logprobs=params.logprobs is not None)
    for a, b in zip(whole.completions, streamed.completions, strict=True):
        assert (a.text, a.token_ids, a.logprobs, a.finish_reason, a.stop_reason) == (
            b.text,
            b.token_ids,
            b.logprobs,
            b.finish_reason,
            b.stop_reason,
        )


def test_seeds(llm: LLM) -> None:
    first = llm.generate(TEXT, SAMPLED)
    crowd = llm.generate(["a", TEXT, "b", "c"], SAMPLED)
    assert crowd[1].token_ids == first.token_ids
    assert llm.generate(TEXT, SamplingParams(temperature=1.0, seed=4, max_tokens=24)).token_ids != first.token_ids
    several = llm.generate(TEXT, SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True, n=3))
    assert several.completions[0].token_ids == first.token_ids
    assert len({tuple(c.token_ids) for c in several.completions}) == 3


def test_a_stop_string_across_tokens_ends_the_answer_before_it(llm: LLM) -> None:
    free = llm.generate(TEXT, SamplingParams(temperature=1.0, seed=5, max_tokens=60, ignore_eos=True))
    pieces = [llm.tokenizer.decode([i], skip_special_tokens=True) for i in free.token_ids]
    place = next(
        i
        for i in range(3, len(pieces) - 1)
        if pieces[i].isascii() and pieces[i + 1].isascii() and len(pieces[i]) > 1 and pieces[i + 1]
    )
    stop = pieces[place][-1] + pieces[place + 1][:1]
    cut = free.text.index(stop)
    result = llm.generate(TEXT, SamplingParams(temperature=1.0, seed=5, max_tokens=60, ignore_eos=True, stop=stop))
    assert result.text == free.text[:cut]
    assert (result.finish_reason, result.completions[0].stop_reason) == ("stop", stop)
    assert len(result.token_ids) <= place + 2


def test_chat_renders_the_template(llm: LLM) -> None:
    result = llm.chat(HELLO, GREEDY)
    expected = "<|im_start|>user\nHello fox<|im_end|>\n<|im_start|>assistant\n"
    assert llm.tokenizer.decode(result.prompt_token_ids) == expected
    quiet = llm.chat(HELLO, GREEDY, chat_template_kwargs={"enable_thinking": False})
    assert llm.tokenizer.decode(quiet.prompt_token_ids) == expected + "<think>\n\n</think>\n\n"
    both = llm.chat([HELLO, HELLO], GREEDY)
    assert [r.token_ids for r in both] == [result.token_ids] * 2
    assert collect(llm.stream(messages=HELLO, sampling_params=GREEDY)).token_ids == result.token_ids


def test_special_tokens_in_a_prompt_are_text(llm: LLM) -> None:
    result = llm.generate("<|im_end|>", GREEDY)
    assert len(result.prompt_token_ids) > 1
    assert llm.tokenizer.token_id("<|im_end|>") not in result.prompt_token_ids


def test_end_of_turn_ends_an_answer_unless_ignored(llm: LLM) -> None:
    end = llm.tokenizer.eos_token_ids[0]
    push = {end: 100.0}
    result = llm.generate(TEXT, SamplingParams(temperature=0.0, logit_bias=push, max_tokens=9))
    assert (result.finish_reason, result.text, result.completions[0].stop_reason) == ("stop", "", None)
    result = llm.generate(TEXT, SamplingParams(temperature=0.0, logit_bias=push, max_tokens=9, ignore_eos=True))
    assert result.token_ids == [end] * 9 and result.finish_reason == "length"
    result = llm.generate(TEXT, SamplingParams(temperature=0.0, logit_bias=push, max_tokens=9, min_tokens=4))
    assert len(result.token_ids) == 5 and end not in result.token_ids[:4]


def test_streams_interleave_on_one_thread(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    streams = [llm.stream(p, params) for p in ("Hello", TEXT)]
    events: list[list[Any]] = [[], []]
    for pair in zip_longest(*streams):
        for seen, event in zip(events, pair, strict=True):
            seen += [event] if event is not None else []
    assert [collect(e).token_ids for e in events] == [llm.generate(p, params).token_ids for p in ("Hello", TEXT)]


@pytest.mark.parametrize("num_events", [0, 1, 2, 5])
def test_leaving_a_stream_aborts_and_frees_its_pages(llm: LLM, num_events: int) -> None:
    events = llm.stream(TEXT, SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, n=2))
    for _ in range(num_events):
        next(events)
    events.close()  # type: ignore[attr-defined]
    before = llm.stats().generation_tokens_total
    llm.generate("x", SamplingParams(max_tokens=1))  # the engine's thread has taken the abort when this is done
    assert llm.stats().kv_pages_used == 0 and llm.stats().num_running == 0
    assert llm.stats().generation_tokens_total - before <= 6


def test_a_refused_prompt_in_a_list_aborts_the_others(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded):
        llm.generate([TEXT, [1] * 600, TEXT], SAMPLED)
    llm.generate("x", SamplingParams(max_tokens=1))
    assert llm.stats().num_running == llm.stats().num_waiting == 0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.generate([1] * 512), ContextLengthExceeded, "prompt is too long: 512 tokens > 511 maximum"),
        (lambda m: m.generate([[]]), InvalidRequest, "expected at least one token"),
        (lambda m: m.generate([100_000]), InvalidRequest, r"prompt\[0\]: expected a token id below 400"),
        (lambda m: m.logits([1, 100_000]), InvalidRequest, r"prompt\[1\]: expected a token id below 400"),
        (lambda m: m.chat([]), InvalidRequest, "messages: expected at least one"),
        (lambda m: m.chat(HELLO, response_format={"type": "yaml"}), InvalidRequest, "response_format.type"),
        (
            lambda m: m.chat(HELLO, response_format={"type": "json_schema"}),
            InvalidRequest,
            "response_format.json_schema",
        ),
        (lambda m: next(m.stream()), InvalidRequest, "exactly one of prompt and messages"),
        (lambda m: m.generate("a", SamplingParams(stop_token_ids=[999_999])), InvalidRequest, "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused_by_name(llm: LLM, call: Any, error: type[HelexaError], words: str) -> None:
    with pytest.raises(error, match=words):
        call(llm)


# -- Models that cannot be loaded


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="absent.gguf"):
        LLM(tmp_path / "absent.gguf")


def test_a_hub_id_that_is_not_on_disk_is_not_fetched_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-GGUF:Q4_K_M"):
        with pytest.raises(ModelNotFound, match=f"{name}.*offline mode is on"):
            LLM(name, offline=True)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"config\.json"):
        LLM(tmp_path)


def test_an_unknown_architecture(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    edit(tmp_path / "m", "config.json", architectures=["BloomForCausalLM"], model_type="bloom")
    with pytest.raises(UnsupportedCheckpoint, match="(?i)bloom"):
        LLM(tmp_path / "m")


def test_a_tokenizer_that_does_not_fit_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="tokenizer has 400 tokens but the model's vocabulary only 300"):
        LLM(write_qwen3_folder(tmp_path / "m", vocab_size=300))


def test_a_context_beyond_the_model(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="max_model_len: the model allows at most 1024"):
        LLM(folder, max_model_len=2048)


def test_out_of_memory_is_foreseen_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helexa_engine.runtime import plan

    stages: list[str] = []
    monkeypatch.setattr(plan, "available_bytes", lambda: 2_000_000)
    with pytest.raises(ModelDoesNotFit) as caught:
        LLM(folder, progress=lambda stage, _: stages.append(stage))
    assert caught.value.needed_bytes > caught.value.free_bytes > 0
    assert not any("weights" in stage for stage in stages)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"dtype": "int8"}, "dtype"),
        ({"max_num_batched_tokens": 64}, "max_num_batched_tokens"),
    ],
)
def test_bad_arguments_are_named(folder: Path, arguments: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LLM(folder, **arguments)
    assert caught.value.path == path


def test_close_is_final_and_may_be_repeated(folder: Path) -> None:
    model = LLM(folder, max_model_len=128, max_num_seqs=1)
    assert model.model_info.limit == {"context": 128, "input": 127, "output": 127}
    events = model.stream("a", SamplingParams(max_tokens=100, ignore_eos=True))
    next(events)
    model.close()
    model.close()
    with pytest.raises(EngineDied):
        list(events)
    with pytest.raises(EngineDied):
        model.generate("a")


@pytest.mark.parametrize("num_tokens", [3, 300])
def test_what_is_not_finite_is_told_with_its_request_and_its_layer(folder: Path, num_tokens: int) -> None:
    """In a prompt of one chunk and of several."""
    with LLM(folder, max_model_len=512, max_num_batched_tokens=128) as llm:
        layers = llm._loaded.thread._engine.runner.model.layers  # type: ignore[attr-defined]
        layers[1] = lambda x, batch: x * math.nan
        request = GenerateRequest(prompt=[5] * num_tokens, sampling_params=GREEDY, request_id="mine")
        with pytest.raises(SamplingFailed, match="not finite, first in the output of layer 1, for request mine"):
            list(llm.stream_request(request))
        assert llm.stats().kv_pages_used == 0


def test_text_of_deltas_is_the_text(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=60, ignore_eos=True)
    events = list(llm.stream("x", params))
    text = "".join(e.text for e in events if isinstance(e, ContentDelta))
    assert text == llm.generate("x", params).text
