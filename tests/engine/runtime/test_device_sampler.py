"""Sampling where the logits lie: the answers of the CPU's sampler, row by row, step by step, and through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helexa_engine import LLM
from helexa_engine.runtime.device_sampler import DeviceSampler
from helexa_engine.runtime.engine import Engine
from helexa_engine.runtime.exchange import EngineRequest
from helexa_engine.runtime.sampler import Logprobs, NotFinite, Outcome, Sampler, SamplingFailed, sample_rows
from helexa_engine.sampling_params import SamplingParams, StructuredOutput
from helexa_engine.testing.checkpoints import write_qwen3_folder
from helexa_engine.testing.toy_model import ToyModel, toy_engine

PLACES = ["emulated", *(["card"] if torch.cuda.is_available() else [])]
SIZE = 301

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.6, "logprobs": 3},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.3, "frequency_penalty": 1.1, "presence_penalty": 0.4, "min_tokens": 4, "logprobs": 0},
    {"temperature": 1.0, "logit_bias": {4: 5.0, 300: -9.0}, "min_p": 0.05},
    {"temperature": 2.0},
]


@pytest.fixture
def device(cuda_device: torch.device) -> torch.device:
    return cuda_device


class Only:
    """A grammar that allows ``allowed`` after ``free`` tokens of anything, or forces one of them; it breaks at token ``breaks_at``."""

    def __init__(self, *allowed: int, forced: bool = False, free: int = 0, breaks_at: int = -1) -> None:
        self.allowed, self.forced, self.free, self.breaks_at = list(allowed), forced, free, breaks_at
        self.accepted: list[int] = []

    def apply(self, logits: np.ndarray) -> None:
        self._check()
        if len(self.accepted) >= self.free:
            keep = 0.0 if self.forced else logits[self.allowed].copy()
            logits[:] = -np.inf
            logits[self.allowed] = keep

    def forced_token(self) -> int | None:
        return self.allowed[0] if self.forced and len(self.accepted) >= self.free else None

    def fill_mask(self, mask: np.ndarray) -> bool:
        self._check()
        if len(self.accepted) < self.free:
            return False
        bits = np.isin(np.arange(32 * len(mask)), self.allowed)
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)
        return True

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)
        if token_id == 299:
            raise KeyError("no such state")

    def is_finished(self) -> bool:
        return False

    def _check(self) -> None:
        if len(self.accepted) == self.breaks_at:
            raise RuntimeError("the grammar is broken")


GRAMMARS: list[dict[str, Any]] = [
    {"allowed": (3, 31, 32, 300)},
    {"allowed": (7,), "forced": True, "free": 2},
    {"allowed": (1, 2), "free": 3},
    {"allowed": (299,)},
    {"allowed": (5, 6), "breaks_at": 2},
    {"allowed": ()},
]


def samplers() -> list[Sampler]:
    made = [
        Sampler(SamplingParams(**fields).with_defaults({}), seed=i, prompt_token_ids=[4, 9, 4], end_token_ids=[0, 8])
        for i, fields in enumerate(SETTINGS)
    ]
    for i, grammar in enumerate(GRAMMARS):
        params = SamplingParams(temperature=float(i % 3), logprobs=i % 2 or None).with_defaults({})
        settings = dict(grammar)
        made.append(Sampler(params, seed=50 + i, grammar=Only(*settings.pop("allowed"), **settings)))
    return made


def assert_same(got: list[Outcome], expected: list[Outcome]) -> None:
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, Exception):
            assert type(a) is type(b) and str(a) == str(b)
            continue
        assert isinstance(a, tuple) and a[0] == b[0]
        assert (a[1] is None) == (b[1] is None)
        if b[1] is not None:
            assert_same_logprobs(a[1], b[1])


def assert_same_logprobs(got: Logprobs | None, expected: Logprobs) -> None:
    assert got is not None and got.token_id == expected.token_id
    assert got.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [i for i, _ in got.top] == [i for i, _ in expected.top]
    assert [v for _, v in got.top] == pytest.approx([v for _, v in expected.top], abs=1e-5)


def test_answers_are_those_of_the_sampler(device: torch.device) -> None:
    """Over steps: counts, grammars and draws move on in both; a row that fails fails alone, and the others never notice."""
    sampler, here, there = DeviceSampler("cuda"), samplers(), samplers()
    failed: set[str] = set()
    for step in range(6):
        logits = (np.random.default_rng(step).standard_normal((len(here), SIZE)) * 3).astype(np.float32)
        if step == 4:
            logits[2, 17], logits[5] = np.nan, np.inf
        expected = sample_rows(here, logits.copy())
        pending = sampler.sample(there, torch.from_numpy(logits.copy()).to(device))
        tokens = pending.token_ids
        got = pending.outcomes()
        assert_same(got, expected)
        assert tokens.dtype == torch.int64 and tokens.device.type == device.type
        for token_id, outcome in zip(tokens.tolist(), got, strict=True):
            assert 0 <= token_id < SIZE and (isinstance(outcome, Exception) or outcome[0] == token_id)
        failed |= {type(outcome).__name__ for outcome in expected if isinstance(outcome, Exception)}
        for a, b in zip(here, there, strict=True):
            assert a.num_generated == b.num_generated
            assert a.grammar is None or a.grammar.accepted == b.grammar.accepted  # type: ignore[attr-defined,union-attr]
    assert failed == {"NotFinite", "SamplingFailed", "KeyError", "RuntimeError"}


def test_more_log_probabilities_than_there_are_tokens(device: torch.device) -> None:
    made = Sampler(SamplingParams(temperature=0.0, logprobs=64).with_defaults({}), seed=0)
    [outcome] = DeviceSampler("cuda").sample([made], torch.zeros(1, 10, device=device)).outcomes()
    assert isinstance(outcome, tuple) and outcome[1] is not None
    assert [token_id for token_id, _ in outcome[1].top] == list(range(10))


def on_device(engine: Engine, device: torch.device) -> Engine:
    """Samples from the same logits, on the device."""
    sampler, runner = DeviceSampler("cuda"), engine.runner

    def sample(hidden: torch.Tensor, rows: Any, samplers: Any) -> list[Outcome]:
        return sampler.sample(samplers, torch.from_numpy(runner.logits(hidden, rows).copy()).to(device)).outcomes()

    runner.sample = sample  # type: ignore[method-assign]
    return engine


def test_the_engine_gives_the_same_answers(device: torch.device) -> None:
    """With a grammar, several answers, and a request that fails while the others go on."""

    def answers(engine: Engine) -> dict[tuple[str, int], list[Any]]:
        for i, fields in enumerate(SETTINGS):
            kept = {**fields, "logit_bias": {4: 5.0} if "logit_bias" in fields else None}
            params = SamplingParams(**kept, max_tokens=6, seed=i, n=1 + i % 2).with_defaults({})
            engine.add_request(EngineRequest(str(i), (1, 2, 3 + i), params, frozenset({0})))
        params = SamplingParams(temperature=0.7, max_tokens=5, seed=3).with_defaults({})
        engine.add_request(EngineRequest("held", (5, 6), params), make_grammar=lambda: Only(11, 12, 90, free=1))
        engine.add_request(EngineRequest("broken", (5, 6), params), make_grammar=lambda: Only(1, breaks_at=1))
        engine.add_request(EngineRequest("poisoned", (5, 77), params))
        outputs: dict[tuple[str, int], list[Any]] = {}
        while engine.has_work:
            for output in engine.step():
                outputs.setdefault((output.request_id, output.index), []).append(output)
        assert engine.scheduler.pool.num_used == 0
        return outputs

    model = ToyModel(poisoned_token_id=77)
    expected, got = answers(toy_engine(model)), answers(on_device(toy_engine(model), device))
    assert got.keys() == expected.keys()
    for key, outputs in expected.items():
        for a, b in zip(got[key], outputs, strict=True):
            assert (a.token_id, a.finish_reason, type(a.error)) == (b.token_id, b.finish_reason, type(b.error))
            assert str(a.error) == str(b.error)
            if b.logprobs is not None:
                assert_same_logprobs(a.logprobs, b.logprobs)
    assert isinstance(got["poisoned", 0][-1].error, NotFinite)
    assert isinstance(got["broken", 0][-1].error, SamplingFailed) and len(got["broken", 0]) == 2


def test_a_model_on_cuda_answers_as_with_the_sampler_of_the_host(device: torch.device, tmp_path: Path) -> None:
    """From its prompts on, with decode steps by graph and a grammar's masks; one at a time, because prompts that happen to share a step
    are computed by another kernel."""
    settings = [
        *SETTINGS[1:4],
        {"temperature": 1.0, "structured": StructuredOutput(regex="(yes|no){2}")},
    ]
    params = [SamplingParams(**fields, max_tokens=4, seed=i) for i, fields in enumerate(settings)]
    prompts = [list(range(10, 11 + 3 * i)) for i in range(len(params))]
    folder = write_qwen3_folder(tmp_path / "model")
    with LLM(folder, device="cuda", max_model_len=128, max_num_seqs=1, prefix_cache=False) as llm:
        runner = llm._loaded.thread._engine.runner
        assert runner._device_sampler is not None
        got = llm.generate(prompts, params)
        runner._device_sampler = None
        expected = llm.generate(prompts, params)
    assert "yes" in got[-1].text or "no" in got[-1].text
    for a, b in zip(got, expected, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-5)
