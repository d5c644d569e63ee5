"""Equalities that are the contract, over the whole engine with real (tiny) models, dense and hybrid.

Tokens are compared exactly. Log probabilities are compared bit for bit where the native core computes them, whose rows do not
depend on what is computed beside them; the plain PyTorch twins only promise float32 rounding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helexa_engine import LLM, GenerationResult, SamplingParams
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import mixes, types
from helexa_engine.runtime import model_runner
from helexa_engine.testing.checkpoints import write_folder, write_gguf, write_qwen3_folder
from helexa_engine.testing.compare import assert_close

NATIVE = hasattr(native_core(), "quant_matmul")
TOLERANCE = 0.0 if NATIVE else 2e-5
KV_DTYPE: Any = "auto" if NATIVE else "float32"  # float16 pages would amplify the twins' rounding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_folder(tmp_path_factory.mktemp("models") / "tiny")


QUANTISED_PAGES = ", q8_0 pages"
VARIANTS = ["safetensors", "Q8_0", "hybrid", "hybrid mixture"]
if NATIVE:  # quantised pages would amplify the twins' rounding
    VARIANTS += ["Q8_0" + QUANTISED_PAGES, "hybrid" + QUANTISED_PAGES]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(variant: str, folder: Path) -> Path:
    kind = variant.removesuffix(QUANTISED_PAGES)
    if kind == "safetensors":
        return folder
    if kind == "hybrid":
        return write_folder(folder.parent / "qwen35", "qwen35")
    if kind == "hybrid mixture":
        hybrid = write_folder(folder.parent / "qwen3next", "qwen3next")
        return write_gguf(hybrid, folder.parent / "qwen3next-Q4_K_M.gguf", mixes.MIXES["Q4_K_M"])
    return write_gguf(folder, folder.parent / "tiny-Q8_0.gguf", types.Q8_0)


@pytest.fixture(scope="module")
def kv_dtype(variant: str) -> Any:
    return "q8_0" if variant.endswith(QUANTISED_PAGES) else KV_DTYPE


@pytest.fixture(scope="module")
def llm(model: Path, kv_dtype: Any) -> Iterator[LLM]:
    with LLM(model, kv_dtype=kv_dtype, max_model_len=512, max_num_seqs=6, max_num_batched_tokens=2048) as loaded:
        yield loaded


def params(**fields: Any) -> SamplingParams:
    fields = {"temperature": 1.0, "seed": 5, "max_tokens": 10, "ignore_eos": True, "logprobs": 2} | fields
    return SamplingParams(**fields)


def prompt(length: int) -> list[int]:
    return torch.randint(0, 390, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def assert_same(got: GenerationResult, expected: GenerationResult) -> None:
    assert got.token_ids == expected.token_ids
    for which in ("logprobs", "prompt_logprobs"):
        rows = [
            [entry.logprob for entry in getattr(result, which) or () if entry.logprob is not None]
            for result in (got, expected)
        ]
        assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), atol=TOLERANCE, what=which)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 191, 193, 320])
def test_chunked_prefill_equals_whole_prefill_at_every_border(
    llm: LLM, model: Path, length: int, kv_dtype: Any
) -> None:
    whole = llm.generate(prompt(length), params(prompt_logprobs=0))
    with LLM(model, kv_dtype=kv_dtype, max_model_len=512, max_num_seqs=1, max_num_batched_tokens=64) as chunked:
        result = chunked.generate(prompt(length), params(prompt_logprobs=0))
        assert chunked.stats().steps_total == -(-length // 64) + 9
    assert_same(result, whole)


def test_the_model_says_how_keys_and_values_are_kept(llm: LLM, variant: str, kv_dtype: Any) -> None:
    automatic = "float32" if not NATIVE or variant in ("safetensors", "hybrid") else "float16"
    assert llm.model_info.kv_dtype == (automatic if kv_dtype == "auto" else kv_dtype)


def test_batch_of_many_equals_each_alone(llm: LLM) -> None:
    prompts = [prompt(length) for length in (1, 5, 63, 64, 65, 100, 130, 200)]
    settings = [params(seed=i, max_tokens=4 + 2 * i, top_k=20 * (i % 2)) for i in range(len(prompts))]
    together = llm.generate(prompts, settings)
    for p, s, result in zip(prompts, settings, together, strict=True):
        assert_same(llm.generate(p, s), result)


def test_replayed_decode_step_equals_the_same_through_python(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    most = model_runner.MOST_RECORDED
    results, settings = {}, params(max_tokens=6)
    for count in (1, most, most + 1):
        prompts = [prompt(60 + i) for i in range(count)]
        results[count] = llm.generate(prompts, settings)
    runner = llm._loaded.thread._engine.runner
    assert {1, most} <= set(runner._steps) if NATIVE else not runner._steps
    assert most + 1 not in runner._steps
    monkeypatch.setattr(model_runner, "MOST_RECORDED", 0)
    for count, replayed in results.items():
        for got, expected in zip(replayed, llm.generate([prompt(60 + i) for i in range(count)], settings), strict=True):
            assert_same(got, expected)


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
@pytest.mark.parametrize("count", [1, 3])
def test_a_replayed_step_tells_the_places_of_the_largest_logits(llm: LLM, count: int) -> None:
    runner, told = llm._loaded.thread._engine.runner, 0
    compute = runner.logits

    def check(*arguments: Any) -> Any:
        nonlocal told
        logits = compute(*arguments)
        if runner.largest is not None:
            told += 1
            assert runner.largest == logits.argmax(axis=1).tolist()
        return logits

    runner.logits = check  # type: ignore[method-assign]
    try:
        llm.generate([prompt(40 + i) for i in range(count)], params(max_tokens=6, temperature=0.0))
    finally:
        del runner.logits  # type: ignore[method-assign]
    assert told == 5  # all but the step of the prompts


def test_preempted_equals_undisturbed(llm: LLM, model: Path, kv_dtype: Any) -> None:
    prompts, settings = [prompt(60 + i) for i in range(3)], params(max_tokens=80)
    with LLM(model, kv_dtype=kv_dtype, max_model_len=192, max_num_seqs=3) as tight:
        pool = tight._loaded.thread._engine.scheduler.pool
        pool.allocate(pool.num_free - 3)  # leaves enough for one sequence of full length, not for three
        results = tight.generate(prompts, settings)
        assert tight.stats().preemptions_total > 0
    for result, undisturbed in zip(results, llm.generate(prompts, settings), strict=True):
        assert_same(result, undisturbed)


@contextmanager
def recorded_logits(llm: LLM) -> Iterator[list[torch.Tensor]]:
    """All rows of logits that tokens are sampled from meanwhile, in order."""
    runner, rows = llm._loaded.thread._engine.runner, []
    compute = runner.logits

    def record(*arguments: Any) -> Any:
        logits = compute(*arguments)
        rows.extend(torch.from_numpy(logits.copy()))
        return logits

    runner.logits = record  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        del runner.logits  # type: ignore[method-assign]


@pytest.mark.parametrize("length", [64, 65, 100, 128, 200, 321])
def test_prefix_hit_equals_cold_run(llm: LLM, model: Path, length: int, kv_dtype: Any) -> None:
    """The logits of every step, of a prompt seen before and of one that goes on from prompt and answer."""
    settings, ids = params(max_tokens=70, logprobs=None), prompt(length)[::-1]
    with (
        LLM(model, kv_dtype=kv_dtype, max_model_len=512, max_num_seqs=6, prefix_cache=False) as never,
        recorded_logits(never) as expected,
    ):
        cold = never.generate(ids, settings)
        onward = [*ids, *cold.token_ids, *prompt(30)]
        cold_onward = never.generate(onward, settings)
    assert cold.usage.cached_tokens == cold_onward.usage.cached_tokens == 0
    with recorded_logits(llm) as first:
        llm.generate(ids, settings)
    with recorded_logits(llm) as got:
        hit, hit_onward = llm.generate(ids, settings), llm.generate(onward, settings)
    hybrid = llm.model_info.state_bytes > 0
    assert hit.usage.cached_tokens == (length - 1) // 64 * 64
    assert hit_onward.usage.cached_tokens == (length if hybrid else length + 69) // 64 * 64
    assert len(first) == 70 and len(got) == len(expected) == 140
    assert (hit.token_ids, hit_onward.token_ids) == (cold.token_ids, cold_onward.token_ids)
    for rows in (first, got):
        assert_close(torch.stack(rows), torch.stack(expected[: len(rows)]), atol=TOLERANCE, what="logits")


@contextmanager
def logits_by_request(llm: LLM) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The rows of logits that the first answer of each request is sampled from meanwhile."""
    engine, rows = llm._loaded.thread._engine, dict[str, list[torch.Tensor]]()
    sample = engine.runner.sample

    def record(hidden: Any, places: Any, samplers: Any) -> Any:
        names = {answer.sampler: answer.sequence.request_id for answer in engine._answers.values()}
        with recorded_logits(llm) as logits:
            outcomes = sample(hidden, places, samplers)
        for sampler, row in zip(samplers, logits, strict=True):
            rows.setdefault(names[sampler], []).append(row)
        return outcomes

    engine.runner.sample = record  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        del engine.runner.sample  # type: ignore[method-assign]


