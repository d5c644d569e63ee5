"""Time of ``quant_matmul`` by weight type and rows of activations, beside the ceilings of the machine: one JSON row each.

    python -m benchmarks.ops.quant_matmul --types Q8_0 Q4_K --rows 1 512 --shape 3072x1024

The matrices of a round together are larger than the caches, and a round uses each once, so that one row of activations
measures memory. ``roofline`` is the share of the slower of the two ceilings: bytes over read bandwidth, operations over
the multiply rate of the type's arithmetic. With ``--cached`` one matrix, small enough for the caches, is used again and again, which
shows how fast the kernel would be if memory were: beside the other rate it tells what bounds a step.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import numpy as np
import torch

from helexa_engine.ops.quant_matmul import quant_matmul
from helexa_engine.quant import types
from helexa_engine.quant.types import QuantType

from .place import Place, add_arguments, place
from .roofline import print_row

DEFAULT_TYPES = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()


def random_weights(quant_type: QuantType, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a tensor: normal values for float types, random blocks (time does not depend on the codes) for others."""
    size = rows * quant_type.row_bytes(cols)
    if not quant_type.is_float:
        return rng.integers(0, 256, size, dtype=np.uint8) & np.uint8(0x3F)  # scales stay finite
    values = rng.standard_normal(rows * cols, dtype=np.float32)
    if quant_type is types.BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype({4: np.float32, 2: np.float16, 8: np.float64}[quant_type.block_bytes]).view(np.uint8)


def measure(
    where: Place, quant_type: QuantType, out_features: int, in_features: int, rows: int, repeats: int, cached: bool
) -> dict[str, float]:
    """Median seconds of a call, with the bytes and operations it takes."""
    rng = np.random.default_rng(0)
    weight_bytes = out_features * quant_type.row_bytes(in_features)
    count = 1 if cached else max(1, math.ceil(where.working_set / weight_bytes)) if rows <= 8 else 2
    kernels = where.implementation(quant_matmul, in_features=in_features)
    weights = [
        kernels.pack(quant_type, random_weights(quant_type, out_features, in_features, rng), out_features, in_features)
        for _ in range(count)
    ]
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(0)).to(where.device)
    out = torch.empty(rows, out_features, device=where.device)
    calls = [partial(kernels.quant_matmul, x, [weight], out=out) for weight in weights] * (64 if cached else 1)
    return {
        "seconds": where.seconds(calls, repeats),
        "bytes": weights[0].nbytes,
        "operations": 2.0 * rows * out_features * in_features,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=DEFAULT_TYPES, metavar="TYPE")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 512])
    parser.add_argument("--shape", default="3072x1024", help="output x input features of the weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cached", action="store_true", help="one matrix again and again")
    add_arguments(parser)
    arguments = parser.parse_args()
    out_features, in_features = (int(n) for n in arguments.shape.split("x"))
    where = place(arguments.device)
    for name in arguments.types:
        quant_type = types.by_name(name)
        if quant_type is None:
            parser.error(f"argument --types: {name!r} is no tensor type")
        arithmetic = "int8" if not quant_type.is_float else "bfloat16" if quant_type is types.BF16 else "float32"
        for rows in arguments.rows:
            shape = (out_features, in_features, rows)
            result = measure(where, quant_type, *shape, arguments.repeats, arguments.cached)
            print_row(
                "quant_matmul",
                {
                    "type": name,
                    "shape": arguments.shape,
                    "rows": rows,
                    **({"cached": True} if arguments.cached else {}),
                },
                where,
                seconds=result["seconds"],
                nbytes=result["bytes"],
                operations=result["operations"],
                rate=where.rates[arithmetic],
                json_file=arguments.json,
            )


if __name__ == "__main__":
    main()
