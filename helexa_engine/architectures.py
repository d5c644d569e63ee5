"""The architectures that helexa knows, by GGUF's word for each, and what tells them apart."""

from __future__ import annotations

ARCHITECTURES = ("qwen3", "qwen3moe", "qwen3next", "qwen35", "qwen35moe")
#: With delta nets between the layers of attention.
HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")
#: With experts in place of the dense feed-forward.
MIXTURES = ("qwen3moe", "qwen3next", "qwen35moe")
#: Hybrids whose GGUF files have a delta net's value heads in tiled order.
TILED = ("qwen35", "qwen35moe")
