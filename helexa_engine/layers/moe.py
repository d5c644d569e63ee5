"""The sparse feed-forward block: a router, many small gated experts of which a token takes a few, and perhaps one that all take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..ops.moe_matmul import Experts, moe_matmul
from .norm import RMSNorm
from .weight import FloatParameter, ParameterSlot, RawTensor


@dataclass(slots=True, eq=False)
class ExpertsParameter:
    """One matrix of every expert, [experts, rows, cols] (``experts`` 0: a single [rows, cols]), packed for the op that was chosen."""

    experts: int
    rows: int
    cols: int
    moe: Any
    packed: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.experts, self.rows, self.cols) if self.experts else (self.rows, self.cols)

    def load(self, raw: RawTensor) -> None:
        self._take(raw, mapped=False)

    def map(self, raw: RawTensor) -> None:
        """Like :meth:`load`, but the weights stay where ``raw.data`` is, which is kept alive, and are packed as they are used."""
        self._take(raw, mapped=True)

    def _take(self, raw: RawTensor, *, mapped: bool) -> None:
        data = raw.members() if self.experts else raw.data.reshape(1, -1)
        scales = raw.scales * (self.experts // len(raw.scales)) if self.experts and raw.scales else raw.scales
        self.packed = self.moe.pack_experts(raw.quant_type, data, self.rows, self.cols, scales=scales, mapped=mapped)


class SparseMoe:
    """``x + sum over the top_k experts of weight * down(silu(gate(y)) * up(y))`` with ``y = norm(x)``; see :mod:`..ops.moe_matmul`.

    Args:
        prefix: HuggingFace parameter prefix, ``model.layers.0.mlp``.
        shared_width: width of the expert that every token takes, times the sigmoid of its own gate; 0 without one.
        norm_topk_prob: whether the weights of the chosen experts are divided by their sum.
    """

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        *,
        num_experts: int,
        top_k: int,
        width: int,
        shared_width: int = 0,
        norm_topk_prob: bool = True,
        device: str = "cpu",
    ) -> None:
        self._op = moe_matmul.choose(device, hidden_size=hidden_size)
        self._top_k = top_k
        self._norm_topk_prob = norm_topk_prob
        self._router_name, self._shared_gate_name = f"{prefix}.gate.weight", f"{prefix}.shared_expert_gate.weight"
        self._router: Any = None
        self._router_parameter = FloatParameter((num_experts, hidden_size), device)
        self._packed: Experts | None = None
        self._packed_shared: Experts | None = None
        self._experts = self._parameters(num_experts, width, hidden_size)
        self._names = [f"{prefix}.experts.{part}_proj.weight" for part in ("gate", "up", "down")]
        self._shared: Experts | None = None
        if shared_width:
            self._shared_gate = FloatParameter((1, hidden_size), device)
            self._shared = self._parameters(0, shared_width, hidden_size)
            self._shared_names = [f"{prefix}.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")]

    def _parameters(self, experts: int, width: int, hidden: int) -> Experts:
        return Experts(
            ExpertsParameter(experts, width, hidden, self._op),
            ExpertsParameter(experts, width, hidden, self._op),
            ExpertsParameter(experts, hidden, width, self._op),
        )

    def slots(self) -> dict[str, ParameterSlot]:
        slots: dict[str, ParameterSlot] = {self._router_name: self._router_parameter}
        slots |= zip(self._names, self._experts, strict=True)
        if self._shared is not None:
            slots[self._shared_gate_name] = self._shared_gate
            slots |= zip(self._shared_names, self._shared, strict=True)
        return slots

    def __call__(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Adds the block's output to ``x`` [T, hidden_size] in place and returns it."""
        if self._router is None:
            self._pack()
        out: torch.Tensor = self._op.moe_matmul(
            x,
            self._router,
            self._packed,
            self._packed_shared,
            norm_weight=norm.weight,
            norm_eps=norm.eps,
            top_k=self._top_k,
            norm_topk_prob=self._norm_topk_prob,
        )
        return out

    def _pack(self) -> None:
        """The op's own form of what was loaded. The router is packed here, from two tensors; both then go."""
        self._packed = Experts(*(parameter.packed for parameter in self._experts))
        self._packed_shared = Experts(*(p.packed for p in self._shared)) if self._shared is not None else None
        assert all(p is not None for p in (*self._packed, *(self._packed_shared or ()))), (
            "the checkpoint was not loaded"
        )
        gate = self._shared_gate.get()[0] if self._shared is not None else None
        self._router = self._op.pack_router(self._router_parameter.get(), gate)
        self._router_parameter.value = None
