"""Time of ``gated_delta_rule`` on a prompt, by chunks and token by token in turn, beside the machine's ceilings: one JSON row a form.

    python -m benchmarks.ops.gated_delta_rule                       # heads of Qwen3.5-0.8B and 4B, 512 tokens
    python -m benchmarks.ops.gated_delta_rule --heads 16 48 --tokens 64 512 4096

``gigaflops`` counts what every form must do, three products of the state with a vector per token and value head
(6 x head_k_dim x head_v_dim; the chunk form does 1.1 to 1.2 times that), and ``share_of_multiply_rate`` is its share of the float32
multiply rate. ``roofline`` is the share of the slower of two ceilings: those operations over the multiply rate, or the bytes that are
read and written once (activations, and the states twice) over the read bandwidth. Prompts differ from call to call, so that one is
larger than the caches. Token by token is the same op called with pieces too short for a chunk.

    python -m benchmarks.ops.gated_delta_rule --device cuda --tokens 1 2048 8192

On a card one token is the whole decode step of the mixer, its convolution included, and more are a prompt; ``microseconds`` is what goals
are set for.

    python -m benchmarks.ops.gated_delta_rule --tune    # on a card: the fastest tiles of ops/gated_delta_rule/triton.py

searches (``gated_delta_tuning.py``) and writes the card's row into ``tuning.json``, to be committed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from helexa_engine.cli import machine
from helexa_engine.ops.gated_delta_rule import gated_delta_rule, native, tuning
from helexa_engine.ops.registry import require_native

from . import gated_delta_tuning
from .place import Place, add_arguments, place
from .roofline import print_row

HEAD_DIM = 128  # of keys and values in every released model
TOO_SHORT = 15  # tokens that do not make a chunk: csrc/cpu/gated_delta_rule.h
COPIES = 3  # of the prompt
_native = require_native()
CONV_KERNEL = 4


def measure_on_card(where: Place, num_k_heads: int, num_v_heads: int, tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of a call, with the bytes and operations it takes. One token is a step, more are a prompt."""
    generator = torch.Generator().manual_seed(0)
    heads = {"num_k_heads": num_k_heads, "num_v_heads": num_v_heads}
    kernels = where.implementation(gated_delta_rule, head_k_dim=HEAD_DIM, head_v_dim=HEAD_DIM)
    value_dim = num_v_heads * HEAD_DIM
    channels = 2 * num_k_heads * HEAD_DIM + value_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(where.device)

    state_bytes = 4 * num_v_heads * HEAD_DIM * HEAD_DIM
    count = max(1, math.ceil(where.working_set / state_bytes)) if tokens == 1 else 1
    slots = torch.zeros(1, dtype=torch.int32, device=where.device)
    borders = torch.tensor([0, tokens], dtype=torch.int32, device=where.device)
    weights = -random(num_v_heads).abs(), random(num_v_heads), random(HEAD_DIM), 1e-6
    convolution = random(channels, CONV_KERNEL)
    calls = []
    for _ in range(count):
        qkv, z = random(tokens, channels), random(tokens, value_dim)
        b, a = random(tokens, num_v_heads), random(tokens, num_v_heads)
        state = random(1, num_v_heads, HEAD_DIM, HEAD_DIM) * 0.1
        if tokens == 1:
            conv_state = random(1, CONV_KERNEL - 1, channels)
            given = (qkv, convolution, conv_state, z, b, a, *weights, state, slots, borders)
            calls.append(partial(kernels.gated_delta_step, *given, tiled=True, **heads))
        else:
            given = (qkv, z, b, a, *weights, state, slots, borders)
            calls.append(partial(kernels.gated_delta_rule, *given, tiled=True, **heads))
    activations = tokens * (channels + 2 * value_dim + 2 * num_v_heads)
    return {
        "seconds": where.seconds(calls, repeats),
        "bytes": 4.0 * activations + 2.0 * state_bytes,
        "operations": 6.0 * HEAD_DIM * HEAD_DIM * num_v_heads * tokens,
    }


