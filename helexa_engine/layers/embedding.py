"""Token embedding: rows read from the packed table without expanding it."""

from __future__ import annotations

import torch

from ..ops.quant_embedding import quant_embedding
from ..ops.quant_matmul import quant_matmul
from .linear import MatrixParameter
from .weight import ParameterSlot


class Embedding:
    """A table [vocab_size, hidden_size]; ``parameter`` can serve as a tied head."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, device: str = "cpu") -> None:
        matmul = quant_matmul.choose(device, in_features=hidden_size)
        self._name = name
        self._embedding = quant_embedding.choose(device, packed_by=matmul.__name__.rpartition(".")[2])
        self.parameter = MatrixParameter(vocab_size, hidden_size, matmul)

    def slots(self) -> dict[str, ParameterSlot]:
        return {self._name: self.parameter}

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``input_ids`` [T] int64 -> [T, hidden_size] float32."""
        out: torch.Tensor = self._embedding.quant_embedding(input_ids, self.parameter.packed)
        return out
