"""Experts that stay in the mapped file: the same results to the bit, and no memory of the process taken for them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helexa_engine import LLM, SamplingParams, presets
from helexa_engine.config import EngineConfig
from helexa_engine.errors import InvalidRequest, ModelDoesNotFit
from helexa_engine.models.cache_specs import cache_specs
from helexa_engine.models.config import ModelConfig
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import mixes
from helexa_engine.runtime.plan import plan_memory
from helexa_engine.weights import gguf_names

MB = 10**6
MIX = mixes.MIXES["Q4_K_M"]
#: About 120 MB of experts behind 2 MB of the rest.
SPARSE = dataclasses.replace(
    presets.preset("qwen3-moe-tiny"), hidden_size=1024, num_experts=64, num_experts_per_tok=4, moe_intermediate_size=512
)

PROGRAM = """
import json, re, sys
import torch

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

seen = {"before": status("RssAnon")}
from helexa_engine import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=512, max_num_seqs=1, max_num_batched_tokens=128, mmap_experts=sys.argv[2] == "mapped")
seen |= {"loaded": status("RssAnon"), "weights": llm.model_info.weight_bytes}
answer = llm.generate(list(range(200)), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
print(json.dumps(seen | {"used": status("RssAnon"), "tokens": list(answer.token_ids)}))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "moe-tiny.gguf"
    presets.write_preset_gguf(path, "qwen3-moe-tiny", MIX.name)
    return path


def test_results_are_the_same_to_the_bit(tiny: Path) -> None:
    ids = torch.randint(0, 500, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    logits, answers = [], []
    for mmap_experts in (False, True):
        with LLM(tiny, max_model_len=256, max_num_seqs=1, mmap_experts=mmap_experts) as llm:
            logits.append(llm.logits(ids))
            answers.append(llm.generate(ids, greedy).token_ids)
    assert torch.equal(*logits)
    assert answers[0] == answers[1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.skipif(native_core() is None, reason="the native core is not built")
def test_mapped_experts_take_no_memory_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "sparse", SPARSE)
        presets.write_preset_gguf(path, "sparse", MIX.name)
    experts = sum(t.nbytes for t in presets.tensors(SPARSE, MIX) if "_exps" in t.name)
    assert experts > 100 * MB
    seen = {}
    for kind in ("packed", "mapped"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(path), kind], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen[kind] = json.loads(done.stdout)
    assert seen["mapped"]["tokens"] == seen["packed"]["tokens"]
    # Packed, a K quant's scales take a little more than in the file: Q4_K 4.625 bits a weight for 4.5.
    assert experts <= seen["packed"]["weights"] - seen["mapped"]["weights"] <= 1.03 * experts
    assert seen["packed"]["loaded"] - seen["packed"]["before"] > experts, "this did not measure the load"
    for when in ("loaded", "used"):  # what is left is code, tokenizer, pages and workspace, the same in both
        assert seen["packed"][when] - seen["mapped"][when] > 0.95 * experts


def test_only_a_file_as_it_is_can_be_mapped(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="quant: the weights are quantised already"):
        LLM(tiny, mmap_experts=True, quant="Q4_0")
    float_file = tmp_path / "float.gguf"
    presets.write_preset_gguf(float_file, "qwen3-moe-tiny", "F16")
    for options in ({"quant": "Q8_0"}, {"dtype": "bfloat16"}):
        with pytest.raises(InvalidRequest, match="mmap_experts: the experts stay as the file has them, in F16"):
            LLM(float_file, mmap_experts=True, max_model_len=64, **options)
    with LLM(float_file, mmap_experts=True, max_model_len=64, max_num_seqs=1) as llm:
        assert llm.logits([1, 2, 3]).isfinite().all()


@pytest.mark.parametrize(
    ("name", "gib", "mmap_experts", "fits"),
    [
        ("qwen3-30b-a3b", 24, False, True),
        ("qwen3-30b-a3b", 16, False, False),
        ("qwen3-30b-a3b", 4, True, True),
        ("qwen3-0.6b", 4, True, True),  # dense: nothing to map
    ],
)
def test_a_plan_for_30b_a3b_fits_24_gib(name: str, gib: int, mmap_experts: bool, fits: bool) -> None:
    shape = presets.preset(name)
    metadata = presets._metadata(name, shape, MIX)
    config = gguf_names.hf_config(metadata, shape.vocab_size, shape.tie_word_embeddings, "preset")
    model = ModelConfig.from_checkpoint(shape.architecture, config, "preset")
    specs = cache_specs(model, "float16")
    held = [t for t in presets.tensors(shape, MIX) if not (mmap_experts and "_exps" in t.name)]
    # Packed, a K-quant's scales take a little more than in the file: Q4_K 4.625 bits a weight for 4.5.
    weight_bytes = int(1.028 * sum(tensor.nbytes for tensor in held))
    available = int(gib * 2**30 * 0.97)  # a machine of 24 GiB has a little less, and runs an operating system
    if not fits:
        with pytest.raises(ModelDoesNotFit):
            plan_memory(model, specs, EngineConfig(), weight_bytes, available)
        return
    plan = plan_memory(model, specs, EngineConfig(), weight_bytes, available)
    assert plan.total_bytes <= 0.9 * available
    assert plan.max_model_len >= 4096
