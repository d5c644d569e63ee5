"""The rows that the project keeps: which presets, types, prompts and contexts, in groups that are measured one after the other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One row: prefill of ``prompt_tokens``, then ``decode_tokens`` steps behind ``decode_context`` tokens; beside
    ``busy_processes`` that compute. On a card prompts of ``more_prompts`` too."""

    preset: str
    quant: str
    prompt_tokens: int = 512
    decode_tokens: int = 64
    decode_context: int = 0
    more_prompts: tuple[int, ...] = ()
    busy_processes: int = 0

    @property
    def name(self) -> str:
        return f"{self.preset} {self.quant}"

    def describes(self, row: dict[str, Any]) -> bool:
        """Whether ``row`` is of this case."""
        return (self.name, self.prompt_tokens, self.decode_tokens, self.decode_context, self.busy_processes) == (
            row["model"], row["prefill_tokens"], row["decode_tokens"], row.get("decode_context", 0), row.get("busy_processes", 0),
        )  # fmt: skip


SMALL = ("qwen3-0.6b", "qwen3.5-0.8b")
MEDIUM = ("qwen3-4b", "qwen3.5-4b")
QUANTS = ("Q8_0", "Q4_K_M", "Q4_0", "Q6_K", "IQ4_XS", "BF16")

GROUPS: dict[str, list[Case]] = {
    "small": [Case(preset, quant) for preset in SMALL for quant in QUANTS],
    "small-short": [Case(preset, quant, 64) for preset in SMALL for quant in QUANTS],
    "small-long": [Case(preset, quant, 4096, 64, 4096) for preset in SMALL for quant in QUANTS],
    "medium": [Case(preset, quant, 512, 32) for preset in MEDIUM for quant in QUANTS[:2]],
    "medium-short": [Case(preset, quant, 64, 32) for preset in MEDIUM for quant in QUANTS[:2]],
    "busy": [Case(preset, "Q4_K_M", busy_processes=1) for preset in SMALL],
    "experts": [Case("qwen3-30b-a3b", "Q4_K_M", 64, 32)],
}

#: What is measured on a card, what says most first: the shapes and types that goals are set for (``goals.py``).
ON_CARD = [
    Case(preset, quant, 512, 128, more_prompts=(4096, 16384))
    for quant, presets in {
        "Q4_K_M": ("qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3-8b", "qwen3.5-0.8b"),
        "Q8_0": ("qwen3.5-4b", "qwen3.5-27b", "qwen3.5-9b", "qwen3.5-35b-a3b", "qwen3.5-0.8b"),
        "BF16": ("qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b", "qwen3-0.6b", "qwen3.5-0.8b"),
    }.items()
    for preset in presets
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What has been recorded; nothing where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_recorded(
    case: Case, rows: list[dict[str, Any]], *, commit: str | None, instruction_set: str, peer: bool
) -> bool:
    """Whether ``rows`` have the case from this commit at this level, and the peer's row right behind it where one is asked for."""
    for row, following in zip_longest(rows, rows[1:]):
        ours = row["engine"] == "helexa" and row["commit"] == commit
        if ours and row["machine"]["instruction_set"] == instruction_set and case.describes(row):
            return not peer or (following is not None and following["engine"] != "helexa" and case.describes(following))
    return False
