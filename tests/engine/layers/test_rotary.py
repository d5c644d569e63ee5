"""Rotary tables against HuggingFace transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from helexa_engine.errors import UnsupportedCheckpoint
from helexa_engine.layers.rotary import rotary_table
from helexa_engine.ops.paged_attention.reference import rotate

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": YARN,
    "yarn_with_betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn_with_attention_factor": YARN | {"attention_factor": 0.8},
    "yarn_without_truncation": YARN | {"truncate": False},
    "yarn_that_shrinks": YARN | {"factor": 0.5},
}


def theirs(scaling: dict[str, Any] | None, head_dim: int, theta: float) -> Qwen3RotaryEmbedding:
    parameters = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
    return Qwen3RotaryEmbedding(
        Qwen3Config(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters)
    )


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_equals_transformers_bit_for_bit(name: str, head_dim: int) -> None:
    """Also at position 40,000, where a wrong frequency has turned many times."""
    positions = torch.tensor([0, 1, 2, 63, 64, 4095, 40000])
    cos, sin = theirs(VARIANTS[name], head_dim, 1e6)(torch.zeros(1), positions[None])
    table = rotary_table(head_dim, 40001, 1e6, VARIANTS[name])
    assert table.shape == (40001, head_dim) and table.dtype == torch.float32
    half = head_dim // 2
    assert torch.equal(table[positions, :half], cos[0, :, :half])
    assert torch.equal(table[positions, half:], sin[0, :, half:])


def test_variants_differ() -> None:
    """What the test above tells apart."""
    tables = [rotary_table(64, 4096, 1e6, scaling)[4095] for scaling in VARIANTS.values()]
    for i, table in enumerate(tables):
        assert all((table - other).abs().max() > 1e-3 for other in tables[:i])


def test_rotation_is_half_split_over_the_whole_head() -> None:
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(7, 12)
    cos, sin = theirs(None, 64, 1e4)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)
    assert (rotate(x, rotary_table(64, 12, 1e4)[positions]) - expected[0]).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope"}, "longrope"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 4096}, "factor"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        (YARN | {"beta_fast": "many"}, "beta_fast"),
        (YARN | {"attention_factor": -1}, "attention_factor"),
        ("yarn", "expected an object"),
    ],
    ids=str,
)
def test_bad_scaling_is_named(scaling: Any, message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        rotary_table(64, 16, 1e4, scaling)


def test_a_base_without_a_logarithm() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="rope_theta"):
        rotary_table(64, 16, 1.0, YARN)
