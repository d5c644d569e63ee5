"""Rotary position embedding tables (Su et al., 2021) with the scaling variants that Qwen3 ships (YaRN: Peng et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedCheckpoint


def rotary_table(
    rotary_dim: int,
    max_positions: int,
    theta: float,
    scaling: Mapping[str, Any] | None = None,
    *,
    where: str = "config: rope_scaling",
) -> torch.Tensor:
    """cos | sin of every position, [max_positions, rotary_dim] float32: first half cos, second half sin of ``rotary_dim / 2`` angles.

    Angles are computed in float32 as HuggingFace transformers does, so that long positions agree to the last bit.

    Args:
        scaling: HuggingFace's ``rope_scaling``: None, ``default``, ``linear`` (``factor``) or ``yarn`` (``factor``,
            ``original_max_position_embeddings``, optional ``attention_factor``, ``beta_fast``, ``beta_slow``, ``truncate``).

    Raises:
        UnsupportedCheckpoint: another kind of scaling, or a missing or bad factor.
    """
    kind = "default" if scaling is None else str(scaling.get("rope_type") or scaling.get("type") or "default")
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim
    inverse = 1.0 / (theta**steps)
    amplitude = 1.0
    if kind == "linear":
        inverse = inverse / _number(scaling, "factor", where)
    elif kind == "yarn":
        inverse, amplitude = _yarn(inverse, rotary_dim, theta, scaling, where)
    elif kind != "default":
        raise UnsupportedCheckpoint(f"rope scaling {kind!r} is not supported; expected default, linear or yarn", where)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inverse[None, :]
    return torch.cat([angles.cos() * amplitude, angles.sin() * amplitude], dim=-1).contiguous()


def _number(scaling: Mapping[str, Any] | None, key: str, where: str) -> float:
    value = (scaling or {}).get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise UnsupportedCheckpoint(f"{key}: expected a positive number, got {value!r}", where)
    return float(value)


def _yarn(
    inverse: torch.Tensor, rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None, where: str
) -> tuple[torch.Tensor, float]:
    """Scaled inverse frequencies and the amplitude of cos and sin."""
    scaling = scaling or {}
    factor = _number(scaling, "factor", where)
    original = _number(scaling, "original_max_position_embeddings", where)
    beta_fast, beta_slow = float(scaling.get("beta_fast") or 32.0), float(scaling.get("beta_slow") or 1.0)
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0

    def dim_of(rotations: float) -> float:
        """The pair that turns ``rotations`` times over the original context."""
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(beta_fast), dim_of(beta_slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (inverse / factor) * ramp + inverse * (1 - ramp), float(amplitude)
