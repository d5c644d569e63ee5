"""``causal_conv1d`` in Triton: outputs by blocks of tokens and channels, then the new states."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..packed_sequences import row_stride

OP = "causal_conv1d"
BLOCK_TOKENS, BLOCK_CHANNELS = 16, 64


@triton.jit
def _convolve(
    x, x_stride, weight, conv_state, state_slots, cu_seqlens, out, channels,
    TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Outputs of one block of a sequence's tokens; a block beyond the sequence's end has nothing to do."""
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1) - begin
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(1) * BLOCK_T < length:
        slot = tl.load(state_slots + sequence).to(tl.int64)
        c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        here = (tokens < length)[:, None] & (c < channels)[None, :]
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for j in tl.static_range(TAPS):
            source = tokens - (TAPS - 1) + j
            now = here & (source >= 0)[:, None]
            before = here & (source < 0)[:, None]
            rows = (begin + source)[:, None] * x_stride + c[None, :]
            state_rows = (slot * (TAPS - 1) + TAPS - 1 + source)[:, None] * channels + c[None, :]
            inputs = tl.load(x + rows, mask=now, other=0.0) + tl.load(conv_state + state_rows, mask=before, other=0.0)
            total += tl.load(weight + c * TAPS + j, mask=c < channels, other=0.0)[None, :] * inputs
        result = total / (1.0 + tl.exp(-total))
        tl.store(out + (begin + tokens)[:, None] * channels + c[None, :], result, mask=here)


@triton.jit
def _update_state(
    x, x_stride, conv_state, state_slots, cu_seqlens, channels, TAPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The last ``TAPS - 1`` inputs, oldest first. Rows move towards the oldest, so each is read before it is overwritten."""
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1) - begin
    state = conv_state + tl.load(state_slots + sequence).to(tl.int64) * (TAPS - 1) * channels
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for j in tl.static_range(TAPS - 1):
        source = length - (TAPS - 1) + j + tl.zeros((BLOCK_C,), tl.int64)
        now = (c < channels) & (source >= 0)
        before = (c < channels) & (source < 0)
        inputs = tl.load(x + (begin + source) * x_stride + c, mask=now, other=0.0)
        inputs += tl.load(state + (TAPS - 1 + source) * channels + c, mask=before, other=0.0)
        tl.store(state + j * channels + c, inputs, mask=c < channels)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    conv_state: torch.Tensor,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """See :func:`helexa_engine.ops.causal_conv1d.reference.causal_conv1d`. Slots and borders lie on the device and are taken
    on trust: checking them would wait for it.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    num_tokens, channels = x.shape
    taps = weight.shape[1]
    stride = row_stride(OP, "x", x, (num_tokens, channels))
    for name, tensor, shape in (
        ("weight", weight, (channels, taps)),
        ("conv_state", conv_state, (conv_state.shape[0], taps - 1, channels)),
        ("cu_seqlens", cu_seqlens, (state_slots.shape[0] + 1,)),
    ):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{OP}: {name}: expected contiguous {list(shape)}, got {list(tensor.shape)}")
    out = torch.empty((num_tokens, channels), dtype=torch.float32, device=x.device)
    if num_tokens:
        sequences, blocks = state_slots.shape[0], triton.cdiv(channels, BLOCK_CHANNELS)
        _convolve[(sequences, triton.cdiv(num_tokens, BLOCK_TOKENS), blocks)](
            x, stride, weight, conv_state, state_slots, cu_seqlens, out, channels,
            TAPS=taps, BLOCK_T=BLOCK_TOKENS, BLOCK_C=BLOCK_CHANNELS,
        )  # fmt: skip
        _update_state[(sequences, blocks)](
            x, stride, conv_state, state_slots, cu_seqlens, channels, TAPS=taps, BLOCK_C=BLOCK_CHANNELS
        )
    return out
