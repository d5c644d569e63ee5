"""``causal_conv1d`` on a CUDA device: ``csrc/cuda/causal_conv1d.cu``, one launch for prompts and for decode steps."""

from __future__ import annotations

import torch

from .. import cuda
from ..packed_sequences import address_of, row_stride

OP = "causal_conv1d"


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    conv_state: torch.Tensor,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """See :func:`helexa_engine.ops.causal_conv1d.reference.causal_conv1d`; 2 to 8 taps. However a sequence is cut, outputs
    and state are equal bit for bit.

    Slots and borders lie on the device and are taken on trust: checking them would wait for it. Tokens behind the last border, as
    a padded step has them, belong to no sequence: their rows hold anything.

    Raises:
        ValueError: a tensor of another shape, dtype or device.
    """
    num_tokens, channels = x.shape
    taps, num_slots, num_sequences = weight.shape[-1], conv_state.shape[0], state_slots.shape[0]
    stride = row_stride(OP, "x", x, (num_tokens, channels))
    pointers = (
        address_of(OP, "weight", weight, torch.float32, (channels, taps), x),
        address_of(OP, "conv_state", conv_state, torch.float32, (num_slots, taps - 1, channels), x),
        address_of(OP, "state_slots", state_slots, torch.int32, (num_sequences,), x),
        address_of(OP, "cu_seqlens", cu_seqlens, torch.int32, (num_sequences + 1,), x),
    )
    out = torch.empty((num_tokens, channels), dtype=torch.float32, device=x.device)
    if num_tokens and num_sequences:
        cuda.require_kernels().causal_conv1d(
            x.data_ptr(), stride, pointers[0], channels, taps, *pointers[1:], num_sequences, out.data_ptr(), num_tokens,
            cuda.stream(x),
        )  # fmt: skip
    return out
