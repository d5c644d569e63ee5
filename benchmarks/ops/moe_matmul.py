"""Time of ``moe_matmul`` by mix and rows of activations, beside the ceilings of the machine: one JSON row each.

    python -m benchmarks.ops.moe_matmul --mix Q4_K Q4_K Q6_K --rows 1 8 512
    python -m benchmarks.ops.moe_matmul --experts 512 --top-k 10 --width 512 --shared-width 512

Every call routes other random tokens, and all experts together are larger than the caches, so that one row of activations measures
memory. ``bytes`` are those of the experts that a call touches and of the router. ``roofline`` is the share of the slower of the two
ceilings: bytes over read bandwidth, operations over the int8 multiply rate.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import numpy as np
import torch

from helexa_engine import presets
from helexa_engine.ops.moe_matmul import Experts, moe_matmul
from helexa_engine.ops.moe_matmul.reference import route
from helexa_engine.quant import types
from helexa_engine.quant.types import QuantType

from .place import add_arguments, place
from .roofline import print_row

ROUTINGS = 8  # inputs in turn, each to experts of its own


def experts(kernels: Any, mix: list[QuantType], count: int, width: int, hidden: int, mapped: bool) -> Experts:
    """Random experts of natural size."""
    rng = np.random.default_rng(0)
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    stacks = []
    for quant_type, (rows, cols) in zip(mix, shapes, strict=True):
        data = presets.random_values(quant_type, count * rows * cols, cols**-0.5, rng).reshape(count, -1)
        stacks.append(kernels.pack_experts(quant_type, data, rows, cols, mapped=mapped))
    return Experts(*stacks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", nargs=3, default=["Q4_K", "Q4_K", "Q6_K"], metavar=("GATE", "UP", "DOWN"))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--experts", type=int, default=128, help="[128]")
    parser.add_argument("--top-k", type=int, default=8, help="[8]")
    parser.add_argument("--hidden", type=int, default=2048, help="[2048]")
    parser.add_argument("--width", type=int, default=768, help="[768]")
    parser.add_argument("--shared-width", type=int, default=0, help="of an expert that all tokens take [none]")
    parser.add_argument("--mapped", action="store_true", help="pack as it goes, as --mmap-experts does")
    parser.add_argument("--repeats", type=int, default=9)
    add_arguments(parser)
    arguments = parser.parse_args()
    mix = [type_of(parser, name) for name in arguments.mix]
    hidden, width, shared_width = arguments.hidden, arguments.width, arguments.shared_width
    where = place(arguments.device)
    kernels = where.implementation(moe_matmul, hidden_size=hidden)
    routed = experts(kernels, mix, arguments.experts, width, hidden, arguments.mapped)
    shared = experts(kernels, mix, 1, shared_width, hidden, False) if shared_width else None
    weight = torch.randn(arguments.experts, hidden) / hidden**0.5
    gate = (torch.randn(hidden) / hidden**0.5).to(where.device) if shared else None
    router = kernels.pack_router(weight.to(where.device), gate)
    norm = torch.ones(hidden, device=where.device)
    expert_bytes = sum(
        rows * quant_type.row_bytes(cols)
        for quant_type, rows, cols in zip(mix, (width, width, hidden), (hidden, hidden, width), strict=True)
    )
    for rows in arguments.rows:
        touched, calls = [], []
        for _ in range(ROUTINGS):
            x = torch.randn(rows, hidden)
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            touched.append(len(set(route(normed @ weight.T, arguments.top_k, True)[0].flatten().tolist())))
            given = (x.to(where.device), router, routed, shared)
            calls.append(partial(kernels.moe_matmul, *given, norm_weight=norm, norm_eps=1e-6, top_k=arguments.top_k))
        median = where.seconds(calls, arguments.repeats)
        per_width = expert_bytes / width
        nbytes = (
            statistics.mean(touched) * expert_bytes
            + shared_width * per_width
            + 4 * (arguments.experts + bool(shared)) * hidden
        )
        operations = 6.0 * rows * hidden * (arguments.top_k * width + shared_width)
        print_row(
            "moe_matmul",
            {
                "mix": " ".join(arguments.mix),
                "shape": f"{arguments.experts} x {hidden} x {width}, top {arguments.top_k}, shared {shared_width}",
                "mapped": arguments.mapped,
                "rows": rows,
            },
            where,
            seconds=median,
            nbytes=nbytes,
            operations=operations,
            rate=where.rates["int8"],
            json_file=arguments.json,
        )


def type_of(parser: argparse.ArgumentParser, name: str) -> QuantType:
    """The type of this name, or the end of the program."""
    quant_type = types.by_name(name)
    if quant_type is None:
        parser.error(f"argument --mix: {name!r} is no tensor type")
    return quant_type


if __name__ == "__main__":
    main()
