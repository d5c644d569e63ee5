"""How much memory must be free for a model to be loaded, from its headers alone. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import EngineConfig
from ..errors import ModelDoesNotFit
from ..weights.checkpoint import Checkpoint, open_checkpoint
from .locate import located_headers
from .plan import plan_model

#: A context that others make room for, where none was asked for: what agents work with.
WANTED_TOKENS = 32768

_PLENTY = 1 << 60


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Free bytes that a load needs, of which it takes the share ``memory_fraction``.

    Attributes:
        least_bytes: with fewer it does not load at all.
        wanted_bytes: with these it has the context it was asked to have, else one of :data:`WANTED_TOKENS` or what the model allows.
    """

    least_bytes: int
    wanted_bytes: int


def memory_need(model: str | Path, config: EngineConfig) -> MemoryNeed:
    """Reads the headers of ``model``; blocks.

    Raises:
        HelexaError: what loading it would raise before anything is loaded, but for memory.
    """
    with located_headers(model, offline=config.offline) as path, open_checkpoint(path) as checkpoint:
        allowed = plan_model(checkpoint, config, name=path.name, available=_PLENTY).memory.max_model_len
        wanted = allowed if config.max_model_len is not None else min(allowed, WANTED_TOKENS)
        return MemoryNeed(
            _needed_bytes(checkpoint, config), _needed_bytes(checkpoint, replace(config, max_model_len=wanted))
        )


def _needed_bytes(checkpoint: Checkpoint, config: EngineConfig) -> int:
    try:
        plan_model(checkpoint, config, name="", available=0)
    except ModelDoesNotFit as error:
        return math.ceil(error.needed_bytes / config.memory_fraction)
    raise AssertionError("a model without weights")
