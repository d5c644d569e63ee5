"""RMSNorm, a pair of numbers that the op behind it applies: on its own it is never a pass over memory."""

from __future__ import annotations

import torch

from .weight import FloatParameter, ParameterSlot


class RMSNorm:
    """``w * x / sqrt(mean(x^2) + eps)``. ``weight`` is [size] float32; where HuggingFace has ``1 + w``, it is that sum."""

    def __init__(self, name: str, size: int, eps: float, device: str = "cpu") -> None:
        self._name = name
        self._parameter = FloatParameter((size,), device)
        self.eps = eps

    @property
    def weight(self) -> torch.Tensor:
        return self._parameter.get()

    def slots(self) -> dict[str, ParameterSlot]:
        return {self._name: self._parameter}
