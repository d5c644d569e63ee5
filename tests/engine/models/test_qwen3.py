"""Qwen3 against HuggingFace transformers: float32 logits, then greedy tokens, over every shape that matters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from helexa_engine.batch import Batch
from helexa_engine.models.config import ModelConfig
from helexa_engine.models.qwen3 import Qwen3
from helexa_engine.quant import types

PAGE_SIZE = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}


@dataclass
class Raw:
    name: str
    quant_type: types.QuantType
    shape: tuple[int, ...]
    data: np.ndarray


def build(**changes) -> tuple[Qwen3ForCausalLM, Qwen3, ModelConfig]:
    torch.manual_seed(0)
    shape = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=160, max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = Qwen3ForCausalLM(Qwen3Config(**(shape | changes))).eval().float()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    config = ModelConfig.from_checkpoint("qwen3", theirs.config.to_dict(), "test")
    ours = Qwen3(config, config.max_position_embeddings)
    state = theirs.state_dict()
    for name, slot in ours.parameters_wanted().items():
        value = state[name].contiguous().numpy()
        assert value.shape == slot.shape
        slot.load(Raw(name, types.F32, value.shape, value.reshape(-1).view(np.uint8)))
    return theirs, ours, config


class Session:
    """One sequence on scattered pages."""

    def __init__(self, model: Qwen3, config: ModelConfig) -> None:
        self.model = model
        specs = model.cache_specs(config, "float32")
        self.caches = [spec.allocate(8) for spec in specs]
        for cache in self.caches:
            cache.k.fill_(float("nan"))
            cache.v.fill_(float("nan"))
        self.pages = [5, 2, 7, 0, 3]
        self.length = 0

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Logits [len(ids), vocab] of the new tokens."""
        positions = torch.arange(self.length, self.length + len(ids))
        self.length += len(ids)
        pages = torch.tensor(self.pages)
        batch = Batch(
            input_ids=torch.tensor(ids),
            positions=positions,
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            slot_mapping=pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
            page_tables=pages[None].to(torch.int32).contiguous(),
            seq_lens=torch.tensor([self.length], dtype=torch.int32),
            logits_indices=torch.arange(len(ids)),
            caches=self.caches,
        )
        return self.model.logits(self.model.forward(batch)).clone()


SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "one_kv_head": {"num_key_value_heads": 1},
    "no_grouping": {"num_key_value_heads": 4},
    "head_dim_128": {"head_dim": 128},
    "yarn": {"rope_parameters": YARN},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str) -> None:
    theirs, ours, config = build(**SHAPES[shape])
    ids = torch.randint(0, 160, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits[0]
        got = Session(ours, config).feed(ids[0].tolist())
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("shape", ["tied", "untied", "yarn"])
def test_greedy_tokens_equal_transformers(shape: str) -> None:
    theirs, ours, config = build(**SHAPES[shape])
    prompt = torch.randint(0, 160, (1, 70), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, 70:
        ]
        session = Session(ours, config)
        logits = session.feed(prompt[0].tolist())[-1]
        got = []
        for _ in range(64):
            got.append(int(logits.argmax()))
            logits = session.feed([got[-1]])[-1]
    assert got == expected.tolist()


@pytest.mark.parametrize("chunk", [1, 3, 63, 64, 65])
def test_chunked_prefill_equals_whole(chunk: int) -> None:
    _, ours, config = build()
    ids = torch.randint(0, 160, (140,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        whole = Session(ours, config).feed(ids)
        session = Session(ours, config)
        parts = torch.cat([session.feed(ids[i : i + chunk]) for i in range(0, len(ids), chunk)])
    assert (parts - whole).abs().max() < 1e-5


def test_the_comparison_can_fail() -> None:
    theirs, ours, config = build()
    ours.layers[0].attention._q_norm.weight.mul_(1.01)
    ids = torch.randint(0, 160, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (Session(ours, config).feed(ids[0].tolist()) - theirs(ids).logits[0]).abs().max()
    assert difference > 1e-4
