"""The demo's architecture: the Qwen3.5 layout in small, and a forward pass of it that trains on packed rows.

The parameters are those of HuggingFace's ``Qwen3_5ForCausalLM``; only the computation is written anew, because theirs cannot keep
conversations in one row apart. Here no convolution tap, no recurrent state and no attention crosses from one segment to the next.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from . import tokenizer

CHUNK = 64  #: tokens that the delta rule handles with matrix products at once


def config() -> Qwen3_5TextConfig:
    """8 layers, 6 of them delta nets, 5.8 million parameters; every matrix has rows of a multiple of 256, so all quant types are legal.

    Two value heads share a key head, so that files of this model need the reordering of heads that the large ones need.
    """
    return Qwen3_5TextConfig(  # type: ignore[call-arg]
        vocab_size=tokenizer.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        full_attention_interval=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.VOCAB_SIZE - len(tokenizer.MARKERS) - 1,
        pad_token_id=tokenizer.VOCAB_SIZE - len(tokenizer.MARKERS) - 3,
    )


def new_model() -> Qwen3_5ForCausalLM:
    """Random weights. The decays of a layer's heads start at time constants from 8 to 512 tokens rather than at almost none."""
    model = Qwen3_5ForCausalLM(config())
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.block_type == "linear_attention":
                net = layer.linear_attn
                per_token = 1 / torch.logspace(3, 9, net.num_v_heads, base=2)
                net.A_log.zero_()
                net.dt_bias.copy_(torch.log(torch.expm1(per_token)))
    return model


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, segments: Tensor, chunk: int = CHUNK
) -> Tensor:
    """The gated delta rule over packed rows, in chunks.

    Args:
        query, key: [B, T, V, D], normalised, the query scaled; T is a multiple of ``chunk``.
        value: [B, T, V, D].
        g, beta: [B, T, V]: logarithm of the decay, at most 0, and the rate of writing.
        segments: [B, T], equal within a segment; each segment is one run of tokens.

    Returns:
        [B, T, V, D]: what every token reads from its own segment's state. The state of a new segment is zero.
    """
    rows, length, heads, _ = value.shape
    n = length // chunk

    def chunked(x: Tensor) -> Tensor:  # [B, T, V, ...] -> [n, B * V, chunk, ...]
        x = x.reshape(rows, n, chunk, heads, -1).permute(1, 0, 3, 2, 4)
        return x.reshape(n, rows * heads, chunk, -1)

    q, k, v = chunked(query), chunked(key), chunked(value)
    beta, total = chunked(beta), chunked(g).cumsum(2)  # [n, B * V, chunk, 1]
    names = segments.reshape(rows, n, chunk).permute(1, 0, 2)  # [n, B, chunk]
    last = names[:, :, -1:]
    before = torch.cat([torch.full_like(last[:1], -1), last[:-1]])  # the segment whose state arrives at the chunk

    def per_head(mask: Tensor) -> Tensor:  # [n, B, chunk or 1] -> [n, B * V, chunk or 1, 1]
        return mask.float().repeat_interleave(heads, dim=1)[..., None]

    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=value.device).tril()
    visible = (causal & (names[..., :, None] == names[..., None, :])).repeat_interleave(heads, dim=1)
    decay = (total - total.transpose(2, 3)).masked_fill(~visible, float("-inf")).exp()  # [n, B * V, chunk, chunk]
    k_beta = k * beta
    system = (k_beta @ k.transpose(2, 3)) * decay
    within = (q @ k.transpose(2, 3)) * decay
    reads = total.exp() * per_head(names == before)
    # Both right-hand sides at once: the new values, and the keys that read the arriving state.
    solved = torch.linalg.solve_triangular(
        system, torch.cat([v * beta, k_beta * reads], -1), upper=False, unitriangular=True
    )
    values, k_reads = solved.split([v.shape[-1], k.shape[-1]], -1)
    q_reads = q * reads
    end = total[:, :, -1:]
    k_writes = (k * (end - total).exp() * per_head(names == last)).transpose(2, 3)
    kept = end.exp() * per_head(last == before)

    state = torch.zeros(rows * heads, k.shape[-1], v.shape[-1], device=value.device)
    outputs = []
    for i in range(n):
        new = values[i] - k_reads[i] @ state
        outputs.append(q_reads[i] @ state + within[i] @ new)
        state = state * kept[i] + k_writes[i] @ new
    out = torch.stack(outputs).reshape(n, rows, heads, chunk, -1)
    return out.permute(1, 0, 3, 2, 4).reshape(rows, length, heads, -1)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _delta_net(net: Any, x: Tensor, segments: Tensor) -> Tensor:
    rows, length, _ = x.shape
    qkv = net.in_proj_qkv(x)
    taps = net.conv1d.weight[:, 0]  # [C, kernel]
    mixed = qkv * taps[:, -1]
    for back in range(1, net.conv_kernel_size):
        same = F.pad(segments[:, back:] == segments[:, :-back], (back, 0))[..., None]
        mixed = mixed + F.pad(qkv[:, :-back], (0, 0, back, 0)) * same * taps[:, -1 - back]
    q, k, v = F.silu(mixed).split([net.key_dim, net.key_dim, net.value_dim], -1)  # type: ignore[no-untyped-call]
    share = net.num_v_heads // net.num_k_heads
    q, k = (_unit(t.reshape(rows, length, net.num_k_heads, net.head_k_dim)).repeat_interleave(share, 2) for t in (q, k))
    g = -net.A_log.exp() * F.softplus(net.in_proj_a(x) + net.dt_bias)
    out = gated_delta_rule(
        q * net.head_k_dim**-0.5,
        k,
        v.reshape(rows, length, net.num_v_heads, net.head_v_dim),
        g,
        net.in_proj_b(x).sigmoid(),
        segments,
    )
    z = net.in_proj_z(x).reshape(out.shape)
    out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + net.layer_norm_epsilon) * net.norm.weight * F.silu(z)
    return net.out_proj(out.reshape(rows, length, -1))  # type: ignore[no-any-return]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of the first dimensions of [B, heads, T, D]."""
    width = cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, passed], -1)


