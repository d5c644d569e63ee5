"""``helexa bench``: prefill and decode speed of one model, each beside the memory bandwidth measured in the same run.

Decode reads every weight once a token, so ``bandwidth / bytes per token`` is its limit; the share of it that is reached and the
overhead per layer ``(seconds per token - bytes / bandwidth) / layers`` say what a bare tokens/s cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache.spec import PAGE_SIZE
from ..config import EngineConfig, add_flags
from ..errors import BackendUnavailable, InvalidRequest
from ..ops.cuda import torch_device
from ..sampling_params import SamplingParams
from . import device_ceilings, machine
from .options import UsageError, add_config_flag, model_path, resolve_config

if TYPE_CHECKING:
    from ..llm import LLM
    from ..weights.checkpoint import Checkpoint
    from ..weights.raw_tensor import RawTensor

#: Room beside prompt and answer, so that no run ends at the context's border.
_SPARE_TOKENS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=".gguf file, HuggingFace folder, hub id, or demo")
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="a published shape with random weights instead: qwen3-0.6b, qwen3.5-4b, qwen3-30b-a3b ...",
    )
    parser.add_argument(
        "--preset-folder",
        metavar="DIR",
        type=Path,
        help="where preset files are written and kept; default: the temporary folder",
    )
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=_positive, nargs="+", default=[512], help="lengths of the prompts [512]"
    )
    parser.add_argument(
        "--decode-tokens", metavar="N", type=_positive, default=64, help="tokens generated in a run [64]"
    )
    parser.add_argument(
        "--decode-context", metavar="N", type=int, default=0, help="tokens in the context when they are generated [0]"
    )
    parser.add_argument(
        "--repetitions", metavar="N", type=_positive, default=5, help="runs, of which the median counts [5]"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="append the result as one line of JSON")
    add_config_flag(parser)
    add_flags(parser, EngineConfig)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def run(arguments: argparse.Namespace) -> int:
    config = resolve_config(arguments, "engine", EngineConfig)
    if (arguments.model is None) == (arguments.preset is None):
        raise UsageError("expected either MODEL or --preset NAME")
    model, name = arguments.model, arguments.model
    if arguments.preset is not None:
        quant = config.quant or "Q4_K_M"
        model = preset_model(arguments.preset, quant, arguments.preset_folder, config.device)
        name = f"{arguments.preset} {quant}"
        config = dataclasses.replace(config, quant=None)
    row = measure(
        model,
        config,
        name=name,
        prompt_tokens=arguments.prompt_tokens,
        decode_tokens=arguments.decode_tokens,
        decode_context=arguments.decode_context,
        repetitions=arguments.repetitions,
    )
    print(report(row))
    if arguments.json is not None:
        append_row(arguments.json, row)
    return 0


def preset_model(preset: str, quant: str, folder: Path | None, device: str) -> str | Checkpoint:
    """The preset as :func:`measure` takes it: in memory where it is to run on ``"cuda"`` and no folder is named, else as a file."""
    if device == "cuda" and folder is None:
        from ..presets import PresetCheckpoint

        return PresetCheckpoint(preset, quant)
    return str(preset_file(preset, quant, folder))


def preset_file(preset: str, quant: str, folder: Path | None = None) -> Path:
    """The preset as a GGUF file in ``folder`` (default: under the temporary folder), written now unless it is there."""
    from ..presets import write_preset_gguf
    from .loading import progress

    folder = folder or Path(tempfile.gettempdir()) / "helexa-presets"
    path = folder / f"{preset}-{quant.upper()}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with progress(f"writing {path}") as tell:
            write_preset_gguf(path, preset, quant, progress=lambda fraction: tell("random weights", fraction))
    return path


def measure(
    model: str | Checkpoint,
    config: EngineConfig,
    *,
    name: str,
    prompt_tokens: int | Sequence[int],
    decode_tokens: int,
    repetitions: int,
    decode_context: int = 0,
) -> dict[str, Any]:
    """Loads ``model`` and runs it. Returns the row that ``--json`` writes; benchmarks/README.md explains its fields.

    Of several lengths of prompts the first is the row's ``prefill_tokens``; all stand in ``prefills``.

    Raises:
        BackendUnavailable: the native core is missing, without which a figure would mean nothing.
        HelexaError: the model cannot be loaded.
    """
    try:
        from .. import _native
    except ImportError as error:
        raise BackendUnavailable(f"bench needs the native core ({error}); `helexa doctor` says how to get it") from None
    from ..weights.checkpoint import Checkpoint, open_checkpoint
    from .loading import load

    lengths = [prompt_tokens] if isinstance(prompt_tokens, int) else list(prompt_tokens)
    context = max(decode_context, 1)  # something has to be there
    wanted_len = max(*lengths, context + decode_tokens) + _SPARE_TOKENS
    if config.max_model_len is None:
        # Only the pages that the runs need are reserved, so that resident memory shows the weights.
        config = dataclasses.replace(config, max_model_len=wanted_len, max_num_seqs=1)
    elif config.max_model_len < wanted_len:
        raise InvalidRequest(
            "max_model_len", f"expected at least {wanted_len} for this benchmark, got {config.max_model_len}"
        )
    opened = model if isinstance(model, Checkpoint) else open_checkpoint(model_path(model, offline=config.offline))
    with opened as checkpoint:
        num_layers = checkpoint.num_layers
        bytes_per_token = decode_bytes(checkpoint.tensors, int(checkpoint.config.get("num_experts_per_tok") or 0))
        file_bytes = checkpoint.nbytes
        operations = [prefill_operations(checkpoint, tokens) for tokens in lengths]

    before = machine.resident_bytes()
    started = time.perf_counter()
    stages = Stages()
    loading = load(model, config, stages) if isinstance(model, str) else _load_made(model, name, config, stages)
    with loading as llm:
        load_seconds = time.perf_counter() - started
        resident = machine.resident_bytes()
        limits = Limits(llm.model_info.device)
        prompts = Prompts(llm)
        for tokens in lengths:
            _prefill(llm, prompts.draw(tokens))  # warm-up: first touches of pages and workspaces
        _decode(llm, prompts.draw(1), min(decode_tokens, 8))
        limits.measure()
        prefills = [[_prefill(llm, prompts.draw(tokens)) for _ in range(repetitions)] for tokens in lengths]
        kernels = _native.kernel_seconds()
        decode = [_decode(llm, prompts.draw(context), decode_tokens) for _ in range(repetitions)]
        in_kernels = (_native.kernel_seconds() - kernels) / (repetitions * (decode_tokens + 1))  # of a step
        limits.measure()

        info, kv_tokens = llm.model_info, llm.stats().kv_pages_total * PAGE_SIZE

    kv_bytes = round(info.kv_bytes / kv_tokens * (context + decode_tokens / 2))  # of the step in the middle
    step_bytes = bytes_per_token + kv_bytes
    if info.device == "cuda":  # a step's states are read and written
        step_bytes += 2 * (info.state_bytes // config.max_num_seqs)
    read = statistics.mean(limits.bandwidths)
    token_seconds = statistics.median(decode) / decode_tokens
    rates = [tokens / statistics.median(samples) for tokens, samples in zip(lengths, prefills, strict=True)]
    outside = round(1 - in_kernels / (statistics.mean(decode) / decode_tokens), 4)
    row = {
        "benchmark": "engine",
        "engine": "helexa",
        "model": name,
        **machine.stamp(_native),
        "repetitions": repetitions,
        "read_bytes_per_second": round(read),
        "file_bytes": file_bytes,
        "load_seconds": round(load_seconds, 3),
        "load_stage_seconds": stages.seconds,
        **({"mmap_experts": True} if config.mmap_experts else {}),
        "resident_bytes": resident.get("total"),
        "resident_bytes_before_load": before.get("total"),
        "prefill_tokens": lengths[0],
        "prefill_tokens_per_second": round(rates[0], 2),
        "prefill_samples": [round(lengths[0] / seconds, 2) for seconds in prefills[0]],
        "decode_tokens": decode_tokens,
        "decode_context": decode_context,
        "decode_tokens_per_second": round(1 / token_seconds, 2),
        "decode_samples": [round(decode_tokens / seconds, 2) for seconds in decode],
        "decode_bytes_per_token": bytes_per_token,
        "kv_dtype": info.kv_dtype,
        "decode_kv_bytes_per_token": kv_bytes,
        "decode_share_of_bandwidth": round(step_bytes / token_seconds / read, 3),
        # Behind a long prompt the kernels' time is not the steps' alone; on a device they are not the core's that is timed here.
        **({} if decode_context or info.device != "cpu" else {"decode_share_outside_kernels": outside}),
        "decode_overhead_per_layer_microseconds": round((token_seconds - step_bytes / read) / num_layers * 1e6, 1),
    }
    if info.device == "cpu":
        return row
    multiply = statistics.mean(limits.matmul_rates)
    row["machine"] |= limits.described
    return row | {
        "decode_state_bytes_per_token": step_bytes - bytes_per_token - kv_bytes,
        "weights_shared": not isinstance(model, str),  # then the time of the load says nothing
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "matmul_operations_per_second": round(multiply),
        "prefills": [
            {
                "tokens": tokens,
                "tokens_per_second": round(rate, 1),
                "share_of_matmul_rate": round(count * rate / tokens / multiply, 3),
                "samples": [round(tokens / seconds, 1) for seconds in samples],
            }
            for tokens, rate, count, samples in zip(lengths, rates, operations, prefills, strict=True)
        ],
    }


class Limits:
    """The ceilings of where a model runs, of each time that they were measured.

    Attributes:
        bandwidths: bytes a second; of the processor read, of a device read and written.
        matmul_rates: operations a second: of the processor in int8, of a device in bfloat16.
        described: what the row says of the device.
    """

    def __init__(self, device: str) -> None:
        self._device = None if device == "cpu" else torch_device(device)
        self.bandwidths: list[float] = []
        self.matmul_rates: list[float] = []
        self.described: dict[str, Any] = {}
        if self._device is not None:
            self.described = device_ceilings.describe(self._device)

    def measure(self) -> None:
        from .. import _native

        if self._device is None:
            self.bandwidths.append(_native.read_bandwidth())
            self.matmul_rates.append(_native.int8_rate())
        else:
            self.bandwidths.append(device_ceilings.copy_bandwidth(self._device))
            self.matmul_rates.append(device_ceilings.matmul_rate(self._device))


@contextlib.contextmanager
def _load_made(
    checkpoint: Checkpoint, name: str, config: EngineConfig, watch: Callable[[str, float], None]
) -> Iterator[LLM]:
    """A model that is no file, loaded as :func:`.loading.load` loads one."""
    from ..llm import LLM
    from ..runtime.load import load_model
    from .loading import progress

    with progress(f"loading {name}") as report:

        def told(stage: str, fraction: float) -> None:
            report(stage, fraction)
            watch(stage, fraction)

        llm = LLM.of(load_model(checkpoint, config, told))
    try:
        yield llm
    finally:
        llm.close()


#: Operations of the delta rule for each value head and token (performance goals, "Limits").
_DELTA_RULE_OPERATIONS = 180e3


def prefill_operations(checkpoint: Checkpoint, tokens: int) -> float:
    """Multiplications and additions that a prompt takes: of the matrices, but for the head, which one row meets; of attention, where a
    token sees those before it; of the delta rule."""
    config = checkpoint.config
    matrices = 0.0
    for tensor in checkpoint.tensors:
        if tensor.name in ("model.embed_tokens.weight", "lm_head.weight") or len(tensor.shape) < 2:
            continue
        parameters = float(math.prod(tensor.shape))
        if ".mlp.experts." in tensor.name:
            parameters *= int(config["num_experts_per_tok"]) / tensor.shape[0]
        matrices += parameters
    kinds = config.get("layer_types") or ["full_attention"] * checkpoint.num_layers
    num_delta = sum(kind == "linear_attention" for kind in kinds)
    attention_width = int(config["num_attention_heads"]) * int(config["head_dim"])
    attention: float = 4.0 * attention_width * (len(kinds) - num_delta) * tokens * (tokens + 1) / 2
    delta_rule: float = _DELTA_RULE_OPERATIONS * int(config.get("linear_num_value_heads") or 0) * num_delta * tokens
    return 2 * matrices * tokens + attention + delta_rule


class Stages:
    """Seconds that each stage of a load took, as its progress tells them; what was before the first is ``imports``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "imports", time.perf_counter()

    def __call__(self, stage: str, fraction: float) -> None:
        if stage != self._stage:
            now = time.perf_counter()
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + now - self._since, 3)
            self._stage, self._since = stage, now


