"""The perplexity table of the demo's checkpoint: what it quantises, and what it measures."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from helexa_engine import LLM, demo  # noqa: E402
from helexa_engine.demo import evaluate, hybrid, perplexity  # noqa: E402
from helexa_engine.quant.mixes import MIXES  # noqa: E402


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    torch.manual_seed(0)
    model = hybrid.new_model().eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(-1.0)  # 1 + w is 0: all logits are equal
    texts = [torch.randint(0, 2048, (n,)).tolist() for n in (5, 70, 33)]
    assert perplexity.perplexity(model, texts, batch=2) == pytest.approx(2048, rel=1e-4)


def test_batches_do_not_change_the_result() -> None:
    torch.manual_seed(0)
    model = hybrid.new_model().eval()
    texts = [torch.randint(0, 2048, (n,)).tolist() for n in (5, 70, 33)]
    together, alone = (perplexity.perplexity(model, texts, batch=n) for n in (3, 1))
    assert together == pytest.approx(alone, rel=1e-5) and math.isfinite(alone)


def test_mixes_reach_the_matrices_only() -> None:
    torch.manual_seed(0)
    original = {n: t for n, t in hybrid.new_model().state_dict().items() if n != "lm_head.weight"}
    errors = {}
    for name in ("BF16", "Q8_0", "Q4_K_M"):
        mixed = perplexity.in_mix(original, MIXES[name], num_layers=8, gqa_ratio=2)
        assert set(mixed) == set(original) | {"lm_head.weight"}
        for key, tensor in original.items():
            if tensor.ndim != 2:
                assert torch.equal(mixed[key], tensor), key
        down = "model.layers.1.mlp.up_proj.weight"
        errors[name] = float(((mixed[down] - original[down]) ** 2).mean() / (original[down] ** 2).mean())
    assert 0 < errors["BF16"] < errors["Q8_0"] < errors["Q4_K_M"] < 0.01


def test_what_each_mix_may_lose() -> None:
    """The bounds hold for the shipped weights on a few held-out conversations; the model card has the table of the checkpoint."""
    model, encoder = evaluate.load_gguf(demo.path())
    texts = perplexity.held_out_tokens(encoder, 2)
    bounds = {"Q8_0": 0.002, "Q6_K": 0.005, "Q5_K_M": 0.01, "Q4_K_M": 0.03}
    found = dict(perplexity.perplexities(model, texts, ("BF16", *bounds)))
    for name, bound in bounds.items():
        assert abs(found[name] / found["BF16"] - 1) <= bound, found


def test_what_keys_and_values_in_q8_0_may_lose() -> None:
    """Queries, keys and values each carry the error that weights have in Q8_0, and the bound is theirs."""
    _, encoder = evaluate.load_gguf(demo.path())
    texts = perplexity.held_out_tokens(encoder, 2)
    found = {}
    for kv_dtype in ("float32", "float16", "q8_0"):
        with LLM("demo", kv_dtype=kv_dtype, max_num_seqs=1) as llm:  # type: ignore[arg-type]
            scores = [
                llm.logits(ids).double().log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
                for ids in texts
            ]
        found[kv_dtype] = math.exp(-float(torch.cat(scores).mean()))
    print(found)
    assert found["q8_0"] != found["float16"]
    for kv_dtype, bound in {"float16": 0.0005, "q8_0": 0.002}.items():
        assert abs(found[kv_dtype] / found["float32"] - 1) <= bound, found
