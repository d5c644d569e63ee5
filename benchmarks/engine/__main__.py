"""``python -m benchmarks.engine``: measures helexa and, beside it in the same run, llama.cpp; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from helexa_engine.cli import device_ceilings, machine
from helexa_engine.cli.bench import append_row, measure, preset_file, preset_model, report
from helexa_engine.config import EngineConfig
from helexa_engine.errors import HelexaError
from helexa_engine.ops.registry import require_native
from helexa_engine.runtime.cuda_device import require_cuda
from helexa_engine.weights.checkpoint import Checkpoint

from . import base, llama_cpp
from .busy import busy_processes
from .cases import GROUPS, ON_CARD, Case, is_recorded, rows_of
from .goals import judged

RESULTS = Path(__file__).resolve().parent.parent / "results" / "engine.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.engine", description=__doc__)
    parser.add_argument("models", metavar="FILE", nargs="*", help="GGUF files; default: the preset in each --quant")
    parser.add_argument("--preset", default="qwen3-0.6b", help="[qwen3-0.6b]")
    parser.add_argument("--quant", nargs="+", default=["Q8_0", "Q4_K_M"], help="[Q8_0 Q4_K_M]")
    parser.add_argument("--preset-folder", type=Path, help="where preset files are kept; default: the temporary folder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where models run [cpu]")
    parser.add_argument(
        "--group",
        nargs="+",
        choices=[*GROUPS, "card"],
        help="the rows of a group that this commit lacks instead; card: on cuda",
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row of a group after this time")
    parser.add_argument("--base", metavar="REV", help="time this commit and REV in turn instead, without a row")
    parser.add_argument(
        "--peer-llama-bench", metavar="PATH", type=Path, help="llama.cpp's llama-bench, run on the same files"
    )
    parser.add_argument("--num-threads", type=int, help="default: the physical cores")
    parser.add_argument("--memory-fraction", type=float, default=0.9, help="as of helexa serve [0.9]")
    parser.add_argument("--mmap-experts", action="store_true", help="as of helexa serve")
    parser.add_argument("--kv-dtype", default="auto", help="as of helexa serve [auto]")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512], help="several only on cuda [512]")
    parser.add_argument("--max-num-batched-tokens", type=int, help="as of helexa serve; default: 512, and 4096 on cuda")
    parser.add_argument("--decode-tokens", type=int, default=64, help="[64]")
    parser.add_argument("--decode-context", type=int, default=0, help="tokens in the context of a decode step [0]")
    parser.add_argument(
        "--busy-processes", type=int, default=0, help="others that compute meanwhile; groups say their own [0]"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="[5]")
    parser.add_argument(
        "--attempts",
        type=int,
        default=1,
        help="measure a pair again, so often in all, when memory's speed changed in it [1]",
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="rows are appended here [benchmarks/results/engine.jsonl]"
    )
    arguments = parser.parse_args()
    for name, least in (("attempts", 1), ("busy_processes", 0)):
        if (given := getattr(arguments, name)) < least:
            parser.error(f"argument --{name.replace('_', '-')}: expected at least {least}, got {given}")
    try:
        if arguments.group:
            return measure_groups(arguments)
        first, *more = arguments.prompt_tokens
        shape = (first, arguments.decode_tokens, arguments.decode_context, tuple(more), arguments.busy_processes)
        cases = [Case(arguments.preset, quant, *shape) for quant in arguments.quant]
        models: list[tuple[str, str | Checkpoint]] = [(Path(model).name, model) for model in arguments.models] or [
            (case.name, _model(case, arguments)) for case in cases
        ]
        for name, path in models:
            if arguments.base is not None:
                print(
                    f"{'model':>12}  {name}\n{base.compare(arguments.base, Path(str(path)), _options(arguments), arguments.repetitions)}"
                )
            else:
                measure_file(name, path, cases[0], arguments)
    except HelexaError as error:
        print(f"benchmarks.engine: error: {error}", file=sys.stderr)
        return 1
    return 0


def measure_groups(arguments: argparse.Namespace) -> int:
    """What is missing of the groups; 3 when the time was over before all was there."""
    started, commit, level = time.monotonic(), machine.commit(), require_native().cpu_isa()
    if arguments.device == "cuda":
        level = device_ceilings.describe(require_cuda())["instruction_set"]
    cases = [case for group in arguments.group for case in (ON_CARD if group == "card" else GROUPS[group])]
    for case in cases if arguments.device == "cpu" else ():  # writing presets is no part of the time
        preset_file(case.preset, case.quant, arguments.preset_folder)
    longest = 0.0
    for done, case in enumerate(cases):
        rows = rows_of(arguments.output)
        peer = arguments.peer_llama_bench is not None
        if is_recorded(case, rows, commit=commit, instruction_set=level, peer=peer):
            continue
        before = time.monotonic()
        if before - started + longest > arguments.seconds:
            print(f"{len(cases) - done} of {len(cases)} rows are still missing: run the same again", file=sys.stderr)
            return 3
        measure_file(case.name, _model(case, arguments), case, arguments)
        longest = max(longest, time.monotonic() - before)
    return 0


def _model(case: Case, arguments: argparse.Namespace) -> str | Checkpoint:
    return preset_model(case.preset, case.quant, arguments.preset_folder, arguments.device)


def measure_file(name: str, model: str | Checkpoint, case: Case, arguments: argparse.Namespace) -> None:
    """One row, and the peer's behind it. Both are written at once, so that a broken run leaves no half."""
    tokens = arguments.max_num_batched_tokens or (512 if arguments.device == "cpu" else 4096)
    config = EngineConfig(
        device=arguments.device,
        max_num_batched_tokens=tokens,
        num_threads=arguments.num_threads,
        memory_fraction=arguments.memory_fraction,
        mmap_experts=arguments.mmap_experts,
        kv_dtype=arguments.kv_dtype,
    )
    for attempt in range(1, arguments.attempts + 1):
        with busy_processes(case.busy_processes):
            rows = [_our_row(name, model, case, config, arguments.repetitions)]
            if arguments.peer_llama_bench is not None:
                rows.append(llama_cpp.measure(arguments.peer_llama_bench, Path(str(model)), rows[0]))
                print(llama_cpp.compare(*rows), flush=True)
        if attempt == arguments.attempts or len(rows) == 1 or not llama_cpp.memory_changed(*rows):
            break
    for row in rows:
        append_row(arguments.output, row)


