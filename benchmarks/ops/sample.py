"""Time of ``sample`` by rows, vocabulary and filter, beside the time that the logits take to be read: one JSON row each.

    python -m benchmarks.ops.sample --device cuda --rows 1 8 64 --vocabulary 151936 248320

On a card alone: on the processor ``runtime/sampler.py`` samples, which is no op. Logits are normal with a deviation of 3, so that
``top_k`` leaves a few dozen candidates, ``top_p`` some thousands, and ``flat`` (the same at a temperature of 50) all. The logits of a
round together are larger than the caches, which those of a step are not: it takes at most what a row says.
"""

from __future__ import annotations

import argparse
import itertools
import math
from functools import partial
from typing import Any

import torch

from helexa_engine.ops.sample import sample
from helexa_engine.ops.sample.rows import SampleRow, SampleRows, pack

from .place import Place, add_arguments, place
from .roofline import print_row

FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "none": {"temperature": 1.0},
    "top_k": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "flat": {"temperature": 50.0, "top_p": 0.95},
    "logprobs": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "num_logprobs": 5},
}


def measure(where: Place, rows: int, vocabulary: int, settings: dict[str, Any], repeats: int) -> float:
    """Median seconds of a call."""
    kernels = where.implementation(sample)
    uniforms = torch.rand(rows, generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.from_numpy(pack([SampleRow(**settings, uniform=uniform) for uniform in uniforms])).to(where.device)
    given = SampleRows(table, rows, num_logprobs=settings.get("num_logprobs"))
    generator = torch.Generator(where.device).manual_seed(0)
    count = max(1, math.ceil(where.working_set / (4 * rows * vocabulary)))
    logits = [3 * torch.randn(rows, vocabulary, generator=generator, device=where.device) for _ in range(count)]
    return where.seconds([partial(kernels.sample, each, given) for each in logits], repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[151936, 248320])
    parser.add_argument("--filters", nargs="+", choices=FILTERS, default=list(FILTERS))
    parser.add_argument("--repeats", type=int, default=5)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        parser.error("argument --device: expected cuda: on the processor sampling is no op")
    where = place(arguments.device)
    for vocabulary, rows, name in itertools.product(arguments.vocabulary, arguments.rows, arguments.filters):
        print_row(
            "sample",
            {"rows": rows, "vocabulary": vocabulary, "filter": name},
            where,
            seconds=measure(where, rows, vocabulary, FILTERS[name], arguments.repeats),
            nbytes=4.0 * rows * vocabulary,
            operations=0.0,
            rate=where.rates["float32"],
            json_file=arguments.json,
        )


if __name__ == "__main__":
    main()
