"""Time of ``paged_attention`` by new tokens and context, beside the ceilings of the machine: one JSON row each.

    python -m benchmarks.ops.paged_attention --heads 16x8x128 --tokens 1 512 --context 64 4096 --kv-dtype float16 q8_0

One sequence: the last ``tokens`` of ``context`` are new, the pages lie scattered. The caches of a round together are larger than
the processor's caches, and a round uses each once, so that one new token measures memory. ``roofline`` is the share of the slower
of the two ceilings: bytes of keys and values over read bandwidth, operations over the float32 multiply rate, which products of codes may
exceed.
"""

from __future__ import annotations

import argparse
import itertools
import math
from functools import partial
from typing import Any

import torch

from helexa_engine.cache.spec import KV_DTYPES, PAGE_SIZE, AttentionCacheSpec, KvDtype
from helexa_engine.ops.paged_attention import paged_attention

from .place import Place, add_arguments, place
from .roofline import print_row


def measure(
    where: Place, heads: tuple[int, int, int], tokens: int, context: int, kv_dtype: KvDtype, repeats: int
) -> dict[str, float]:
    """Median seconds of a call, with the bytes and operations it takes."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    num_pages = math.ceil(context / PAGE_SIZE)
    spec = AttentionCacheSpec(num_kv_heads, head_dim, kv_dtype, device=where.name)
    kernels = where.implementation(paged_attention, head_dim=head_dim)
    nbytes = spec.page_bytes / PAGE_SIZE * context
    count = max(1, math.ceil(where.working_set / nbytes)) if tokens <= 8 else 1
    caches = [spec.allocate(num_pages, partial(torch.zeros, device=where.device)) for _ in range(count)]
    pages = torch.randperm(num_pages, generator=generator)
    angles = torch.arange(context)[:, None] * 10000 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    norm, cos_sin = torch.ones(head_dim), torch.cat([angles.cos(), angles.sin()], dim=1)

    def arguments(begin: int, end: int) -> list[Any]:
        """Of a call for the tokens ``begin:end``, up to the caches."""
        positions = torch.arange(begin, end)
        qkv = torch.randn(end - begin, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator)
        slots = pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        cu_seqlens, seq_lens = (torch.tensor(lengths, dtype=torch.int32) for lengths in ([0, end - begin], [end]))
        given = [qkv, norm, norm, 1e-6, cos_sin, positions, slots, pages.int()[None], cu_seqlens, seq_lens]
        return [value.to(where.device) if isinstance(value, torch.Tensor) else value for value in given]

    scale = head_dim**-0.5
    for begin in range(0, context - tokens, 512):
        kernels.paged_attention(*arguments(begin, min(begin + 512, context - tokens)), caches[0].k, caches[0].v, scale)
    for cache in caches[1:]:
        cache.k.copy_(caches[0].k), cache.v.copy_(caches[0].v)
    new = arguments(context - tokens, context)
    calls = [partial(kernels.paged_attention, *new, cache.k, cache.v, scale) for cache in caches]
    keys_seen = tokens * (context - tokens) + tokens * (tokens + 1) // 2
    return {
        "seconds": where.seconds(calls, repeats),
        "bytes": nbytes,
        "operations": 4.0 * num_heads * head_dim * keys_seen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="16x8x128", help="query heads x key-value heads x head dimension [16x8x128]")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--context", nargs="+", type=int, default=[64, 1024, 8192])
    parser.add_argument("--kv-dtype", nargs="+", help="[all that are on the device, but float32]")
    parser.add_argument("--repeats", type=int, default=5)
    add_arguments(parser)
    arguments = parser.parse_args()
    num_heads, num_kv_heads, head_dim = (int(n) for n in arguments.heads.split("x"))
    where = place(arguments.device)
    known = [dtype for dtype in KV_DTYPES[arguments.device] if dtype != "float32"]
    wanted = arguments.kv_dtype or known
    if unknown := set(wanted) - set(KV_DTYPES[arguments.device]):
        parser.error(f"argument --kv-dtype: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    for context, tokens, kv_dtype in itertools.product(arguments.context, arguments.tokens, wanted):
        if tokens > context:
            continue
        result = measure(where, (num_heads, num_kv_heads, head_dim), tokens, context, kv_dtype, arguments.repeats)
        print_row(
            "paged_attention",
            {"heads": arguments.heads, "tokens": tokens, "context": context, "kv_dtype": kv_dtype},
            where,
            seconds=result["seconds"],
            nbytes=result["bytes"],
            operations=result["operations"],
            rate=where.rates["float32"],
            json_file=arguments.json,
        )


if __name__ == "__main__":
    main()
