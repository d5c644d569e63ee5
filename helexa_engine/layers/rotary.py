"""Rotary position embedding tables (Su et al., 2021) with the scaling variants that Qwen3 ships (YaRN: Peng et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .rope_scaling import RopeScaling


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
        scaling: see :meth:`.rope_scaling.RopeScaling.from_config`.
        where: names the checkpoint in errors.

    Raises:
        UnsupportedCheckpoint: another kind of scaling, or a missing or bad number.
    """
    checked = RopeScaling.from_config(theta, scaling, where)
    wavelengths = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim)
    if checked.kind == "linear":
        return 1.0 / wavelengths / checked.factor, 1.0
    if checked.kind == "yarn":
        return _yarn(wavelengths, rotary_dim, theta, checked), checked.amplitude
    return 1.0 / wavelengths, 1.0


def _yarn(wavelengths: torch.Tensor, rotary_dim: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """Scaled inverse frequencies."""

    def dim_of(rotations: float) -> float:
        """The pair that turns ``rotations`` times over the original context."""
        return rotary_dim * math.log(scaling.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    # The share of the unscaled frequency. In this order of operations the table is transformers' to the bit.
    kept = 1 - ramp
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
