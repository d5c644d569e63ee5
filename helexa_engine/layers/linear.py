"""Matrices: one or several with a common input, side by side, each in the quant type its checkpoint gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..ops.quant_matmul import quant_matmul
from .norm import RMSNorm
from .weight import ParameterSlot, RawTensor


@dataclass(slots=True, eq=False)
class MatrixParameter:
    """A matrix [rows, cols] packed for the matmul that was chosen. ``packed`` is that implementation's own object.

    ``exact``: see :func:`..ops.quant_matmul.reference.quant_matmul`; set before the first use.
    """

    rows: int
    cols: int
    matmul: Any
    packed: Any = None
    quant_type: str = ""
    exact: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.cols)

    def load(self, raw: RawTensor) -> None:
        scale = raw.scales[0] if raw.scales else 1.0
        self.packed = self.matmul.pack(raw.quant_type, raw.data, self.rows, self.cols, scale=scale)
        self.quant_type = str(raw.quant_type)


class Linear:
    """``[x @ w.T for w in parts]`` side by side, with RMSNorm in front and an epilogue behind in the same call.

    Args:
        parts: (HuggingFace parameter name, output features) of each matrix, in output order.
        in_features: K, common to all.
        device: where it runs.
    """

    def __init__(self, parts: Sequence[tuple[str, int]], in_features: int, device: str = "cpu") -> None:
        self._matmul = quant_matmul.choose(device, in_features=in_features)
        self._parameters = {name: MatrixParameter(rows, in_features, self._matmul) for name, rows in parts}
        self._packed: list[Any] | None = None
        self._exact = False

    @classmethod
    def tied(cls, parameter: MatrixParameter) -> Linear:
        """A linear layer over a matrix that somebody else loads (a head tied to the embedding)."""
        linear = cls.__new__(cls)
        linear._matmul = parameter.matmul
        linear._parameters = {"tied": parameter}
        linear._packed = None
        linear._exact = False
        return linear

    def slots(self) -> dict[str, ParameterSlot]:
        return dict(self._parameters)

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: RMSNorm | None = None,
        activation: Literal["silu_mul"] | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` [T, in_features] float32 -> [T, sum of output features] (half of it with ``silu_mul``).

        ``residual`` is added to in place and returned.
        """
        if self._packed is None:
            self._packed = [parameter.packed for parameter in self._parameters.values()]
            assert all(p is not None for p in self._packed), "the checkpoint was not loaded"
            self._exact = any(parameter.exact for parameter in self._parameters.values())
        out: torch.Tensor = self._matmul.quant_matmul(
            x,
            self._packed,
            norm_weight=norm.weight if norm else None,
            norm_eps=norm.eps if norm else 0.0,
            activation=activation,
            residual=residual,
            exact=self._exact,
        )
        return out
