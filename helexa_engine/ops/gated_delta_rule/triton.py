"""``gated_delta_rule`` in Triton: chunks of tokens by the chunk form, what is left of a sequence token by token, then the gated
norm. Chunks begin at the sequence's first token of the call and the form depends on the sequence alone, so it gets the same bits
whatever runs beside it, and cut at multiples of a chunk. Products are accurate to float32 (three TF32 passes).

The chunk form is two kernels: one over all chunks at once for what no state takes part in, one that carries the state from
chunk to chunk. Neither spills a register with the tiles of ``tuning.json`` for head dims of 128; tests read that off the machine
code for every architecture. Nothing waits for the device: lengths are read there, and grids come from shapes. Checked under the
interpreter; never run on a card yet."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..packed_sequences import row_stride
from .tuning import Tile, Tuning, tuning_for

OP = "gated_delta_rule"
CHUNK_FROM = 16  # a shorter rest goes token by token


@triton.jit
def _softplus(x):
    """``log(1 + e^x)``; ``log1p`` by Kahan's correction of ``log(1 + e)``."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _key_head(head, K: tl.constexpr, V: tl.constexpr, TILED: tl.constexpr):
    if TILED:
        key_head = head % K
    else:
        key_head = head // (V // K)
    return key_head


@triton.jit
def _tail_length(length, CHUNK: tl.constexpr, CHUNK_FROM: tl.constexpr):
    """Tokens at a sequence's end that are too few for a chunk."""
    rest = length % CHUNK
    return tl.where(rest < CHUNK_FROM, rest, 0)


