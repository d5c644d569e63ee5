"""The hybrids against HuggingFace transformers, and the equalities that a recurrent state must keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import (
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from helexa_engine.models.config import ModelConfig
from helexa_engine.models.decoder import Decoder
from helexa_engine.models.registry import model_class
from helexa_engine.weights import loader
from helexa_engine.weights.checkpoint import open_checkpoint

from .sessions import Pool, Session, assert_same, expected_logits, float32_costs, in_one_order

VOCAB = 160
SHAPE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    vocab_size=VOCAB, max_position_embeddings=512, rms_norm_eps=1e-6, linear_num_key_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16,
)  # fmt: skip
EXPERTS = dict(
    num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=48, norm_topk_prob=True
)  # fmt: skip
DENSE = (Qwen3_5TextConfig, Qwen3_5ForCausalLM)
MOE = (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM)
NEXT = (Qwen3NextConfig, Qwen3NextForCausalLM)
#: name -> classes, and what differs from SHAPE; K = 2 key heads
SHAPES = {
    "V = K": (DENSE, {"linear_num_value_heads": 2, "tie_word_embeddings": True}),
    "V = 2K": (DENSE, {"linear_num_value_heads": 4}),
    "V = 3K": (DENSE, {"linear_num_value_heads": 6, "layer_types": ["full_attention", "linear_attention"] * 2}),
    "head_dim 256": (DENSE, {"linear_num_value_heads": 4, "head_dim": 256, "num_key_value_heads": 1}),
    "experts, V = K": (MOE, EXPERTS | {"linear_num_value_heads": 2}),
    "experts, V = 2K": (MOE, EXPERTS | {"linear_num_value_heads": 4, "tie_word_embeddings": True}),
    "experts, V = 3K": (MOE, EXPERTS | {"linear_num_value_heads": 6}),
    "next, V = K": (NEXT, EXPERTS | {"linear_num_value_heads": 2}),
    "next, V = 2K": (NEXT, EXPERTS | {"linear_num_value_heads": 4}),
    "next, V = 3K": (NEXT, EXPERTS | {"linear_num_value_heads": 6}),
}
Build = Callable[[str], tuple[PreTrainedModel, Decoder]]


def randomise(model: PreTrainedModel) -> None:
    """Weights that spread the logits, and states that live for tens of tokens."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("linear_attn.norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("A_log"):
                parameter.copy_(noise - 2.5)
            elif "norm" in name or name.endswith("dt_bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_((0.5 if "conv1d" in name else 0.15) * noise)


def load(folder: Path) -> Decoder:
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
    model = model_class(checkpoint.architecture, checkpoint.where)(config, config.max_position_embeddings)
    loader.load(model, checkpoint)
    return model


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    @cache
    def make(shape: str) -> tuple[PreTrainedModel, Decoder]:
        (config_class, theirs_class), changes = SHAPES[shape]
        theirs = theirs_class(config_class(**(SHAPE | changes))).eval().float()
        randomise(theirs)
        folder = tmp_path_factory.mktemp("hybrid")
        theirs.save_pretrained(folder)
        return theirs, load(folder)

    return make


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(build: Build, shape: str) -> None:
    theirs, ours = build(shape)
    ids = random_ids(150, seed=1)
    expected = expected_logits(theirs, ids)
    assert expected.std() > 0.5
    assert (Session(ours).feed(ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_transformers(build: Build, shape: str) -> None:
    theirs, ours = build(shape)
    prompt = random_ids(70, seed=2)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert Session(ours).greedy(prompt, 64) == expected[0, 70:].tolist()


def test_the_state_matters(build: Build) -> None:
    """What the delta nets remember reaches the logits far behind it, or the equalities below would prove nothing."""
    _, ours = build("V = 2K")
    ids = random_ids(140, seed=3)
    whole = Session(ours).feed(ids)
    forgot = Session(ours)
    forgot.feed(ids[:64])
    for state in forgot.pool.states:
        state.clear([forgot.state_slot])
    assert (forgot.feed(ids[64:])[20] - whole[84]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", ["V = 2K", "next, V = 3K"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 63, 64, 65, 127])
def test_chunked_prefill_equals_whole(build: Build, chunk: int, shape: str) -> None:
    theirs, ours = build(shape)
    ids = random_ids(200, seed=3)
    rounding = 2 * float32_costs(theirs, tuple(ids))
    assert rounding < 2e-4
    whole, session = Session(ours), Session(ours)
    expected = whole.feed(ids)
    got = session.feed_in(ids, list(range(chunk, len(ids), chunk)))
    exact = in_one_order() and chunk % 64 == 0
    assert_same(got, expected, exact=exact, rounding=rounding)
    for ours_state, theirs_state in zip(session.pool.states, whole.pool.states, strict=True):
        assert_same(ours_state.recurrent_state[2], theirs_state.recurrent_state[2], exact=exact)
        assert_same(ours_state.conv_state[2], theirs_state.conv_state[2], exact=exact)


@pytest.mark.parametrize("seed", range(4))
def test_prefill_cut_anywhere_equals_whole(build: Build, seed: int) -> None:
    theirs, ours = build("V = 3K")
    ids = random_ids(150, seed=5)
    rounding = 2 * float32_costs(theirs, tuple(ids))
    borders = sorted(set(torch.randint(1, 150, (6,), generator=torch.Generator().manual_seed(seed)).tolist()))
    assert_same(Session(ours).feed_in(ids, borders), Session(ours).feed(ids), exact=False, rounding=rounding)


@pytest.mark.parametrize("at", [37, 64])
def test_a_state_saved_and_restored_equals_uninterrupted(build: Build, at: int) -> None:
    """In another slot, after other tokens went through the first; keys and values stay where they are."""
    _, ours = build("V = 2K")
    ids = random_ids(120, seed=6)
    session, undisturbed = Session(ours), Session(ours)
    expected = undisturbed.feed_in(ids, [at])[at:]
    session.feed(ids[:at])
    saved = [(s.conv_state[2].clone(), s.recurrent_state[2].clone()) for s in session.pool.states]
    session.feed(random_ids(17, seed=7))
    session.length, session.state_slot = at, 0
    for state, (conv, recurrent) in zip(session.pool.states, saved, strict=True):
        state.conv_state[0] = conv
        state.recurrent_state[0] = recurrent
    assert_same(session.feed(ids[at:]), expected)


def test_a_batch_equals_each_alone(build: Build) -> None:
    """A decode step, a whole prompt and a chunk over a page border in one batch."""
    _, ours = build("V = 2K")
    prompts = [random_ids(count, seed=count) for count in (70, 9, 130)]
    past = [69, 0, 64]

    def sessions(pools: list[Pool]) -> list[Session]:
        made = [
            Session(ours, pool, pages, slot)
            for pool, pages, slot in zip(pools, [(1, 9), (4,), (8, 6, 2)], (3, 0, 2), strict=True)
        ]
        for session, prompt, count in zip(made, prompts, past, strict=True):
            if count:
                session.feed(prompt[:count])
        return made

    alone = sessions([Pool(ours) for _ in prompts])
    expected = torch.cat([s.feed(p[n:]) for s, p, n in zip(alone, prompts, past, strict=True)])
    pool = Pool(ours)
    together = sessions([pool] * 3)
    assert_same(pool.feed(*((s, p[n:]) for s, p, n in zip(together, prompts, past, strict=True))), expected)
    for state in pool.states:
        assert state.recurrent_state[1].isnan().all(), "a slot that is nobody's is left alone"


def test_the_comparison_can_fail(build: Build) -> None:
    theirs, ours = build("V = K")
    ids = random_ids(64, seed=1)
    bias = ours.layers[0].mixer._dt_bias.get()  # type: ignore[attr-defined]
    bias += 0.01
    difference = (Session(ours).feed(ids) - expected_logits(theirs, ids)).abs().max()
    bias -= 0.01
    assert difference > 1e-4