def _attention(net: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    rows, length, _ = x.shape
    q, gate = net.q_proj(x).view(rows, length, -1, 2 * net.head_dim).chunk(2, -1)
    k = net.k_norm(net.k_proj(x).view(rows, length, -1, net.head_dim)).transpose(1, 2)
    v = net.v_proj(x).view(rows, length, -1, net.head_dim).transpose(1, 2)
    q = net.q_norm(q).transpose(1, 2)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    k, v = (t.repeat_interleave(net.num_key_value_groups, 1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return net.o_proj((out * gate.sigmoid()).reshape(rows, length, -1))  # type: ignore[no-any-return]


def compile_layers() -> None:
    """Has torch compile the layers' mixers, once for all layers of a kind."""
    global _delta_net, _attention
    _delta_net, _attention = torch.compile(_delta_net), torch.compile(_attention)


def hidden_states(model: Qwen3_5ForCausalLM, ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
    """[B, T, H] behind the final norm, for packed rows: ``ids``, ``positions`` and ``segments`` are [B, T], T a multiple of CHUNK."""
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
    angles = positions[..., None] * model.model.rotary_emb.inv_freq  # the same for all three axes: text
    angles = torch.cat([angles, angles], -1)[:, None]
    cos, sin = angles.cos(), angles.sin()
    x = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        h = layer.input_layernorm(x)
        if layer.block_type == "linear_attention":
            x = x + _delta_net(layer.linear_attn, h, segments)
        else:
            x = x + _attention(layer.self_attn, h, cos, sin, mask)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x)  # type: ignore[no-any-return]
