"""``gated_delta_rule`` in the native core: see ``csrc/cpu/gated_delta_rule.h``."""

from __future__ import annotations

import torch

from ..packed_sequences import address_of, row_stride
from ..registry import require_native

OP = "gated_delta_rule"
_native = require_native()


def gated_delta_rule(
    qkv: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    a_coefficient: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    recurrent_state: torch.Tensor,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool,
) -> torch.Tensor:
    """See :func:`helexa_engine.ops.gated_delta_rule.reference.gated_delta_rule`; head dims are multiples of 16 up to 256.

    A sequence goes through in chunks of 16 tokens from its first token *of this call*, what is left over token by token. So
    a prompt that is cut, or resumed, at multiples of 16 gives the same bits as in one piece; other cuts give the same to
    rounding. What runs beside a sequence never changes a bit of it.

    Raises:
        ValueError: a tensor of another shape or dtype, a slot out of range or used twice. Nothing is written then.
    """
    num_tokens = qkv.shape[0]
    num_slots, _, head_k_dim, head_v_dim = recurrent_state.shape
    num_sequences = state_slots.shape[0]
    value_dim = num_v_heads * head_v_dim
    strides = [
        row_stride(OP, name, tensor, (num_tokens, width))
        for name, tensor, width in (
            ("qkv", qkv, 2 * num_k_heads * head_k_dim + value_dim),
            ("z", z, value_dim),
            ("b", b, num_v_heads),
            ("a", a, num_v_heads),
        )
    ]
    state_shape = (num_slots, num_v_heads, head_k_dim, head_v_dim)
    pointers = (
        address_of(OP, "a_coefficient", a_coefficient, torch.float32, (num_v_heads,)),
        address_of(OP, "dt_bias", dt_bias, torch.float32, (num_v_heads,)),
        address_of(OP, "norm_weight", norm_weight, torch.float32, (head_v_dim,)),
        address_of(OP, "recurrent_state", recurrent_state, torch.float32, state_shape),
        address_of(OP, "state_slots", state_slots, torch.int32, (num_sequences,)),
        address_of(OP, "cu_seqlens", cu_seqlens, torch.int32, (num_sequences + 1,)),
    )
    out = torch.empty((num_tokens, value_dim), dtype=torch.float32)
    if num_tokens:
        _native.gated_delta_rule(
            qkv.data_ptr(), strides[0], z.data_ptr(), strides[1], b.data_ptr(), strides[2], a.data_ptr(), strides[3],
            *pointers[:3], eps, pointers[3], num_slots, *pointers[4:], num_sequences, num_k_heads, num_v_heads,
            head_k_dim, head_v_dim, tiled, out.data_ptr(), num_tokens,
        )  # fmt: skip
    return out
