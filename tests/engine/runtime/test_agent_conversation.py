"""An agent's conversation of thirty turns with tools: each token of it is computed once, or little more often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helexa_engine import LLM, SamplingParams
from helexa_engine.ops.registry import native_core
from helexa_engine.testing.checkpoints import write_folder

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32768,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
TURNS = 30

pytestmark = pytest.mark.skipif(native_core() is None, reason="20k tokens through the twins take minutes")


def messages_until(turn: int, said: list[str]) -> list[dict[str, Any]]:
    """Half of the tokens are the agent's instructions and tools, as agents have them; then a file is read in every turn."""
    messages = [
        {
            "role": "system",
            "content": "".join(
                f"Rule {i}: the tool file_{i} reads the file {i} and gives its text.\n" for i in range(250)
            ),
        },
        {"role": "user", "content": "Find out which page holds the fox."},
    ]
    for i in range(turn):
        messages.append({"role": "assistant", "content": said[i]})
        listing = "".join(
            f"{i}.{line} the quick brown fox jumps over page {(i * 7 + line) % 61}\n" for line in range(11)
        )
        messages.append({"role": "tool", "content": listing})
    return messages


@pytest.mark.parametrize("architecture", ["qwen3", "qwen35"])
def test_thirty_turns_and_a_branch_reuse_nineteen_of_twenty_prompt_tokens(architecture: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny", architecture, **SHAPE)
    with LLM(folder, max_model_len=24576, max_num_seqs=2) as llm:
        said: list[str] = []
        usages = []
        for turn in range(TURNS):
            result = llm.chat(messages_until(turn, said), GREEDY)
            usages.append(result.usage)
            said.append(result.text)
        branch = [*said[:11], "The fox is on none of these pages."]
        other = llm.chat(messages_until(12, branch), GREEDY)
        usages.append(other.usage)
        stats = llm.stats()
    assert 18_000 < usages[TURNS - 1].prompt_tokens < 24_000
    prompt_tokens, cached_tokens = sum(u.prompt_tokens for u in usages), sum(u.cached_tokens for u in usages)
    assert (stats.prefix_cache_queries_total, stats.prefix_cache_hits_total) == (prompt_tokens, cached_tokens)
    assert cached_tokens / prompt_tokens >= 0.95
    with LLM(folder, max_model_len=24576, max_num_seqs=2, prefix_cache=False) as cold:
        assert cold.chat(messages_until(12, branch), GREEDY).token_ids == other.token_ids
