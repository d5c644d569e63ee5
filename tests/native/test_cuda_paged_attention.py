"""``csrc/cuda/paged_attention*.cu`` between guard pages, with threads in two orders. What the contexts should be is tested through
``ops/paged_attention/cuda.py``, in ``tests/engine/ops/test_paged_attention_cuda.py``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helexa_engine.cache.spec import KvDtype
from helexa_engine.ops.paged_attention import reference
from tests.engine.ops.test_paged_attention import make, same_bits


class Placed:
    """The op with every tensor in memory of its own, and a workspace that is NaN all over."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def paged_attention(
        self, qkv, q_norm, k_norm, eps, cos_sin, positions, slots, tables, cu_seqlens, seq_lens, k_cache, v_cache, scale, gated
    ) -> torch.Tensor:  # fmt: skip
        core = self._core
        caches = [core.put(cache.view(torch.int8).numpy()) for cache in (k_cache, v_cache)]
        num_kv_heads, head_dim, (num_tokens, width) = k_cache.shape[1], len(q_norm), qkv.shape
        num_heads = (width // head_dim - 2 * num_kv_heads) // (2 if gated else 1)
        size = core.kernels.paged_attention_workspace_bytes(
            num_tokens, *tables.shape, num_heads, num_kv_heads, head_dim
        )
        workspace = core.put(np.full(max(size, 1), 0xFF, np.uint8))
        ctx = core.put(np.full((num_tokens, num_heads * head_dim), np.nan, np.float32))

        def place(tensor: torch.Tensor) -> int:
            placed.append(core.put(tensor.numpy()))
            address: int = core.address(placed[-1])
            return address

        placed: list[Any] = []
        core.kernels.paged_attention(
            place(qkv), place(q_norm), place(k_norm), eps, place(cos_sin), cos_sin.shape[1], place(positions), place(slots),
            place(tables), tables.shape[1], place(cu_seqlens), place(seq_lens), len(seq_lens), *map(core.address, caches),
            k_cache.dtype == torch.int8, gated, num_heads, num_kv_heads, head_dim, scale, core.address(ctx), num_tokens,
            core.address(workspace),
        )  # fmt: skip
        for cache, written in zip((k_cache, v_cache), caches, strict=True):
            cache.view(torch.int8).copy_(torch.from_numpy(core.get(written)))
        return torch.from_numpy(core.get(ctx))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "q8_0"])
@pytest.mark.parametrize(("heads", "head_dim"), [((6, 2), 32), ((4, 1), 128), ((2, 1), 256)], ids=str)
@pytest.mark.parametrize(
    "spans",
    [[(0, 70), (128, 130), (299, 300)], [(69, 70), (129, 130), (299, 300)], [(66, 70), (122, 130), (298, 300)]],
    ids=["prompt and few", "single", "few"],
)
def test_touches_nothing_else(cuda_core, heads, head_dim: int, kv_dtype: KvDtype, spans: list[tuple[int, int]]) -> None:
    """Queries of zero, so that the context is known to float32 rounding."""
    case = make(
        [70, 130, 300], heads=heads, head_dim=head_dim, rotary_dim=16, gated=True, kv_dtype=kv_dtype, device="cuda"
    )
    case = replace(case, q_norm=torch.zeros(head_dim))
    cache = case.empty_cache()
    for i, (begin, _) in enumerate(spans):
        if begin:
            case.run(reference, cache, [(0, begin)], [i])
    twin_cache = tuple(tensor.clone() for tensor in cache)
    expected = case.run(reference, twin_cache, spans, compute_dtype=torch.float32)
    got = case.run(Placed(cuda_core), cache, spans)
    assert all(map(same_bits, cache, twin_cache))
    # Values of Q8_0 are rounded to bfloat16 on their way into the product.
    assert (got - expected).abs().max() <= (2e-2 if kv_dtype == "q8_0" else 2e-6)


def test_what_the_workspace_takes(cuda_core) -> None:
    """Bytes grow with what is new and with splits, and a single short sequence needs none."""
    bytes_of = cuda_core.kernels.paged_attention_workspace_bytes
    assert bytes_of(1, 1, 2, 16, 2, 256) == 0
    assert bytes_of(1, 1, 3, 16, 2, 256) == -(-2 * 16 * 258 * 4 // 256) * 256
    assert bytes_of(32, 32, 10**4, 16, 2, 256) == 32 * 16 * 64 * 258 * 4
    assert bytes_of(512, 1, 100, 16, 2, 256) == 512 * 16 * 256 * 2
    with pytest.raises(ValueError, match="num_heads: expected a multiple of num_kv_heads, got 7"):
        bytes_of(1, 1, 1, 7, 2, 64)
    with pytest.raises(ValueError, match="num_tokens: expected a new token or more for each sequence, got 1"):
        bytes_of(1, 2, 1, 4, 2, 64)
