"""Time of ``paged_attention`` by new tokens and context, beside the ceilings of the machine: one JSON row each.

    python -m benchmarks.ops.paged_attention --heads 16x8x128 --tokens 1 512 --context 64 4096

One sequence: the last ``tokens`` of ``context`` are new, the pages lie scattered. The caches of a round together are larger than
the processor's caches, and a round uses each once, so that one new token measures memory. ``roofline`` is the share of the slower
of the two ceilings: bytes of keys and values over read bandwidth, operations over the float32 multiply rate.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

from helexa_engine.ops.paged_attention import native
from helexa_engine.ops.registry import require_native

from .roofline import print_row

PAGE_SIZE = 64
WORKING_SET = 96 << 20  # bytes
_native = require_native()


def measure(heads: tuple[int, int, int], tokens: int, context: int, repeats: int) -> dict[str, float]:
    """Median seconds of a call, with the bytes and operations it takes."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    num_pages = math.ceil(context / PAGE_SIZE)
    nbytes = 2 * 2 * num_kv_heads * head_dim * context
    count = max(1, math.ceil(WORKING_SET / nbytes)) if tokens <= 8 else 1
    shape = (num_pages, num_kv_heads, PAGE_SIZE, head_dim)
    caches = [torch.randn(2, *shape, generator=generator).half() for _ in range(count)]
    pages = torch.randperm(num_pages, generator=generator)
    positions = torch.arange(context - tokens, context)
    angles = torch.arange(context)[:, None] * 10000 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator)
    norm, cos_sin = torch.ones(head_dim), torch.cat([angles.cos(), angles.sin()], dim=1)
    slots = pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    tables, cu_seqlens = pages.int()[None], torch.tensor([0, tokens], dtype=torch.int32)
    seq_lens = torch.tensor([context], dtype=torch.int32)
    seconds = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        for k, v in caches:
            native.paged_attention(
                qkv, norm, norm, 1e-6, cos_sin, positions, slots, tables, cu_seqlens, seq_lens, k, v, head_dim**-0.5
            )
        if repeat:  # the first round warms up
            seconds.append((time.perf_counter() - start) / count)
    keys_seen = tokens * (context - tokens) + tokens * (tokens + 1) // 2
    return {
        "seconds": statistics.median(seconds),
        "bytes": nbytes,
        "operations": 4.0 * num_heads * head_dim * keys_seen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="16x8x128", help="query heads x key-value heads x head dimension [16x8x128]")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--context", nargs="+", type=int, default=[64, 1024, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    num_heads, num_kv_heads, head_dim = (int(n) for n in arguments.heads.split("x"))
    bandwidth, float_rate = _native.read_bandwidth(), _native.float_rate()
    for context in arguments.context:
        for tokens in arguments.tokens:
            if tokens > context:
                continue
            result = measure((num_heads, num_kv_heads, head_dim), tokens, context, arguments.repeats)
            print_row(
                "paged_attention",
                {"heads": arguments.heads, "tokens": tokens, "context": context},
                seconds=result["seconds"],
                nbytes=result["bytes"],
                operations=result["operations"],
                bandwidth=bandwidth,
                rate=float_rate,
            )


if __name__ == "__main__":
    main()
