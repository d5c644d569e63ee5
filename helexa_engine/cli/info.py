"""``helexa info MODEL``: what a file or folder holds, from its headers alone."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from typing import Any

from ..errors import TemplateRenderFailed, UnsupportedCheckpoint
from .options import model_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=".gguf file, HuggingFace folder, or demo")
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
        heads = config["num_attention_heads"]
        return {
            "path": str(checkpoint.path),
            "architecture": checkpoint.architecture,
            "file_bytes": checkpoint.nbytes,
            "parameters": parameters.total(),
            "bits_per_weight": round(8 * nbytes.total() / parameters.total(), 2),
            "types": {name: {"parameters": parameters[name], "bytes": count} for name, count in nbytes.most_common()},
            "layers": checkpoint.num_layers,
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"],
            "attention_heads": heads,
            "kv_heads": config.get("num_key_value_heads", heads),
            "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
            "context": config["max_position_embeddings"],
            "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
            "sampling_defaults": {k: v for k, v in checkpoint.generation_config.items() if not k.endswith("token_id")},
            "template": _capabilities(checkpoint.chat_template),
        }


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
            f"{facts['layers']} layers, hidden {facts['hidden_size']}, feed-forward {facts['intermediate_size']}, "
            f"{facts['attention_heads']} heads over {facts['kv_heads']} KV heads of {facts['head_dim']}, "
            f"{'tied' if facts['tied_embeddings'] else 'separate'} output head",
        ),
        ("context", f"{facts['context']} tokens"),
        ("template", "none: chat is not possible" if template is None else ", ".join(template) or "plain turns"),
    ]
    if facts["sampling_defaults"]:
        lines.append(
            ("sampling", ", ".join(f"{key} {_short(value)}" for key, value in facts["sampling_defaults"].items()))
        )
    return "\n".join(f"{title:>13}  {text}" for title, text in lines)


def _count(number: int) -> str:
    for scale, letter in ((1e9, "billion"), (1e6, "million")):
        if number >= scale:
            return f"{number / scale:.2f} {letter}"
    return str(number)


def _short(value: Any) -> str:
    """A float32 from the file without the digits that float64 adds."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
