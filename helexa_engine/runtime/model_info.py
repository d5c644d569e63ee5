"""Facts about a loaded model, which anyone may hold: no torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..cache.spec import KvDtype

#: Called with (stage, share done from 0 to 1).
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a loaded model.

    Attributes:
        name: stem of the file, name of the folder, the hub id, or ``demo``.
        path: where it was loaded from.
        architecture: HuggingFace's ``model_type``.
        vocab_size: width of the logits.
        max_model_len: longest prompt plus answer, in tokens, derived from what fits.
        kv_dtype: storage type of keys and values.
        weight_bytes, kv_bytes, state_bytes, snapshot_bytes, workspace_bytes: memory taken by weights and reserved for KV pages,
            recurrent states, their snapshots in the prefix cache, and what a step needs.
        device: where it runs, ``cpu`` or ``cuda``.
        capabilities: what may be asked of it, as its chat template was seen to do.
    """

    name: str
    path: Path
    architecture: str
    vocab_size: int
    max_model_len: int
    weight_bytes: int
    kv_bytes: int
    kv_dtype: KvDtype
    state_bytes: int
    snapshot_bytes: int = 0
    workspace_bytes: int = 0
    device: str = "cpu"
    capabilities: dict[str, bool] = field(default_factory=dict)

    @property
    def reserved_bytes(self) -> int:
        """All of these."""
        reserved = self.kv_bytes + self.state_bytes + self.snapshot_bytes
        return self.weight_bytes + reserved + self.workspace_bytes

    @property
    def limit(self) -> dict[str, int]:
        """``{context, input, output}`` in tokens: an answer needs a prompt of at least one token, and the other way round."""
        context = self.max_model_len
        return {"context": context, "input": context - 1, "output": context - 1}
