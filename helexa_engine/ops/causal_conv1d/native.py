"""``causal_conv1d`` in the native core: see ``csrc/cpu/causal_conv1d.h``."""

from __future__ import annotations

import torch

from ..packed_sequences import address_of, row_stride
from ..registry import require_native

OP = "causal_conv1d"
_native = require_native()


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    conv_state: torch.Tensor,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """See :func:`helexa_engine.ops.causal_conv1d.reference.causal_conv1d`; 2 to 8 taps. However a sequence is cut, outputs
    and state are equal bit for bit.

    Raises:
        ValueError: a tensor of another shape or dtype, a slot out of range or used twice. Nothing is written then.
    """
    num_tokens, channels = x.shape
    taps, num_slots, num_sequences = weight.shape[-1], conv_state.shape[0], state_slots.shape[0]
    stride = row_stride(OP, "x", x, (num_tokens, channels))
    out = torch.empty((num_tokens, channels), dtype=torch.float32)
    pointers = (
        address_of(OP, "weight", weight, torch.float32, (channels, taps)),
        address_of(OP, "conv_state", conv_state, torch.float32, (num_slots, taps - 1, channels)),
        address_of(OP, "state_slots", state_slots, torch.int32, (num_sequences,)),
        address_of(OP, "cu_seqlens", cu_seqlens, torch.int32, (num_sequences + 1,)),
    )
    if num_tokens:
        _native.causal_conv1d(
            x.data_ptr(), stride, pointers[0], channels, taps, pointers[1], num_slots, pointers[2], pointers[3],
            num_sequences, out.data_ptr(), num_tokens,
        )  # fmt: skip
    return out