def _our_row(name: str, model: str | Checkpoint, case: Case, config: EngineConfig, repetitions: int) -> dict[str, Any]:
    row = measure(
        model,
        config,
        name=name,
        prompt_tokens=[case.prompt_tokens, *case.more_prompts],
        decode_tokens=case.decode_tokens,
        decode_context=case.decode_context,
        repetitions=repetitions,
    )
    if case.busy_processes:
        row["busy_processes"] = case.busy_processes
    print(report(row), flush=True)
    if config.device == "cuda":
        print("\n".join(map(str, judged(row))), flush=True)
    return row


def _options(arguments: argparse.Namespace) -> list[str]:
    """The options of one turn of ``helexa bench``; ``--repetitions`` counts the turns."""
    names = ("decode_tokens", "num_threads", "memory_fraction")
    given = [(f"--{name.replace('_', '-')}", getattr(arguments, name)) for name in names]
    given.append(("--prompt-tokens", arguments.prompt_tokens[0]))
    if arguments.kv_dtype != "auto":
        given.append(("--kv-dtype", arguments.kv_dtype))
    if arguments.decode_context:
        given.append(("--decode-context", arguments.decode_context))
    options = [text for name, value in given if value is not None for text in (name, str(value))]
    return [*options, *(["--mmap-experts"] if arguments.mmap_experts else []), "--repetitions", "3"]


if __name__ == "__main__":
    sys.exit(main())