@triton.jit
def _sequence_of_tile(cu_seqlens, num_sequences, tile, CHUNK: tl.constexpr):
    """The sequence whose chunk a program works on. Those of sequence i begin at tile ``cu_seqlens[i] // CHUNK + i``: none too few
    for any lengths, so a grid of ``T // CHUNK + N`` tiles has them all."""
    low = tile - tile
    high = low + num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(cu_seqlens + middle) // CHUNK + middle <= tile
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def _recurrent(
    qkv, qkv_stride, b, b_stride, a, a_stride, a_coefficient, dt_bias, state, state_slots, cu_seqlens, out,
    K: tl.constexpr, V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, TILED: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, CHUNK_FROM: tl.constexpr,
):  # fmt: skip
    """The last tokens of a sequence, one by one, for a block of columns of one value head; the state stays in registers."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    first = end - _tail_length(end - begin, CHUNK, CHUNK_FROM)
    if first < end:
        key_head = _key_head(head, K, V, TILED)
        dk = tl.arange(0, BLOCK_K)
        dv = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        slot = tl.load(state_slots + sequence).to(tl.int64)
        place = state + (slot * V + head) * DK * DV + dk[:, None] * DV + dv[None, :]
        inside = (dk < DK)[:, None] & (dv < DV)[None, :]
        s = tl.load(place, mask=inside, other=0.0)
        coefficient, bias = tl.load(a_coefficient + head), tl.load(dt_bias + head)
        for t in range(first, end):
            row = qkv + t * qkv_stride
            q = tl.load(row + key_head * DK + dk, mask=dk < DK, other=0.0)
            k = tl.load(row + (K + key_head) * DK + dk, mask=dk < DK, other=0.0)
            v = tl.load(row + 2 * K * DK + head * DV + dv, mask=dv < DV, other=0.0)
            q = q * (DK**-0.5 / tl.sqrt(tl.sum(q * q, 0) + 1e-6))
            k = k / tl.sqrt(tl.sum(k * k, 0) + 1e-6)
            beta = 1.0 / (1.0 + tl.exp(-tl.load(b + t * b_stride + head)))
            g = coefficient * _softplus(tl.load(a + t * a_stride + head) + bias)
            s = s * tl.exp(g)
            delta = beta * (v - tl.sum(s * k[:, None], 0))
            s += k[:, None] * delta[None, :]
            o = tl.sum(s * q[:, None], 0)
            tl.store(out + (t * V + head) * DV + dv, o, mask=dv < DV)
        tl.store(place, s, mask=inside)


@triton.jit(do_not_specialize=["num_sequences"])
def _solve_chunks(
    qkv, qkv_stride, b, b_stride, a, a_stride, a_coefficient, dt_bias, cu_seqlens, num_sequences, solutions, scores, factors,
    K: tl.constexpr, V: tl.constexpr, DK: tl.constexpr, TILED: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_FROM: tl.constexpr,
):  # fmt: skip
    """What a chunk of one value head needs and no state takes part in. With G the running sum of g and D_ij = exp(G_i - G_j):
    ``solutions`` [T, V, CHUNK], the rows of (I + A)^-1 diag(beta) by forward substitution, A_ij = beta_i D_ij (k_i . k_j) below
    the diagonal; ``scores`` [T, V, CHUNK], D_ij (q_i . k_j) down from it; ``factors`` [T, V, 4]: exp(G), exp(G_C - G) and those
    that normalise q and k."""
    tile, head = tl.program_id(0), tl.program_id(1)
    sequence = _sequence_of_tile(cu_seqlens, num_sequences, tile, CHUNK)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    end -= _tail_length(end - begin, CHUNK, CHUNK_FROM)
    first = begin + (tile - (begin // CHUNK + sequence)) * CHUNK
    if first < end:
        key_head = _key_head(head, K, V, TILED)
        i = tl.arange(0, CHUNK)
        t = first + i
        valid = t < end
        kk = tl.zeros((CHUNK, CHUNK), tl.float32)
        qk = tl.zeros((CHUNK, CHUNK), tl.float32)
        q_squares = tl.zeros((CHUNK,), tl.float32)
        k_squares = tl.zeros((CHUNK,), tl.float32)
        for d in range(0, DK, BLOCK_K):
            dk = d + tl.arange(0, BLOCK_K)
            places = qkv + t[:, None] * qkv_stride + key_head * DK + dk[None, :]
            inside = valid[:, None] & (dk < DK)[None, :]
            q = tl.load(places, mask=inside, other=0.0)
            k = tl.load(places + K * DK, mask=inside, other=0.0)
            q_squares += tl.sum(q * q, 1)
            k_squares += tl.sum(k * k, 1)
            kk += tl.dot(k, tl.trans(k), input_precision="tf32x3")
            qk += tl.dot(q, tl.trans(k), input_precision="tf32x3")
        q_factor = DK**-0.5 / tl.sqrt(q_squares + 1e-6)
        k_factor = 1.0 / tl.sqrt(k_squares + 1e-6)
        # Tokens beyond the end neither decay nor learn.
        beta = 1.0 / (1.0 + tl.exp(-tl.load(b + t * b_stride + head, mask=valid, other=0.0)))
        g = tl.load(a + t * a_stride + head, mask=valid, other=0.0) + tl.load(dt_bias + head)
        g = tl.where(valid, tl.load(a_coefficient + head) * _softplus(g), 0.0)
        # Differences of the sum must keep the bits of small decays behind a large one: so many additions in double.
        g_sum = tl.cumsum(g.to(tl.float64), 0)
        g_total = tl.sum(g.to(tl.float64), 0)
        place = factors + (t * V + head) * 4
        tl.store(place, tl.exp(g_sum.to(tl.float32)), mask=valid)
        tl.store(place + 1, tl.exp((g_total - g_sum).to(tl.float32)), mask=valid)
        tl.store(place + 2, q_factor, mask=valid)
        tl.store(place + 3, k_factor, mask=valid)

        exponent = (g_sum[:, None] - g_sum[None, :]).to(tl.float32)
        decay = tl.exp(tl.where(i[:, None] >= i[None, :], exponent, float("-inf"))) * k_factor[None, :]
        places = (t[:, None] * V + head) * CHUNK + i[None, :]
        tl.store(scores + places, q_factor[:, None] * decay * qk, mask=valid[:, None])
        system = tl.where(i[:, None] > i[None, :], (beta * k_factor)[:, None] * decay * kk, 0.0)
        solution = tl.where(i[:, None] == i[None, :], beta[:, None], 0.0)
        for row in range(1, CHUNK):
            coefficients = tl.sum(tl.where((i == row)[:, None], system, 0.0), 0)
            known = tl.sum(coefficients[:, None] * solution, 0)
            solution = tl.where((i == row)[:, None], solution - known[None, :], solution)
        tl.store(solutions + places, solution, mask=valid[:, None])


@triton.jit
def _advance_chunks(
    qkv, qkv_stride, solutions, scores, factors, state, state_slots, cu_seqlens, out,
    K: tl.constexpr, V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, TILED: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, CHUNK_FROM: tl.constexpr,
):  # fmt: skip
    """All chunks of a sequence but a short last one, in turn, for a block of columns of one value head, from what
    ``_solve_chunks`` left: V' = solutions (V - exp(G) K S); O = exp(G) Q S + scores V'; S <- exp(G_C) S + K^T (exp(G_C - G) V').
    The state is a tuple of BLOCK_K rows each: products over all of its rows at once would not fit the registers."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    end -= _tail_length(end - begin, CHUNK, CHUNK_FROM)
    if begin < end:
        BLOCKS: tl.constexpr = (DK + BLOCK_K - 1) // BLOCK_K
        key_head = _key_head(head, K, V, TILED)
        i = tl.arange(0, CHUNK)
        dk = tl.arange(0, BLOCK_K)
        dv = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        slot = tl.load(state_slots + sequence).to(tl.int64)
        place = state + (slot * V + head) * DK * DV + dk[:, None] * DV + dv[None, :]
        s = ()
        for j in tl.static_range(BLOCKS):
            in_state = (j * BLOCK_K + dk < DK)[:, None] & (dv < DV)[None, :]
            s = s + (tl.load(place + j * BLOCK_K * DV, mask=in_state, other=0.0),)
        for first in range(begin, end, CHUNK):
            t = first + i
            valid = t < end
            values = valid[:, None] & (dv < DV)[None, :]
            factor = factors + (t * V + head) * 4
            from_start = tl.load(factor, mask=valid, other=0.0)
            k_factor = tl.load(factor + 3, mask=valid, other=0.0)
            rows = qkv + t[:, None] * qkv_stride + key_head * DK + dk[None, :]
            qs = tl.zeros((CHUNK, BLOCK_V), tl.float32)
            ks = tl.zeros((CHUNK, BLOCK_V), tl.float32)
            for j in tl.static_range(BLOCKS):
                inside = valid[:, None] & (j * BLOCK_K + dk < DK)[None, :]
                q = tl.load(rows + j * BLOCK_K, mask=inside, other=0.0)
                qs += tl.dot(q, s[j], input_precision="tf32x3")
                k = tl.load(rows + K * DK + j * BLOCK_K, mask=inside, other=0.0)
                ks += tl.dot(k, s[j], input_precision="tf32x3")
            v = tl.load(qkv + t[:, None] * qkv_stride + 2 * K * DK + head * DV + dv[None, :], mask=values, other=0.0)
            v -= (from_start * k_factor)[:, None] * ks
            square = (t[:, None] * V + head) * CHUNK + i[None, :]
            new = tl.dot(tl.load(solutions + square, mask=valid[:, None], other=0.0), v, input_precision="tf32x3")
            o = (from_start * tl.load(factor + 2, mask=valid, other=0.0))[:, None] * qs
            o += tl.dot(tl.load(scores + square, mask=valid[:, None], other=0.0), new, input_precision="tf32x3")
            tl.store(out + (t[:, None] * V + head) * DV + dv[None, :], o, mask=values)
            whole = tl.load(factors + ((tl.minimum(first + CHUNK, end) - 1) * V + head) * 4)
            new *= (tl.load(factor + 1, mask=valid, other=0.0) * k_factor)[:, None]
            advanced = ()
            for j in tl.static_range(BLOCKS):
                inside = valid[:, None] & (j * BLOCK_K + dk < DK)[None, :]
                k = tl.load(rows + K * DK + j * BLOCK_K, mask=inside, other=0.0)
                advanced = advanced + (s[j] * whole + tl.dot(tl.trans(k), new, input_precision="tf32x3"),)
            s = advanced
        for j in tl.static_range(BLOCKS):
            in_state = (j * BLOCK_K + dk < DK)[:, None] & (dv < DV)[None, :]
            tl.store(place + j * BLOCK_K * DV, s[j], mask=in_state)


@triton.jit
def _gated_norm(out, z, z_stride, norm_weight, eps, V: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr):
    """``RMSNorm(o) * norm_weight * SiLU(z)`` of one head of one token, in place."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    place = out + (token * V + head) * DV + d
    o = tl.load(place, mask=d < DV, other=0.0)
    gate = tl.load(z + token * z_stride + head * DV + d, mask=d < DV, other=0.0)
    weight = tl.load(norm_weight + d, mask=d < DV, other=0.0)
    o = o / tl.sqrt(tl.sum(o * o, 0) / DV + eps) * weight * gate / (1.0 + tl.exp(-gate))
    tl.store(place, o, mask=d < DV)


def runs_on(device: torch.device) -> bool:
    """On a card; elsewhere under Triton's interpreter alone (``TRITON_INTERPRET=1``)."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def chunks(
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
) -> tuple[torch.Tensor, int, int] | None:
    """Advances the states over all whole chunks, where a rest of ``CHUNK_FROM`` tokens or more counts as one.

    Returns:
        The op's outputs, where rows of tokens that are in no chunk hold anything; the chunk; and from how many tokens a rest is one.
        None where there are too few tokens for any.
    """
    tuning = _tuning(recurrent_state)
    out = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    rows = (qkv, z, b, a)
    strides = [row_stride(OP, "activations", tensor, (tensor.shape[0], tensor.shape[1])) for tensor in rows]
    heads = (num_k_heads, num_v_heads, tiled)
    inputs = (qkv, strides[0], b, strides[2], a, strides[3], a_coefficient, dt_bias)
    if not _advance(inputs, recurrent_state, state_slots, cu_seqlens, out, heads, tuning):
        return None
    _norm(out, z, strides[1], norm_weight, eps, num_v_heads)
    return out, tuning.chunk, CHUNK_FROM