class Prompts:
    """Random prompts, no two alike, of ordinary tokens."""

    def __init__(self, llm: LLM, seed: int = 0) -> None:
        self._vocab_size = llm.vocab_size
        self._random = random.Random(seed)

    def draw(self, length: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(length)]


def _prefill(llm: LLM, prompt: Sequence[int]) -> float:
    """Seconds from handing the prompt in to having the first token."""
    started = time.perf_counter()
    llm.generate(list(prompt), SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    return time.perf_counter() - started


def _decode(llm: LLM, prompt: Sequence[int], tokens: int) -> float:
    """Seconds of ``tokens`` decode steps: the first token belongs to the prompt and is not counted."""
    result = llm.generate(list(prompt), SamplingParams(max_tokens=tokens + 1, temperature=0.0, ignore_eos=True))
    assert len(result.token_ids) == tokens + 1
    return result.timings.decode_seconds


def decode_bytes(tensors: Iterable[RawTensor], experts_per_token: int = 0) -> int:
    """Bytes of weights that one decode step reads: all of them, but one row of an embedding table that is not also the head, and
    of the experts those that a token takes."""
    tensors = list(tensors)
    has_head = any(tensor.name == "lm_head.weight" for tensor in tensors)
    total = 0
    for tensor in tensors:
        if has_head and tensor.name == "model.embed_tokens.weight":
            total += tensor.nbytes // tensor.shape[0]
        elif ".mlp.experts." in tensor.name:
            total += tensor.nbytes // tensor.shape[0] * experts_per_token
        else:
            total += tensor.nbytes
    return total


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds one line of JSON to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def report(row: dict[str, Any]) -> str:
    """The row for people."""
    bandwidth = row["read_bytes_per_second"]
    machine_text = f"{row['machine']['cpu']}, {row['machine']['instruction_set']}, {row['threads']} threads"
    if (device := row["machine"].get("device")) is not None:
        rate = row["matmul_operations_per_second"] / 1e12
        machine_text = f"{device}, {row['machine']['instruction_set']}, multiplies bfloat16 at {rate:.0f} TFLOP/s"
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in row.get("load_stage_seconds", {}).items())
    lines = [
        ("model", f"{row['model']}, {row['file_bytes'] / 1e6:.0f} MB"),
        ("machine", f"{machine_text}; memory reads at {bandwidth / 1e9:.1f} GB/s"),
        ("load", f"{row['load_seconds']:.2f} s" + (f" ({stages})" if stages else "")),
    ]
    if row["resident_bytes"] is not None:
        before = row["resident_bytes_before_load"]
        lines.append(("resident", f"{row['resident_bytes'] / 1e6:.0f} MB, {before / 1e6:.0f} MB of it before loading"))
    outside = row.get("decode_share_outside_kernels")
    parts = ("decode_bytes_per_token", "decode_kv_bytes_per_token", "decode_state_bytes_per_token")
    limit = bandwidth / sum(row.get(part, 0) for part in parts)
    prefills = row.get("prefills") or [
        {"tokens": row["prefill_tokens"], "tokens_per_second": row["prefill_tokens_per_second"]}
    ]
    for prefill in prefills:
        share = prefill.get("share_of_matmul_rate")
        of_rate = "" if share is None else f", {share:.0%} of the multiply rate"
        lines.append((f"prefill {prefill['tokens']}", f"{prefill['tokens_per_second']:.1f} tokens/s{of_rate}"))
    lines += [
        (
            f"decode {row['decode_tokens']}" + (f"@{row['decode_context']}" if row["decode_context"] else ""),
            f"{row['decode_tokens_per_second']:.1f} tokens/s, {row['decode_share_of_bandwidth']:.0%} of the bandwidth's limit of "
            f"{limit:.1f}; overhead {row['decode_overhead_per_layer_microseconds']:.0f} us a layer"
            + (f"; {outside:.1%} of a step outside the kernels" if outside is not None else ""),
        ),
    ]
    return "\n".join(f"{title:>12}  {text}" for title, text in lines)
