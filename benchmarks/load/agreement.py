"""Whether a load generator's counts and the server's are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def disagreements(
    records: Sequence[Mapping[str, Any]],
    counted: Mapping[str, int],
    *,
    requests: int,
    output_tokens: int,
    overhead: int,
) -> list[str]:
    """What differs, in words; nothing if all agrees.

    Args:
        records: AIPerf's ``profile_export.jsonl``, a request each.
        counted: what the server's ``/metrics`` counted meanwhile.
        requests, output_tokens: requests that were to be made, and tokens of each answer.
        overhead: tokens that the chat template puts around a user's text.
    """
    problems: list[str] = []

    def same(what: str, tool: int, ours: int) -> None:
        if tool != ours:
            problems.append(f"{what}: {tool} by the tool, {ours} by helexa")

    def of(record: Mapping[str, Any], name: str) -> int:
        return int(record["metrics"].get(name, {"value": -1})["value"])

    failed = [record for record in records if record.get("error")]
    problems += [f"a request failed: {record['error']}" for record in failed[:3]]
    answered = [record for record in records if not record.get("error")]
    same("requests", len(answered), requests)
    same("answers", len(answered), counted.get("vllm:request_success_total:length", 0))
    for name, counter in (("prompt", "vllm:prompt_tokens_total"), ("completion", "vllm:generation_tokens_total")):
        same(f"{name} tokens", sum(of(record, f"usage_{name}_tokens") for record in answered), counted[counter])
    for i, record in enumerate(answered):
        same(f"request {i}, tokens of its answer", output_tokens, of(record, "usage_completion_tokens"))
        # The tool encodes the prompt's text itself, with the model's tokenizer.
        same(
            f"request {i}, tokens of its prompt",
            of(record, "input_sequence_length") + overhead,
            of(record, "usage_prompt_tokens"),
        )
    return problems
