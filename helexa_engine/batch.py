"""What one forward pass works on. Built by the model runner, passed down as an argument; there is no global context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .cache.spec import LayerCache


@dataclass(slots=True)
class Batch:
    """``N`` sequences with ``T`` new tokens in all, packed one after the other.

    Attributes:
        input_ids: [T] int64, the new tokens.
        positions: [T] int64, position of each new token in its sequence.
        cu_seqlens: [N+1] int32, new tokens of sequence i are ``cu_seqlens[i]:cu_seqlens[i+1]``.
        slot_mapping: [T] int64, where each new token's key and value go: ``page * page_size + offset``.
        page_tables: [N, P] int32, pages of each sequence in order; entries past its last page are 0 and never read.
        seq_lens: [N] int32, length of each sequence including its new tokens.
        state_slots: [N] int32, where each sequence's recurrent states are; no two alike. Not read by models without any.
        caches: one entry a layer.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    slot_mapping: torch.Tensor
    page_tables: torch.Tensor
    seq_lens: torch.Tensor
    state_slots: torch.Tensor
    caches: list[LayerCache] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.seq_lens.shape[0])
