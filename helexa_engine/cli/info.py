"""``helexa info MODEL``: what a file or folder holds, from its headers alone."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..cache.spec import KV_DTYPES, PAGE_SIZE, AttentionCacheSpec
from ..errors import TemplateRenderFailed, UnsupportedCheckpoint
from .options import model_path

if TYPE_CHECKING:
    from ..weights.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=".gguf file, HuggingFace folder, hub id, or demo")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")


def run(arguments: argparse.Namespace) -> int:
    facts = describe(arguments.model)
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else report(facts))
    return 0


def describe(model: str) -> dict[str, Any]:
    """The facts of a checkpoint. Reads headers only.

    Raises:
        ModelNotFound: no such file or folder.
        UnsupportedCheckpoint: it is malformed, or of an architecture that helexa does not know.
    """
    from ..weights.checkpoint import open_checkpoint

    with open_checkpoint(model_path(model)) as checkpoint:
        config = checkpoint.config
        if not config:
            raise UnsupportedCheckpoint(f"architecture {checkpoint.architecture!r} is not supported", checkpoint.where)
        parameters: Counter[str] = Counter()
        nbytes: Counter[str] = Counter()
        for tensor in checkpoint.tensors:
            parameters[tensor.quant_type.name] += math.prod(tensor.shape)
            nbytes[tensor.quant_type.name] += tensor.nbytes
        number = partial(_integer, config, checkpoint.where)
        heads, hidden = number("num_attention_heads"), number("hidden_size")
        return {
            "path": str(checkpoint.path),
            "architecture": checkpoint.architecture,
            "file_bytes": checkpoint.nbytes,
            "parameters": parameters.total(),
            "bits_per_weight": round(8 * nbytes.total() / max(1, parameters.total()), 2),
            "types": {name: {"parameters": parameters[name], "bytes": count} for name, count in nbytes.most_common()},
            "layers": number("num_hidden_layers"),
            "delta_net_layers": _count_delta_nets(checkpoint),
            "hidden_size": hidden,
            "intermediate_size": _optional(config, number, "intermediate_size"),
            "experts": _experts(config, number),
            "attention_heads": heads,
            "kv_heads": number("num_key_value_heads", heads),
            "head_dim": number("head_dim", hidden // heads),
            "kv_bytes_per_token": _kv_bytes(checkpoint, number),
            "context": number("max_position_embeddings"),
            "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
            "unused": {
                kind: {"tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors)}
                for kind, tensors in checkpoint.unused.items()
            },
            "sampling_defaults": {k: v for k, v in checkpoint.generation_config.items() if not k.endswith("token_id")},
            "template": _capabilities(checkpoint.chat_template),
        }


def _kv_bytes(checkpoint: Checkpoint, number: Callable[..., Any]) -> dict[str, int]:
    """What a token of context takes, by the types that keys and values may have."""
    heads, hidden = number("num_attention_heads"), number("hidden_size")
    kv_heads, head_dim = number("num_key_value_heads", heads), number("head_dim", hidden // heads)
    layers = number("num_hidden_layers") - _count_delta_nets(checkpoint)
    return {
        dtype: layers * AttentionCacheSpec(kv_heads, head_dim, dtype).page_bytes // PAGE_SIZE
        for dtype in KV_DTYPES["cpu"]
        if dtype != "q8_0" or head_dim % 32 == 0
    }


def _count_delta_nets(checkpoint: Checkpoint) -> int:
    return sum(name.endswith(".linear_attn.out_proj.weight") for name in checkpoint.tensor_names())


_REQUIRED = object()


def _integer(config: Mapping[str, Any], where: str, key: str, default: Any = _REQUIRED) -> Any:
    """A positive integer of the config; ``default`` when it has none. Raises :class:`UnsupportedCheckpoint` naming the key."""
    value = config.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedCheckpoint(f"{key}: expected a positive integer, got {value!r:.80}", where)
    return value


def _optional(config: Mapping[str, Any], number: Callable[..., Any], key: str) -> Any:
    """As :func:`_integer`; None when the config says 0 or nothing."""
    return None if isinstance(config.get(key), int) and config[key] == 0 else number(key, None)


def _experts(config: Mapping[str, Any], number: Callable[..., Any]) -> dict[str, int] | None:
    """The mixture of experts; None without one."""
    if _optional(config, number, "num_experts") is None:
        return None
    facts = {key: number(key) for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}
    shared = "shared_expert_intermediate_size"
    return facts | {shared: _optional(config, number, shared) or 0}


def _capabilities(template: str | None) -> list[str] | None:
    """What the chat template was seen to do, in words; None without one."""
    if template is None:
        return None
    from ..text.chat_template import ChatTemplate

    try:
        found = ChatTemplate(template).capabilities
    except TemplateRenderFailed as error:
        return [f"does not compile: {error.message}"]
    words = {
        "system message": found.system,
        "later system messages": found.late_system,
        f"tools ({found.tool_syntax} calls)" if found.tool_syntax else "tools": found.tools,
        "parallel tool calls": found.parallel_tool_calls,
        "thinking": found.thinking,
    }
    return [word for word, has in words.items() if has]


def report(facts: dict[str, Any]) -> str:
    """The facts for people."""
    types = ", ".join(
        f"{name} {entry['bytes'] / 1e6:.1f} MB ({entry['bytes'] * 100 / sum(t['bytes'] for t in facts['types'].values()):.0f}%)"
        for name, entry in facts["types"].items()
    )
    template = facts["template"]
    lines = [
        ("path", facts["path"]),
        ("architecture", facts["architecture"]),
        ("parameters", f"{_count(facts['parameters'])}, {facts['bits_per_weight']:.2f} bits each"),
        ("size", f"{facts['file_bytes'] / 1e6:.1f} MB"),
        ("types", types),
        (
            "shape",
            f"{facts['layers']} layers{_mixers(facts)}, hidden {facts['hidden_size']}, {_feed_forward(facts)}, "
            f"{facts['attention_heads']} heads over {facts['kv_heads']} KV heads of {facts['head_dim']}, "
            f"{'tied' if facts['tied_embeddings'] else 'separate'} output head",
        ),
        ("context", f"{facts['context']} tokens"),
        (
            "KV cache",
            ", ".join(f"{count / 1024:.1f} KiB in {dtype}" for dtype, count in facts["kv_bytes_per_token"].items())
            + " a token",
        ),
        ("template", "none: chat is not possible" if template is None else ", ".join(template) or "plain turns"),
    ]
    if facts["unused"]:
        kinds = (
            f"{kind} ({entry['tensors']} tensors, {entry['bytes'] / 1e6:.1f} MB)"
            for kind, entry in facts["unused"].items()
        )
        lines.append(("not used", ", ".join(kinds)))
    if facts["sampling_defaults"]:
        lines.append(
            ("sampling", ", ".join(f"{key} {_short(value)}" for key, value in facts["sampling_defaults"].items()))
        )
    return "\n".join(f"{title:>13}  {text}" for title, text in lines)


def _mixers(facts: dict[str, Any]) -> str:
    count = facts["delta_net_layers"]
    return f" ({facts['layers'] - count} of attention, {count} of gated delta net)" if count else ""


def _feed_forward(facts: dict[str, Any]) -> str:
    experts = facts["experts"]
    if experts is None:
        return f"feed-forward {facts['intermediate_size']}"
    shared = experts["shared_expert_intermediate_size"]
    return (
        f"{experts['num_experts']} experts of {experts['moe_intermediate_size']}, {experts['num_experts_per_tok']} a token"
        f"{f' and a shared one of {shared}' if shared else ''}"
    )


def _count(number: int) -> str:
    for scale, letter in ((1e9, "billion"), (1e6, "million")):
        if number >= scale:
            return f"{number / scale:.2f} {letter}"
    return str(number)


def _short(value: Any) -> str:
    """A float32 from the file without the digits that float64 adds."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
