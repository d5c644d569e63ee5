"""Every architecture on ``device="cuda"``, from the file to the tokens: under the emulation everywhere, and on a card where there is one.

The truth is the same file computed by the twins in float32 on the CPU. The bound is the accuracy bar of the file's type (see
``test_accuracy.py``): what the other ways of rounding activations cost. Keys and values are bfloat16 here, or Q8_0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from helexa_engine import LLM, GenerationResult, SamplingParams
from helexa_engine.ops.registry import op_names
from helexa_engine.quant import mixes
from helexa_engine.testing.checkpoints import write_folder, write_gguf
from helexa_engine.testing.cuda_core import emulated_cuda

from .test_accuracy import BARS

TWINS = ",".join(f"{op}=reference" for op in sorted(op_names() - {"quantize"}))
PLACES = ["emulated", *(["card"] if torch.cuda.is_available() else [])]


NARROW = {
    "hidden_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A tiny model in a mix of types, with its pages in ``kv_dtype``."""

    architecture: str
    mix: str
    kv_dtype: str = "auto"

    @property
    def changes(self) -> dict[str, Any]:
        """What is smaller than in the tiny models, as far as the mix's blocks allow: experts take the emulation long."""
        if self.architecture == "qwen3moe":
            return {"num_hidden_layers": 1}
        return NARROW if self.architecture in ("qwen3next", "qwen35moe") else {}

    @property
    def bar(self) -> float:
        return BARS[self.architecture].of("Q8_0" if self.kv_dtype == "q8_0" and self.mix == "BF16" else self.mix)

    def __str__(self) -> str:
        return f"{self.architecture}-{self.mix}" + ("-q8_0-pages" if self.kv_dtype == "q8_0" else "")


CASES = [
    Case("qwen3", "BF16"),
    Case("qwen3", "Q4_K_M"),
    Case("qwen3moe", "Q4_K_M"),
    Case("qwen3next", "Q8_0"),
    Case("qwen35", "Q5_K_M", "q8_0"),
    Case("qwen35moe", "Q4_0"),
]
#: Natural log of a probability: what bfloat16 copies of activations make of another order of sums.
TOLERANCE = 0.1
MARGIN = 0.5
PARAMS: Any = {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True, "logprobs": 0}