@contextmanager
def budgets_that_change(llm: LLM, seed: int) -> Iterator[None]:
    """Each step may hold another number of tokens."""
    scheduler, generator = llm._loaded.thread._engine.scheduler, random.Random(seed)
    most, schedule = scheduler.max_num_batched_tokens, scheduler.schedule

    def with_another_budget(now: float) -> Any:
        scheduler.max_num_batched_tokens = generator.randrange(64 + scheduler.max_num_seqs - 1, most + 1)
        return schedule(now)

    scheduler.schedule = with_another_budget  # type: ignore[method-assign]
    try:
        yield
    finally:
        del scheduler.schedule  # type: ignore[method-assign]
        scheduler.max_num_batched_tokens = most


def test_any_schedule_gives_the_same_logits(llm: LLM, model: Path) -> None:
    """Alone; then together, in chunks that change from step to step, with priorities and owners; then again after prefix hits."""
    lengths = (1, 63, 64, 65, 130, 200, 321, 400)
    trunk = prompt(450)
    requests = [
        GenerateRequest(
            prompt=trunk[:length] if i % 2 else prompt(length),
            sampling_params=params(max_tokens=6 + i, logprobs=None, seed=i),
            request_id=str(i),
            priority=i % 3 - 1,
            owner="ab"[i % 2],
        )
        for i, length in enumerate(lengths)
    ]

    settings: dict[str, Any] = {"kv_dtype": KV_DTYPE, "max_model_len": 512}
    with LLM(model, **settings, prefix_cache=False) as never, logits_by_request(never) as alone:
        for request in requests:
            never._run([request], bar=False)
    with LLM(model, **settings, max_num_seqs=5, max_num_batched_tokens=260) as scheduled:
        for seed in range(3):
            with logits_by_request(scheduled) as together, budgets_that_change(scheduled, seed):
                scheduled._run(requests[:: 1 if seed % 2 else -1], bar=False)
            assert together.keys() == alone.keys()
            for name, rows in together.items():
                assert_close(torch.stack(rows), torch.stack(alone[name]), atol=TOLERANCE, what=f"logits of {name}")
        stats = scheduled.stats()
        assert stats.prefix_cache_hits_total > 400 and stats.kv_pages_used == 0


