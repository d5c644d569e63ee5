"""Which class runs which architecture: one line each."""

from __future__ import annotations

from .config import check_architecture
from .decoder import Decoder
from .qwen3 import Qwen3
from .qwen3_5 import Qwen3_5
from .qwen3_5_moe import Qwen3_5Moe
from .qwen3_moe import Qwen3Moe
from .qwen3_next import Qwen3Next

#: GGUF's architecture string -> model.
MODELS: dict[str, type[Decoder]] = {
    "qwen3": Qwen3,
    "qwen3moe": Qwen3Moe,
    "qwen3next": Qwen3Next,
    "qwen35": Qwen3_5,
    "qwen35moe": Qwen3_5Moe,
}


def model_class(architecture: str, where: str) -> type[Decoder]:
    """The class for an architecture. Raises :class:`UnsupportedCheckpoint` with what there is."""
    check_architecture(architecture, where)
    return MODELS[architecture]
