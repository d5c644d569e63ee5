"""``python -m benchmarks.engine.step_overhead``: what a decode step costs outside the native core's kernels, in microseconds.

The engine is stepped here, without a thread or a client: what is measured is the step itself. Text is made of its tokens
afterwards, and measured apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helexa_engine import SamplingParams
from helexa_engine.cli import machine
from helexa_engine.cli.bench import append_row, preset_file
from helexa_engine.config import EngineConfig
from helexa_engine.errors import HelexaError
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.ops.registry import require_native
from helexa_engine.runtime.load import LoadedModel, load_model

RESULTS = Path(__file__).resolve().parent.parent / "results" / "step_overhead.jsonl"

PROMPT_TOKENS = 7


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.engine.step_overhead", description=__doc__)
    parser.add_argument("--preset", nargs="+", default=["qwen3-0.6b", "qwen3.5-0.8b"], help="[dense and hybrid]")
    parser.add_argument("--quant", default="Q4_K_M", help="[Q4_K_M]")
    parser.add_argument("--preset-folder", type=Path, help="where preset files are kept; default: the temporary folder")
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8, 64], help="[1 8 64]")
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each [40]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest [0]")
    parser.add_argument("--num-threads", type=int, help="default: the physical cores")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="rows are appended here [results/step_overhead.jsonl]"
    )
    arguments = parser.parse_args()
    try:
        for preset in arguments.preset:
            path = preset_file(preset, arguments.quant, arguments.preset_folder)
            most = max(arguments.sequences)
            config = EngineConfig(
                max_model_len=max(64 * most, PROMPT_TOKENS + arguments.steps + 16),  # a page for each sequence at least
                max_num_seqs=most,
                max_num_batched_tokens=max(512, 64 + most, PROMPT_TOKENS * most),
                num_threads=arguments.num_threads,
            )
            loaded = load_model(path, config)
            try:
                for count in arguments.sequences:
                    row = {"benchmark": "step_overhead", "model": f"{preset} {arguments.quant}"}
                    row |= measure(loaded, count, arguments.steps, arguments.temperature)
                    print(report(row), flush=True)
                    append_row(arguments.output, row)
            finally:
                loaded.close(10.0)
    except HelexaError as error:
        print(f"benchmarks.engine.step_overhead: error: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def timed(place: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds what calls of ``place.name`` take to ``seconds[name]``."""
    function: Callable[..., Any] = getattr(place, name)

    def timing(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    setattr(place, name, timing)
    try:
        yield
    finally:
        delattr(place, name)


def measure(loaded: LoadedModel, count: int, steps: int, temperature: float) -> dict[str, Any]:
    """The row, but for the model's name: medians over ``steps`` decode steps of ``count`` sequences.

    It steps the engine on the engine's own thread, which would else see the work and step it too.
    """
    thread, row = loaded.thread, Future[dict[str, Any]]()

    def work() -> None:
        try:
            row.set_result(_measure(loaded, count, steps, temperature))
        except BaseException as error:
            row.set_exception(error)

    with thread._wake:
        thread._commands.append(work)
        thread._wake.notify()
    return row.result()


def _measure(loaded: LoadedModel, count: int, steps: int, temperature: float) -> dict[str, Any]:
    native = require_native()
    engine = loaded.thread._engine
    params = SamplingParams(max_tokens=steps + 3, temperature=temperature, seed=1, ignore_eos=True)
    makers = {}
    for i in range(count):
        prompt = [(31 * i + j) % loaded.tokenizer.vocab_size for j in range(PROMPT_TOKENS)]
        request = GenerateRequest(prompt=prompt, sampling_params=params)
        engine_request, makers[request.request_id] = loaded.prepare(request)
        engine.add_request(engine_request)
    for _ in range(2):  # the prompts, and a first step that may be recorded for replaying
        outputs = engine.step()
        for output in outputs:
            makers[output.request_id].push(output)
    assert len(outputs) == count, f"{len(outputs)} of {count} sequences have their pages"
    samples: list[dict[str, float]] = []
    for _ in range(steps):
        seconds: dict[str, float] = {}
        with (
            timed(engine.scheduler, "schedule", seconds),
            timed(engine.runner, "forward", seconds),
            timed(engine.runner, "device_logits", seconds),
            timed(engine.runner, "sample", seconds),
        ):
            kernels, started = native.kernel_seconds(), time.perf_counter()
            outputs = engine.step()
            whole = time.perf_counter() - started
        kernels = native.kernel_seconds() - kernels
        assert len(outputs) == count
        started = time.perf_counter()
        for output in outputs:
            makers[output.request_id].push(output)
        text = time.perf_counter() - started
        model = seconds["forward"] + seconds["device_logits"]
        sampling = seconds["sample"] - seconds["device_logits"]
        samples.append(
            {
                "step": whole,
                "host": whole - kernels,
                "schedule": seconds["schedule"],
                "batch": model - kernels,
                "sample": sampling,
                "rest": whole - model - seconds["schedule"] - sampling,
                "text": text,
            }
        )
    for request_id in makers:
        engine.abort(request_id)
    assert not engine.has_work
    medians = {part: statistics.median(sample[part] for sample in samples) for part in samples[0]}
    return {
        **machine.stamp(native),
        "sequences": count,
        "steps": steps,
        "temperature": temperature,
        **{f"{part}_microseconds": round(value * 1e6, 1) for part, value in medians.items()},
        "host_share": round(medians["host"] / medians["step"], 4),
    }


def report(row: dict[str, Any]) -> str:
    """The row for people."""
    parts = ", ".join(f"{part} {row[f'{part}_microseconds']:.0f}" for part in ("schedule", "batch", "sample", "rest"))
    return (
        f"{row['model']}: {row['sequences']} sequences, {row['host_microseconds']:.0f} us a step outside the kernels ({parts}), "
        f"{row['host_share']:.1%} of {row['step_microseconds'] / 1e3:.1f} ms; text {row['text_microseconds']:.0f} us"
    )


if __name__ == "__main__":
    sys.exit(main())
