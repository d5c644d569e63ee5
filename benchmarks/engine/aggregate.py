"""``python -m benchmarks.engine.aggregate``: tokens a second of several answers together, over those of one, and of the roofline."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from helexa_engine import LLM, SamplingParams
from helexa_engine.cli import machine
from helexa_engine.cli.bench import Limits, Prompts, append_row, decode_bytes, preset_model
from helexa_engine.config import EngineConfig
from helexa_engine.errors import HelexaError
from helexa_engine.ops.registry import require_native
from helexa_engine.runtime.load import load_model
from helexa_engine.weights.checkpoint import Checkpoint, open_checkpoint

from .goals import judged

RESULTS = Path(__file__).resolve().parent.parent / "results" / "aggregate.jsonl"

#: Tokens of each prompt: all of them fit one step, so that all answers begin together.
PROMPT_TOKENS = 16


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.engine.aggregate", description=__doc__)
    parser.add_argument("--preset", nargs="+", default=["qwen3-0.6b", "qwen3.5-0.8b"], help="[dense and hybrid]")
    parser.add_argument("--quant", default="Q4_K_M", help="[Q4_K_M]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where models run [cpu]")
    parser.add_argument("--preset-folder", type=Path, help="where preset files are kept; default: the temporary folder")
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 2, 4, 8], help="[1 2 4 8]")
    parser.add_argument("--decode-tokens", type=int, default=48, help="of each answer [48]")
    parser.add_argument("--repetitions", type=int, default=3, help="[3]")
    parser.add_argument("--num-threads", type=int, help="default: the physical cores")
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows are appended here [results/aggregate.jsonl]")
    arguments = parser.parse_args()
    try:
        for preset in arguments.preset:
            model = preset_model(preset, arguments.quant, arguments.preset_folder, arguments.device)
            with open_checkpoint(model) if isinstance(model, str) else model as checkpoint:
                bytes_per_step, operations_per_token = work(checkpoint)
            config = EngineConfig(
                device=arguments.device,
                max_model_len=max(arguments.sequences)
                * (PROMPT_TOKENS + arguments.decode_tokens + 64),  # pages for all at once
                max_num_seqs=max(arguments.sequences),
                num_threads=arguments.num_threads,
            )
            with LLM.of(load_model(model, config)) as llm:
                rows = measure(
                    llm,
                    f"{preset} {arguments.quant}",
                    arguments.sequences,
                    arguments.decode_tokens,
                    arguments.repetitions,
                    bytes_per_step,
                    operations_per_token,
                )
            for row in rows:
                print(report(row), flush=True)
                if arguments.device == "cuda":
                    print("\n".join(map(str, judged(row))), flush=True)
                append_row(arguments.output, row)
    except HelexaError as error:
        print(f"benchmarks.engine.aggregate: error: {error}", file=sys.stderr)
        return 1
    return 0


def work(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes of weights that a step reads, and multiplications and additions of one token; of a model without experts."""
    has_head = any(tensor.name == "lm_head.weight" for tensor in checkpoint.tensors)
    matrices = [
        tensor
        for tensor in checkpoint.tensors
        if len(tensor.shape) == 2 and not (has_head and tensor.name == "model.embed_tokens.weight")
    ]
    return decode_bytes(checkpoint.tensors), 2 * sum(math.prod(tensor.shape) for tensor in matrices)


def measure(
    llm: LLM,
    name: str,
    sequences: list[int],
    decode_tokens: int,
    repetitions: int,
    bytes_per_step: int,
    operations_per_token: int,
) -> list[dict[str, Any]]:
    """A row for each number of sequences, measured in turn, so that what the machine does meanwhile happens to all."""
    native = require_native()
    prompts = Prompts(llm)
    for count in sequences:
        step_seconds(llm, prompts, count, min(decode_tokens, 8))  # warm-up
    limits = Limits(llm.model_info.device)
    limits.measure()
    samples: dict[int, list[float]] = {count: [] for count in sequences}
    for _ in range(repetitions):
        for count in sequences:
            samples[count].append(step_seconds(llm, prompts, count, decode_tokens))
    limits.measure()
    bandwidth, rate = statistics.mean(limits.bandwidths), statistics.mean(limits.matmul_rates)
    stamp = machine.stamp(native)
    stamp["machine"] |= limits.described
    rate_name = "int8_operations_per_second" if llm.model_info.device == "cpu" else "matmul_operations_per_second"
    single = statistics.median(samples[min(sequences)]) / min(sequences)
    rows = []
    for count in sequences:
        seconds = statistics.median(samples[count])
        roofline = max(bytes_per_step / bandwidth, count * operations_per_token / rate)
        rows.append(
            {
                "benchmark": "aggregate",
                "model": name,
                **stamp,
                "repetitions": repetitions,
                "read_bytes_per_second": round(bandwidth),
                rate_name: round(rate),
                "sequences": count,
                "decode_tokens": decode_tokens,
                "tokens_per_second": round(count / seconds, 2),
                "samples": [round(count / sample, 2) for sample in samples[count]],
                "times_single": round(count / seconds * single, 3),
                "share_of_roofline": round(roofline / seconds, 3),
                "share_of_bandwidth": round(bytes_per_step / bandwidth / seconds, 3),
            }
        )
    return rows


def step_seconds(llm: LLM, prompts: Prompts, count: int, decode_tokens: int) -> float:
    """Seconds of a step in which ``count`` answers get a token each, over ``decode_tokens`` steps behind the first token."""
    params = SamplingParams(max_tokens=decode_tokens + 1, temperature=0.0, ignore_eos=True)
    results = llm.generate([prompts.draw(PROMPT_TOKENS) for _ in range(count)], params)
    assert all(len(result.token_ids) == decode_tokens + 1 for result in results)
    return max(result.timings.decode_seconds for result in results) / decode_tokens


def report(row: dict[str, Any]) -> str:
    """The row for people."""
    return (
        f"{row['model']}: {row['sequences']} together {row['tokens_per_second']:.1f} tokens/s, {row['times_single']:.2f}x one; "
        f"{row['share_of_roofline']:.0%} of the roofline; {row['threads']} threads"
    )


if __name__ == "__main__":
    sys.exit(main())
