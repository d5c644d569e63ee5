"""The twin of ``causal_conv1d`` in plain PyTorch."""

from __future__ import annotations

import torch

from ..packed_sequences import check_packed_sequences


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    conv_state: torch.Tensor,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``SiLU(sum over taps j of weight[:, j] * input[t - (taps - 1) + j])``, each channel for itself.

    Inputs before a sequence's first token of this call come from its state, which then takes the last ``taps - 1`` inputs:
    a sequence may be cut anywhere. The runner zeroes a slot when a sequence starts.

    Args:
        x: [T, C] float32; may be a slice of columns of wider rows.
        weight: [C, taps] float32; the last tap is the current token's. Released models have 4 taps.
        conv_state: [num_slots, taps - 1, C] float32, the inputs before this call, oldest first; written in place.
        state_slots: [N] int32, the slot of each sequence.
        cu_seqlens: [N+1] int32, where each sequence begins in ``x``.
        compute_dtype: dtype of products and sums; the state keeps its own.

    Returns:
        [T, C] in ``compute_dtype``.

    Raises:
        ValueError: shapes that do not fit each other, a slot out of range or used twice; nothing is written then.
    """
    num_tokens, channels = x.shape
    taps = weight.shape[1]
    if weight.shape[0] != channels:
        raise ValueError(f"causal_conv1d: weight: expected [{channels}, taps], got {list(weight.shape)}")
    if conv_state.shape[1:] != (taps - 1, channels):
        raise ValueError(
            f"causal_conv1d: conv_state: expected [num_slots, {taps - 1}, {channels}], got {list(conv_state.shape)}"
        )
    sequences = check_packed_sequences("causal_conv1d", cu_seqlens, state_slots, num_tokens, conv_state.shape[0])
    out = torch.empty((num_tokens, channels), dtype=compute_dtype, device=x.device)
    columns = weight.to(compute_dtype).unbind(1)
    for begin, end, slot in sequences:
        inputs = torch.cat([conv_state[slot], x[begin:end].to(conv_state.dtype)])  # [taps - 1 + length, C]
        conv_state[slot] = inputs[inputs.shape[0] - (taps - 1) :]
        inputs = inputs.to(compute_dtype)
        total = torch.zeros((end - begin, channels), dtype=compute_dtype, device=x.device)
        for j, column in enumerate(columns):
            total = total + column * inputs[j : j + end - begin]
        out[begin:end] = total * torch.sigmoid(total)
    return out
