"""A HuggingFace folder's tokenizer as GGUF metadata: the reverse of :meth:`Tokenizer.from_gguf`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnsupportedCheckpoint
from .tokenizer import CONTROL, NORMAL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, Tokenizer, read_json


def tokenizer_metadata(folder: Path, vocab_size: int, chat_template: str | None) -> dict[str, Any]:
    """The ``tokenizer.*`` keys.

    Args:
        folder: holds ``tokenizer.json`` and, besides, what :meth:`Tokenizer.from_folder` reads.
        vocab_size: rows of the embedding table; ids that the tokenizer has not become unused entries, as llama.cpp names them.
        chat_template: Jinja source.

    Raises:
        UnsupportedCheckpoint: there is no tokenizer that helexa reads, its pre-tokenizer has no name in GGUF, or it has more
            tokens than the table has rows.
    """
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_fits(vocab_size)
    where = str(folder / "tokenizer.json")
    spec = read_json(folder / "tokenizer.json")
    assert spec is not None  # it was read a moment ago
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = np.full(vocab_size, UNUSED, np.int32)
    for word, token_id in spec["model"]["vocab"].items():
        tokens[token_id], kinds[token_id] = word, NORMAL
    for token_id, added in tokenizer.added_tokens.items():
        tokens[token_id], kinds[token_id] = added.content, CONTROL if added.special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    made: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer_name(spec, where),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
    }
    ends = tokenizer.eos_token_ids
    for key, value in (
        ("eos_token_id", ends[0] if ends else None),
        ("bos_token_id", tokenizer.bos_token_id),
        ("padding_token_id", tokenizer.pad_token_id),
    ):
        if value is not None:
            made[f"tokenizer.ggml.{key}"] = value
    if chat_template:
        made["tokenizer.chat_template"] = chat_template
    return made


def _pre_tokenizer_name(spec: Mapping[str, Any], where: str) -> str:
    """GGUF's name of the regular expression that the pre-tokenizer splits by."""
    patterns = _patterns(spec.get("pre_tokenizer"))
    for name, pattern in PRE_TOKENIZERS.items():
        if patterns == [pattern]:
            return name
    raise UnsupportedCheckpoint(
        f"GGUF has no name that helexa knows for the pre-tokenizer {' '.join(patterns)!r:.200}; known are "
        f"{', '.join(PRE_TOKENIZERS)}",
        where,
    )


def _patterns(part: Any) -> list[str]:
    """The regular expressions of all Split steps, in order."""
    if not isinstance(part, Mapping):
        return []
    if part.get("type") == "Sequence":
        return [pattern for step in part.get("pretokenizers") or () for pattern in _patterns(step)]
    pattern = part.get("pattern")
    return [str(pattern.get("Regex"))] if part.get("type") == "Split" and isinstance(pattern, Mapping) else []