class Prompt:
    """Random activations of one layer, and a state."""

    def __init__(self, num_k_heads: int, num_v_heads: int, tokens: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        value_dim = num_v_heads * HEAD_DIM
        self.heads = {"num_k_heads": num_k_heads, "num_v_heads": num_v_heads}
        self.rows = [
            torch.randn(tokens, width, generator=generator)
            for width in (2 * num_k_heads * HEAD_DIM + value_dim, value_dim, num_v_heads, num_v_heads)
        ]
        self.weights = (
            -torch.rand(num_v_heads, generator=generator),
            torch.randn(num_v_heads, generator=generator),
            torch.ones(HEAD_DIM),
        )
        self.state = torch.zeros(1, num_v_heads, HEAD_DIM, HEAD_DIM)

    def seconds(self, piece: int) -> float:
        """Of the whole prompt in calls of ``piece`` tokens, from an empty state."""
        self.state.zero_()
        slots = torch.zeros(1, dtype=torch.int32)
        calls = [[part[i : i + piece] for part in self.rows] for i in range(0, len(self.rows[0]), piece)]
        borders = [torch.tensor([0, len(call[0])], dtype=torch.int32) for call in calls]
        start = time.perf_counter()
        for call, cu_seqlens in zip(calls, borders, strict=True):
            native.gated_delta_rule(
                *call, *self.weights, 1e-6, self.state, slots, cu_seqlens, tiled=True, **self.heads
            )  # fmt: skip
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads", nargs="+", type=int, default=[16, 16, 16, 32], help="pairs of key heads, value heads"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--repeats", type=int, default=9)
    add_arguments(parser)
    parser.add_argument("--tune", action="store_true", help="search for this card's tiles, with the last pair of heads")
    parser.add_argument("--table", type=Path, default=tuning.TABLE, help="where --tune puts its row")
    arguments = parser.parse_args()
    if len(arguments.heads) % 2:
        parser.error("argument --heads: expected pairs of key heads and value heads")
    pairs = list(zip(arguments.heads[::2], arguments.heads[1::2], strict=True))
    if arguments.tune:
        if not torch.cuda.is_available():
            parser.error("argument --tune: expected a CUDA device, there is none")
        tune(arguments.table, *pairs[-1], max(arguments.tokens[0], 4096))
        return
    if arguments.device == "cuda":
        where = place("cuda")
        for (num_k_heads, num_v_heads), tokens in itertools.product(pairs, arguments.tokens):
            result = measure_on_card(where, num_k_heads, num_v_heads, tokens, arguments.repeats)
            heads = f"{num_k_heads} k, {num_v_heads} v, d{HEAD_DIM}"
            print_row(
                "gated_delta_rule",
                {"heads": heads, "tokens": tokens, "microseconds": result["seconds"] * 1e6},
                where,
                seconds=result["seconds"],
                nbytes=result["bytes"],
                operations=result["operations"],
                rate=where.rates["float32"],
                json_file=arguments.json,
            )
        return
    bandwidth, rate = _native.read_bandwidth(), _native.float_rate()
    for num_k_heads, num_v_heads in pairs:
        for tokens in arguments.tokens:
            prompts = [Prompt(num_k_heads, num_v_heads, tokens, seed) for seed in range(COPIES)]
            forms: dict[str, list[float]] = {"chunk": [], "recurrent": []}
            for repeat in range(arguments.repeats + 1):
                prompt = prompts[repeat % COPIES]
                for form, piece in (("chunk", tokens), ("recurrent", TOO_SHORT)):
                    seconds = prompt.seconds(piece)
                    if repeat:  # the first round warms up
                        forms[form].append(seconds)
            medians = {form: statistics.median(samples) for form, samples in forms.items()}
            for form, median in medians.items():
                report(
                    None if arguments.json is None else Path(arguments.json),
                    bandwidth,
                    rate,
                    (num_k_heads, num_v_heads, tokens),
                    form,
                    median,
                    medians["recurrent"],
                )


def tune(table: Path, num_k_heads: int, num_v_heads: int, tokens: int) -> None:
    """Searches on the first card and writes its row; a table that is not there begins as a copy of the committed one."""
    if not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(tuning.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    prompt = gated_delta_tuning.Prompt(num_k_heads, num_v_heads, HEAD_DIM, HEAD_DIM, tokens)
    found, seconds = gated_delta_tuning.search(HEAD_DIM, prompt.time_solve, prompt.time_advance)
    major, minor = torch.cuda.get_device_capability()
    measured = {
        "device": torch.cuda.get_device_name(),
        "heads": f"{num_k_heads} k, {num_v_heads} v",
        "tokens": tokens,
        "microseconds": round(seconds * 1e6, 1),
        "commit": machine.commit(),
    }
    gated_delta_tuning.write_row(table, f"sm_{major}{minor}", HEAD_DIM, HEAD_DIM, found, measured)
    print(json.dumps(tuning.to_row(found) | {"measured": measured}), flush=True)


def report(
    path: Path | None,
    bandwidth: float,
    rate: float,
    shape: tuple[int, int, int],
    form: str,
    seconds: float,
    recurrent_seconds: float,
) -> None:
    """Prints the row of one form, and appends it to ``path``."""
    num_k_heads, num_v_heads, tokens = shape
    operations = 6.0 * HEAD_DIM * HEAD_DIM * num_v_heads * tokens
    activations = tokens * (2 * num_k_heads * HEAD_DIM + 3 * num_v_heads * HEAD_DIM + 2 * num_v_heads)
    nbytes = 4.0 * (activations + 2 * num_v_heads * HEAD_DIM * HEAD_DIM)
    row = {
        "benchmark": "gated_delta_rule",
        "heads": f"{num_k_heads} k, {num_v_heads} v, d{HEAD_DIM}",
        "tokens": tokens,
        "form": form,
        "seconds": seconds,
        "nanoseconds_per_token_and_head": seconds / tokens / num_v_heads * 1e9,
        "times_recurrent": recurrent_seconds / seconds,
        "gigaflops": operations / seconds / 1e9,
        "share_of_multiply_rate": operations / seconds / rate,
        "roofline": max(nbytes / bandwidth, operations / rate) / seconds,
        "read_gigabytes_per_second": bandwidth / 1e9,
        "multiply_gigaflops": rate / 1e9,
        "instruction_set": _native.cpu_isa(),
        "threads": _native.num_threads(),
        "commit": machine.commit(),
        "machine": machine.describe(),
    }
    text = json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
    print(text, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(text + "\n")


if __name__ == "__main__":
    main()
