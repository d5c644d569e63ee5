"""The gated feed-forward block: SwiGLU (Shazeer, 2020)."""

from __future__ import annotations

import torch

from .linear import Linear
from .norm import RMSNorm
from .weight import ParameterSlot


class GatedMLP:
    """``x + down(silu(gate(norm(x))) * up(norm(x)))``."""

    def __init__(self, prefix: str, hidden_size: int, intermediate_size: int, device: str = "cpu") -> None:
        self._gate_up = Linear(
            [(f"{prefix}.gate_proj.weight", intermediate_size), (f"{prefix}.up_proj.weight", intermediate_size)],
            hidden_size,
            device,
        )
        self._down = Linear([(f"{prefix}.down_proj.weight", hidden_size)], intermediate_size, device)

    def slots(self) -> dict[str, ParameterSlot]:
        return self._gate_up.slots() | self._down.slots()

    def __call__(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Adds the block's output to ``x`` [T, hidden_size] in place and returns it."""
        return self._down(self._gate_up(x, norm=norm, activation="silu_mul"), residual=x)
