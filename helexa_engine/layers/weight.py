"""How a layer says which tensors it wants, and how it takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..ops.cuda import torch_device
from ..quant.dequantize import dequantize
from ..quant.types import QuantType


class RawTensor(Protocol):
    """A tensor as a checkpoint stores it."""

    @property
    def name(self) -> str: ...

    @property
    def quant_type(self) -> QuantType: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """PyTorch's order: [out, in] for a matrix."""

    @property
    def data(self) -> np.ndarray:
        """uint8, as in a GGUF file of this type."""

    @property
    def scales(self) -> tuple[float, ...]:
        """What the values, or the products of a matrix, are multiplied with: none, one, or of a stack one a matrix."""

    def members(self) -> np.ndarray:
        """A stack's matrices, uint8 [matrices, bytes of one]."""


class ParameterSlot(Protocol):
    """A place for one checkpoint tensor. The loader checks ``shape`` and calls :meth:`load` once."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def load(self, raw: RawTensor) -> None: ...


@dataclass(slots=True, eq=False)
class FloatParameter:
    """A vector or a small matrix, kept in float32 whatever the file has, where a model on ``device`` computes."""

    shape: tuple[int, ...]
    device: str = "cpu"
    value: torch.Tensor | None = None

    def load(self, raw: RawTensor) -> None:
        value = torch.from_numpy(np.array(dequantize(raw.quant_type, raw.data, raw.shape)))  # a copy: the file may go
        if raw.scales:
            value *= raw.scales[0]
        self.value = value.to(torch_device(self.device))

    def get(self) -> torch.Tensor:
        assert self.value is not None, "the checkpoint was not loaded"
        return self.value