def prompt(count: int, seed: int) -> list[int]:
    return torch.randint(0, 390, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


#: Over a page's border.
SCORED = prompt(66, seed=1)


class Loaded:
    """A case's model on the device, and what the twins say of it."""

    def __init__(self, case: Case, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.case, self._path, self._patch = case, path, patch

    def on_cuda(self, **options: Any) -> LLM:
        options = {"max_model_len": 192, "max_num_seqs": 4, "kv_dtype": self.case.kv_dtype} | options
        return LLM(self._path, device="cuda", **options)

    @cached_property
    def llm(self) -> LLM:
        return self.on_cuda()

    @cached_property
    def logits(self) -> torch.Tensor:
        """Of :data:`SCORED`."""
        return self.llm.logits(SCORED)

    @cached_property
    def cold(self) -> LLM:
        """The same without a prefix cache and without graphs."""
        return self.on_cuda(prefix_cache=False, cuda_graphs=False)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """One over a page's border and two short ones, whose answers by the truth hang on no rounding: at every token the likeliest is
        ahead by :data:`MARGIN`."""
        return [self._prompt(length) for length in (66, 3, 9)]

    def _prompt(self, length: int) -> list[int]:
        for seed in range(10, 110):
            ids = prompt(length, seed)
            answer = self.truth.generate(ids, SamplingParams(**PARAMS | {"logprobs": 2}))
            likeliest = [[option.logprob for option in entry.top] for entry in answer.completions[0].logprobs]
            if all(first - second > MARGIN for first, second in likeliest):
                return ids
        raise AssertionError("no prompt's answer is certain enough")

    @cached_property
    def truth(self) -> LLM:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HELEXA_OPS", TWINS)
            return LLM(self._path, device="cpu", kv_dtype="float32", max_model_len=192, prefix_cache=False)

    def close(self) -> None:
        for llm in ("llm", "cold", "truth"):
            if llm in self.__dict__:
                self.__dict__[llm].close()


@pytest.fixture(scope="module", params=[pytest.param(p, marks=pytest.mark.gpu if p == "card" else ()) for p in PLACES])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "emulated":
        request.getfixturevalue("simt")
    with emulated_cuda() if request.param == "emulated" else nullcontext():
        yield request.param


@pytest.fixture(scope="module", params=CASES, ids=str)
def loaded(request: pytest.FixtureRequest, place: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    case: Case = request.param
    root = tmp_path_factory.mktemp("cuda")
    folder = write_folder(root / "folder", case.architecture, **case.changes)
    with pytest.MonkeyPatch.context() as patch:
        found = Loaded(case, write_gguf(folder, root / f"{case.mix}.gguf", mixes.MIXES[case.mix]), patch)
        yield found
        found.close()


def error_of(got: Any, truth: Any) -> float:
    got, truth = torch.as_tensor(got).double(), torch.as_tensor(truth).double()
    return float((got - truth).square().sum() / truth.square().sum())


def test_it_runs_on_the_kernels(loaded: Loaded) -> None:
    info = loaded.llm.model_info
    assert info.kv_dtype == ("bfloat16" if loaded.case.kv_dtype == "auto" else "q8_0")


def test_logits_meet_the_bar(loaded: Loaded) -> None:
    error = error_of(loaded.logits, loaded.truth.logits(SCORED))
    print(f"{loaded.case}: {error:.3g}")
    assert 0 < error <= loaded.case.bar


@pytest.mark.parametrize("loaded", [CASES[4]], ids=str, indirect=True)
def test_warming_up_leaves_nothing_behind(loaded: Loaded) -> None:
    ids = prompt(5, seed=6)
    before = loaded.llm.logits(ids)
    runner: Any = loaded.llm._loaded.thread._engine.runner
    runner.warm_up()
    assert torch.equal(loaded.llm.logits(ids), before)


def tokens(result: GenerationResult) -> list[int]:
    return list(result.completions[0].token_ids)


def logprobs(result: GenerationResult) -> list[float]:
    return [float(entry.logprob) for entry in result.completions[0].logprobs]


def assert_same_answers(got: list[GenerationResult], expected: list[GenerationResult], tolerance: float) -> None:
    """The same tokens, and as likely but for another order of sums."""
    assert [tokens(result) for result in got] == [tokens(result) for result in expected]
    for ours, theirs in zip(got, expected, strict=True):
        difference = (torch.tensor(logprobs(ours)) - torch.tensor(logprobs(theirs))).abs().max()
        assert difference <= tolerance, float(difference)


def test_a_batch_in_a_filled_up_graph_equals_each_alone_and_a_prefix_hit_a_cold_run(loaded: Loaded) -> None:
    """Three sequences take the graph of four rows; the truth's own tokens come out of all of them."""
    alone = [loaded.cold.generate(ids, SamplingParams(**PARAMS)) for ids in loaded.prompts]
    truth = loaded.truth.generate(loaded.prompts, SamplingParams(**PARAMS))
    assert [tokens(result) for result in alone] == [tokens(result) for result in truth]
    together = loaded.llm.generate(loaded.prompts, SamplingParams(**PARAMS))
    assert_same_answers(together, alone, TOLERANCE)
    assert [result.cached_tokens for result in together] == [0, 0, 0]
    again = loaded.llm.generate(loaded.prompts[0], SamplingParams(**PARAMS))
    assert again.cached_tokens == 64
    assert_same_answers([again], alone[:1], TOLERANCE)


@pytest.mark.parametrize("loaded", [CASES[0], CASES[3], CASES[4]], ids=str, indirect=True)
def test_chunked_prefill_equals_whole(loaded: Loaded) -> None:
    with loaded.on_cuda(max_num_seqs=1, max_num_batched_tokens=64) as chunked:
        error = error_of(chunked.logits(SCORED), loaded.logits)
    assert error <= loaded.case.bar / 4


def test_the_comparison_can_fail(loaded: Loaded) -> None:
    """The first layer's second norm, too large by a third."""
    ids = prompt(8, seed=5)
    model: Any = loaded.llm._loaded.thread._engine.runner.model
    weight = model.layers[0].post_attention_norm.weight
    truth = loaded.truth.logits(ids)
    weight.mul_(4 / 3)
    error = error_of(loaded.llm.logits(ids), truth)
    weight.div_(4 / 3)
    assert error > loaded.case.bar
