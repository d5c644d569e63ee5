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

    Angles are computed in float32 as HuggingFace transformers does, so that long positions agree to the last bit. Arguments and
    errors as :func:`inverse_frequencies`.
    """
    inverse, amplitude = inverse_frequencies(rotary_dim, theta, scaling, where=where)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inverse[None, :]
    return torch.cat([angles.cos() * amplitude, angles.sin() * amplitude], dim=-1).contiguous()


def inverse_frequencies(
    rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None, *, where: str
) -> tuple[torch.Tensor, float]:
    """Radians a position of each pair [rotary_dim / 2] float32, and the amplitude of cos and sin.

    Args:
        scaling: HuggingFace's ``rope_scaling``: None, ``default``, ``linear`` (``factor``) or ``yarn`` (``factor``,
            ``original_max_position_embeddings``, optional ``attention_factor``, ``beta_fast``, ``beta_slow``, ``truncate``).
        where: names the checkpoint in errors.

    Raises:
        UnsupportedCheckpoint: another kind of scaling, or a missing or bad number.
    """
    if theta <= 1:
        raise UnsupportedCheckpoint(f"rope_theta: expected a number above 1, got {theta!r}", where)
    if scaling is not None and not isinstance(scaling, Mapping):
        raise UnsupportedCheckpoint(f"rope_scaling: expected an object, got {scaling!r}", where)
    kind = "default" if scaling is None else str(scaling.get("rope_type") or scaling.get("type") or "default")
    wavelengths = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim)
    if kind == "default":
        return 1.0 / wavelengths, 1.0
    if kind == "linear":
        return 1.0 / wavelengths / _number(scaling, "factor", where), 1.0
    if kind == "yarn":
        return _yarn(wavelengths, rotary_dim, theta, scaling, where)
    raise UnsupportedCheckpoint(f"rope scaling {kind!r} is not supported; expected default, linear or yarn", where)


def _number(scaling: Mapping[str, Any] | None, key: str, where: str, default: float | None = None) -> float:
    value = (scaling or {}).get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-9 < value < 1e12:
        raise UnsupportedCheckpoint(f"{key}: expected a number in (1e-9, 1e12), got {value!r}", where)
    return float(value)


def _yarn(
    wavelengths: torch.Tensor, rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None, where: str
) -> tuple[torch.Tensor, float]:
    """Scaled inverse frequencies and the amplitude of cos and sin."""
    scaling = scaling or {}
    factor = _number(scaling, "factor", where)
    original = _number(scaling, "original_max_position_embeddings", where)
    beta_fast, beta_slow = _number(scaling, "beta_fast", where, 32.0), _number(scaling, "beta_slow", where, 1.0)
    amplitude = _number(scaling, "attention_factor", where, 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)

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
    # The share of the unscaled frequency. In this order of operations the table is transformers' to the bit.
    kept = 1 - ramp
    return 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept, amplitude
