"""``helexa plan MODEL``: what loading it would take and give, from its headers alone."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig, add_flags, byte_size
from ..errors import InvalidRequest, ModelDoesNotFit
from .options import add_config_flag, resolve_config

if TYPE_CHECKING:
    from ..runtime.plan import ModelPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=".gguf file, HuggingFace folder, hub id, or demo")
    parser.add_argument(
        "--free-memory", metavar="SIZE", help="plan for a device with so much free (80GiB), which need not be here"
    )
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object, also when it does not fit")
    add_config_flag(parser)
    add_flags(parser, EngineConfig)


def run(arguments: argparse.Namespace) -> int:
    config = resolve_config(arguments, "engine", EngineConfig)
    try:
        facts = describe(arguments.model, config, free_memory=arguments.free_memory)
    except ModelDoesNotFit as error:
        if not arguments.json:
            raise
        print(json.dumps({"fits": False, "message": error.message} | error.facts))
        return 1
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else report(facts))
    return 0


def describe(model: str, config: EngineConfig, *, free_memory: str | None = None) -> dict[str, Any]:
    """The plan of :func:`..runtime.plan.plan_model` as the object that ``--json`` prints; all sizes in bytes.

    Args:
        free_memory: size of what may be taken; default: what the device has free.

    Raises:
        InvalidRequest: ``free_memory`` is no size.
        ModelNotFound, DownloadFailed: there is no such model.
        HelexaError: what loading it would raise before anything is loaded.
    """
    from ..ops.registry import native_core
    from ..runtime.locate import located_headers, model_name
    from ..runtime.plan import plan_model
    from ..weights.checkpoint import open_checkpoint

    if config.num_threads is not None and (core := native_core()) is not None:
        core.set_num_threads(config.num_threads)
    with located_headers(model, offline=config.offline) as path, open_checkpoint(path) as checkpoint:
        plan = plan_model(checkpoint, config, name=model_name(model, path), available=_free_bytes(free_memory))
        return facts_of(plan, config) | {"file_bytes": checkpoint.nbytes}


def _free_bytes(text: str | None) -> int | None:
    try:
        return None if text is None else byte_size(text)
    except ValueError:
        raise InvalidRequest("--free-memory", f"expected a size such as 80GiB, got {text!r}") from None


def facts_of(plan: ModelPlan, config: EngineConfig) -> dict[str, Any]:
    """A plan as the object that ``--json`` prints."""
    from ..cache.spec import PAGE_SIZE, StateCacheSpec
    from ..runtime.plan import instruction_set

    memory = plan.memory
    native = instruction_set() if any(c.implementation == "native" for c in plan.kernels.values()) else None
    return {
        "fits": True,
        "name": plan.name,
        "path": str(plan.path),
        "architecture": plan.architecture,
        "device": plan.device,
        "why_device": plan.why_device,
        "available_bytes": memory.available_bytes,
        "budget_bytes": int(memory.available_bytes * config.memory_fraction),
        "total_bytes": memory.total_bytes,
        "weight_bytes": memory.weight_bytes,
        "weight_types": plan.type_bytes,
        "mapped_bytes": memory.mapped_bytes,
        "kv_bytes": memory.kv_bytes,
        "kv_dtype": plan.kv_dtype,
        "kv_pages": memory.num_pages,
        "kv_page_bytes": memory.page_bytes,
        "page_tokens": PAGE_SIZE,
        "state_bytes": memory.state_bytes,
        "state_layers": sum(isinstance(spec, StateCacheSpec) for spec in plan.specs),
        "layers": len(plan.specs),
        "snapshot_bytes": memory.snapshot_bytes,
        "snapshots": memory.num_snapshots,
        "workspace_bytes": memory.workspace_bytes,
        "position_bytes": memory.position_bytes,
        "max_model_len": memory.max_model_len,
        "model_max_len": plan.config.max_position_embeddings,
        "vocab_size": plan.config.vocab_size,
        "max_num_seqs": config.max_num_seqs,
        "tokens_per_seq": min(memory.max_model_len, memory.num_pages // config.max_num_seqs * PAGE_SIZE),
        "quant": config.quant,
        "quant_cache": plan.from_quant_cache,
        "kernels": {
            op: {"implementation": choice.implementation, "why": choice.why} for op, choice in plan.kernels.items()
        },
        "instruction_set": None if native is None else native[0],
        "threads": None if native is None else native[1],
    }


def report(facts: dict[str, Any]) -> str:
    """The facts for people."""
    types = ", ".join(f"{name} {size(count)}" for name, count in facts["weight_types"].items())
    quantised = f", quantised to {facts['quant']} " + ("by way of the cache" if facts["quant_cache"] else "on loading")
    rows = [
        ("weights", facts["weight_bytes"], types + (quantised if facts["quant"] else "")),
        (
            "KV pages",
            facts["kv_bytes"],
            f"{facts['kv_pages']} of {facts['page_tokens']} tokens in {facts['kv_dtype']}, {size(facts['kv_page_bytes'])} each",
        ),
    ]
    if facts["state_bytes"]:
        rows.append(
            ("states", facts["state_bytes"], f"of {facts['max_num_seqs']} sequences in {facts['state_layers']} layers")
        )
    if facts["snapshots"]:
        rows.append(
            ("snapshots", facts["snapshot_bytes"], f"{facts['snapshots']} of such states, for the prefix cache")
        )
    rows += [
        ("workspace", facts["workspace_bytes"], "activations and logits of the largest step"),
        ("positions", facts["position_bytes"], "rotary angles and page tables"),
        ("together", facts["total_bytes"], f"of {size(facts['budget_bytes'])} that may be taken"),
    ]
    if facts["mapped_bytes"]:
        rows.append(
            ("in the file", facts["mapped_bytes"], "experts, read as they are used; nothing is reserved for them")
        )
    groups: dict[tuple[str, str], list[str]] = {}
    for op, choice in facts["kernels"].items():
        groups.setdefault((choice["implementation"], choice["why"]), []).append(op)
    level = f", {facts['instruction_set']} with {facts['threads']} threads"
    lines = [
        ("model", f"{facts['name']}, {facts['architecture']}, {size(facts['file_bytes'])} in {facts['path']}"),
        ("device", f"{facts['device']}, {size(facts['available_bytes'])} free"),
        *((title, f"{size(count):>10}  {note}") for title, count, note in rows),
        (
            "context",
            f"{facts['max_model_len']} tokens"
            + (
                ""
                if facts["max_model_len"] == facts["model_max_len"]
                else f"; the model allows {facts['model_max_len']}"
            ),
        ),
        ("sequences", f"{facts['max_num_seqs']} together, {facts['tokens_per_seq']} tokens each when all are as long"),
        *(
            ("kernels", f"{implementation} ({why}{level if implementation == 'native' else ''}): {', '.join(ops)}")
            for (implementation, why), ops in groups.items()
        ),
    ]
    return "\n".join(f"{title:>13}  {text}" for title, text in lines)


def size(count: int) -> str:
    """Bytes in the unit that suits: ``1.23 GiB``, ``45.6 MiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
