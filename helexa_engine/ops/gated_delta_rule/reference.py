"""The twin of ``gated_delta_rule`` in plain PyTorch: the recurrence, token by token.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464); gates and norms as in the Qwen3-Next and Qwen3.5
models of transformers.
"""

from __future__ import annotations

import torch

from ..packed_sequences import check_packed_sequences

L2_EPS = 1e-6


def l2_norm(x: torch.Tensor) -> torch.Tensor:
    """``x / sqrt(sum x^2 + 1e-6)`` over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """``log(1 + e^x)`` in the form that neither overflows for large x nor loses small ones."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def key_head_of(num_k_heads: int, num_v_heads: int, *, tiled: bool) -> torch.Tensor:
    """[V] int64: the key head that each value head reads; tiled (GGUF of Qwen3.5): j mod K, else grouped: j div (V / K)."""
    heads = torch.arange(num_v_heads)
    return heads % num_k_heads if tiled else heads // (num_v_heads // num_k_heads)


def recurrent(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule of one sequence, by its definition: the state decays, learns what the key should have read, and is
    read by the query.

    Args:
        q, k: [T, V, Dk], normalised, q scaled.
        v: [T, V, Dv].
        g: [T, V], log of the decay, at most 0.
        beta: [T, V], 0 to 1.
        state: [V, Dk, Dv].

    Returns:
        The outputs [T, V, Dv] and the state after the last token.
    """
    out = torch.empty_like(v)
    for t in range(q.shape[0]):
        state = state * g[t].exp()[:, None, None]
        read = (state * k[t][:, :, None]).sum(1)
        state = state + k[t][:, :, None] * (beta[t][:, None] * (v[t] - read))[:, None, :]
        out[t] = (state * q[t][:, :, None]).sum(1)
    return out, state


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
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``RMSNorm(o) * norm_weight * SiLU(z)`` of the delta rule's outputs ``o``.

    Args:
        qkv: [T, 2 * K * Dk + V * Dv] float32, rows q | k | v, what ``causal_conv1d`` gives.
        z: [T, V * Dv] float32; like ``b`` and ``a`` it may be a slice of columns of wider rows.
        b: [T, V] float32; ``beta = sigmoid(b)``.
        a: [T, V] float32; ``g = a_coefficient * softplus(a + dt_bias)``.
        a_coefficient: [V] float32, ``-exp(A_log)``.
        dt_bias: [V] float32.
        norm_weight: [Dv] float32.
        eps: of the RMSNorm (that of the L2 norm is 1e-6 always).
        recurrent_state: [num_slots, V, Dk, Dv] float32, written in place: of value head j, the matrix that a key (rows) maps
            to a value (columns, contiguous). The runner zeroes a slot when a sequence starts.
        state_slots: [N] int32, the slot of each sequence.
        cu_seqlens: [N+1] int32, where each sequence begins.
        num_k_heads, num_v_heads: K and V, a multiple of K.
        tiled: whether value head j reads key head ``j % K``, else ``j // (V // K)``.
        compute_dtype: dtype of every step; between calls the state has its own dtype.

    Returns:
        [T, V * Dv] in ``compute_dtype``.

    Raises:
        ValueError: shapes that do not fit each other, a slot out of range or used twice; nothing is written then.
    """
    num_tokens = qkv.shape[0]
    num_slots, _, head_k_dim, head_v_dim = recurrent_state.shape
    if num_k_heads < 1 or num_v_heads < 1 or num_v_heads % num_k_heads:
        raise ValueError(
            f"gated_delta_rule: num_v_heads: expected a multiple of {num_k_heads} key heads, got {num_v_heads}"
        )
    key_dim, value_dim = num_k_heads * head_k_dim, num_v_heads * head_v_dim
    for name, tensor, shape in (
        ("recurrent_state", recurrent_state, (num_slots, num_v_heads, head_k_dim, head_v_dim)),
        ("qkv", qkv, (num_tokens, 2 * key_dim + value_dim)),
        ("z", z, (num_tokens, value_dim)),
        ("b", b, (num_tokens, num_v_heads)),
        ("a", a, (num_tokens, num_v_heads)),
        ("a_coefficient", a_coefficient, (num_v_heads,)),
        ("dt_bias", dt_bias, (num_v_heads,)),
        ("norm_weight", norm_weight, (head_v_dim,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"gated_delta_rule: {name}: expected {list(shape)}, got {list(tensor.shape)}")
    sequences = check_packed_sequences("gated_delta_rule", cu_seqlens, state_slots, num_tokens, num_slots)

    q, k, v = torch.split(qkv.to(compute_dtype), [key_dim, key_dim, value_dim], dim=1)
    key_heads = key_head_of(num_k_heads, num_v_heads, tiled=tiled).to(qkv.device)
    q = l2_norm(q.reshape(num_tokens, num_k_heads, head_k_dim))[:, key_heads] * head_k_dim**-0.5
    k = l2_norm(k.reshape(num_tokens, num_k_heads, head_k_dim))[:, key_heads]
    v = v.reshape(num_tokens, num_v_heads, head_v_dim)
    beta = torch.sigmoid(b.to(compute_dtype))
    g = a_coefficient.to(compute_dtype) * softplus(a.to(compute_dtype) + dt_bias.to(compute_dtype))

    out = torch.empty_like(v)
    for begin, end, slot in sequences:
        tokens = slice(begin, end)
        state = recurrent_state[slot].to(compute_dtype)
        out[tokens], state = recurrent(q[tokens], k[tokens], v[tokens], g[tokens], beta[tokens], state)
        recurrent_state[slot] = state.to(recurrent_state.dtype)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps) * norm_weight.to(compute_dtype)
    gate = z.to(compute_dtype).reshape(num_tokens, num_v_heads, head_v_dim)
    return (out * gate * torch.sigmoid(gate)).reshape(num_tokens, value_dim)