def _tuning(recurrent_state: torch.Tensor) -> Tuning:
    return tuning_for(_architecture(recurrent_state.device), recurrent_state.shape[2], recurrent_state.shape[3])


def _advance(inputs, recurrent_state, state_slots, cu_seqlens, out, heads, tuning) -> bool:
    """The chunk form, into ``out`` before its norm; False where there are too few tokens for a chunk."""
    if inputs[0].shape[0] < CHUNK_FROM:
        return False
    head_k_dim, head_v_dim = recurrent_state.shape[2:]
    _, solved = solve(inputs, cu_seqlens, heads, head_k_dim, tuning.chunk, tuning.solve)
    advance(
        inputs,
        solved,
        recurrent_state,
        state_slots,
        cu_seqlens,
        out,
        heads,
        tuning.chunk,
        tuning.block_v,
        tuning.advance,
    )
    return True


def solve(inputs, cu_seqlens, heads, head_k_dim: int, chunk: int, tile: Tile) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Of all chunks at once what no state takes part in: the kernel that was compiled, and (solutions, scores, factors).

    Args:
        inputs: the kernel's first arguments.
        heads: (num_k_heads, num_v_heads, tiled).
    """
    (num_k_heads, num_v_heads, tiled), qkv = heads, inputs[0]
    num_tokens, num_sequences = qkv.shape[0], cu_seqlens.shape[0] - 1
    solutions, scores = qkv.new_empty((2, num_tokens, num_v_heads, chunk))
    factors = qkv.new_empty((num_tokens, num_v_heads, 4))
    compiled = _solve_chunks[(num_tokens // chunk + num_sequences, num_v_heads)](
        *inputs, cu_seqlens, num_sequences, solutions, scores, factors,
        K=num_k_heads, V=num_v_heads, DK=head_k_dim, TILED=tiled, CHUNK=chunk, CHUNK_FROM=CHUNK_FROM, **_options(tile),
    )  # fmt: skip
    return compiled, (solutions, scores, factors)


def advance(
    inputs, solved, recurrent_state, state_slots, cu_seqlens, out, heads, chunk: int, block_v: int, tile: Tile
) -> Any:
    """The states from chunk to chunk, and the outputs before their norm, from what :func:`solve` gives; returns the kernel that was
    compiled."""
    (num_k_heads, num_v_heads, tiled), (head_k_dim, head_v_dim) = heads, recurrent_state.shape[2:]
    return _advance_chunks[(state_slots.shape[0], num_v_heads, triton.cdiv(head_v_dim, block_v))](
        *inputs[:2], *solved, recurrent_state, state_slots, cu_seqlens, out,
        K=num_k_heads, V=num_v_heads, DK=head_k_dim, DV=head_v_dim, TILED=tiled, CHUNK=chunk, CHUNK_FROM=CHUNK_FROM,
        BLOCK_V=block_v, **_options(tile),
    )  # fmt: skip


def _options(tile) -> dict[str, int]:
    return {"BLOCK_K": tile.block_k, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _norm(out, z, z_stride, norm_weight, eps, num_v_heads) -> None:
    head_v_dim = norm_weight.shape[0]
    _gated_norm[(out.shape[0], num_v_heads)](
        out, z, z_stride, norm_weight, eps,
        V=num_v_heads, DV=head_v_dim, BLOCK=triton.next_power_of_2(head_v_dim), num_warps=1,
    )  # fmt: skip


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
    """See :func:`helexa_engine.ops.gated_delta_rule.reference.gated_delta_rule`. Slots and borders lie on the device and are
    taken on trust: checking them would wait for it.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    num_tokens, num_sequences = qkv.shape[0], state_slots.shape[0]
    num_slots, _, head_k_dim, head_v_dim = recurrent_state.shape
    value_dim = num_v_heads * head_v_dim
    if num_k_heads < 1 or num_v_heads % num_k_heads:
        raise ValueError(f"{OP}: num_v_heads: expected a multiple of {num_k_heads} key heads, got {num_v_heads}")
    strides = {
        name: row_stride(OP, name, tensor, (num_tokens, width))
        for name, tensor, width in (
            ("qkv", qkv, 2 * num_k_heads * head_k_dim + value_dim),
            ("z", z, value_dim),
            ("b", b, num_v_heads),
            ("a", a, num_v_heads),
        )
    }
    for name, tensor, shape in (
        ("a_coefficient", a_coefficient, (num_v_heads,)),
        ("dt_bias", dt_bias, (num_v_heads,)),
        ("norm_weight", norm_weight, (head_v_dim,)),
        ("recurrent_state", recurrent_state, (num_slots, num_v_heads, head_k_dim, head_v_dim)),
        ("cu_seqlens", cu_seqlens, (num_sequences + 1,)),
    ):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{OP}: {name}: expected contiguous {list(shape)}, got {list(tensor.shape)}")
    out = torch.empty((num_tokens, value_dim), dtype=torch.float32, device=qkv.device)
    if num_tokens == 0:
        return out
    tuning = _tuning(recurrent_state)
    inputs = (qkv, strides["qkv"], b, strides["b"], a, strides["a"], a_coefficient, dt_bias)
    heads = (num_k_heads, num_v_heads, tiled)
    _advance(inputs, recurrent_state, state_slots, cu_seqlens, out, heads, tuning)
    _recurrent[(num_sequences, num_v_heads, triton.cdiv(head_v_dim, tuning.block_v))](
        *inputs, recurrent_state, state_slots, cu_seqlens, out,
        K=num_k_heads, V=num_v_heads, DK=head_k_dim, DV=head_v_dim, TILED=tiled, CHUNK=tuning.chunk, CHUNK_FROM=CHUNK_FROM,
        BLOCK_K=triton.next_power_of_2(head_k_dim), BLOCK_V=tuning.block_v, num_warps=4,
    )  # fmt: skip
    _norm(out, z, strides["z"], norm_weight, eps, num_v_heads)
    return out