def test_abort_frees_every_page_and_slot(llm: LLM) -> None:
    for num_events in range(4):
        streams = [llm.stream(prompt(length), params(max_tokens=300, n=2)) for length in (10, 150, 400)]
        for events in streams:
            for _ in range(num_events):
                next(events)
        for events in streams:
            events.close()  # type: ignore[attr-defined]
    llm.generate("x", params(max_tokens=1))
    stats = llm.stats()
    assert (stats.kv_pages_used, stats.num_running, stats.num_waiting) == (0, 0, 0)
    states = llm._loaded.thread._engine.scheduler.states
    assert (states is None) == (llm.model_info.state_bytes == 0)
    assert states is None or states.num_used == 0


def test_gguf_equals_safetensors(folder: Path, tmp_path: Path) -> None:
    path = write_gguf(folder, tmp_path / "tiny-F32.gguf")
    text = "The quick brown fox jumps over the lazy dog. " * 8
    with LLM(folder) as theirs, LLM(path) as ours:
        ids = theirs.tokenizer.encode(text)
        assert ours.tokenizer.encode(text) == ids
        assert torch.equal(ours.logits(ids), theirs.logits(ids))
        messages = [{"role": "user", "content": "Hello fox"}]
        settings = SamplingParams(max_tokens=32, ignore_eos=True)
        a, b = ours.chat(messages, settings), theirs.chat(messages, settings)
        assert (a.prompt_token_ids, a.token_ids) == (b.prompt_token_ids, b.token_ids)
        assert ours.tokenizer.eos_token_ids == theirs.tokenizer.eos_token_ids


@pytest.mark.parametrize(("mix", "bound"), [("Q8_0", 1e-3), ("Q4_K_M", 5e-2)])
def test_quantising_on_loading_stays_near_the_original(folder: Path, mix: str, bound: float) -> None:
    ids = prompt(100)
    with LLM(folder) as exact, LLM(folder, quant=mix) as quantised:
        truth, logits = exact.logits(ids).double(), quantised.logits(ids).double()
        assert quantised.model_info.weight_bytes < exact.model_info.weight_bytes / 2
    error = float((logits - truth).square().mean() / truth.var())
    assert 0 < error < bound
