"""helexa: run near-frontier open models on hardware you own.

``from helexa_engine import LLM, SamplingParams`` is the offline library, :class:`AsyncEngine` the one for servers. Importing this
package is cheap: torch and the compiled core are loaded when a model is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import EngineConfig
from .errors import (
    BackendUnavailable,
    ContextLengthExceeded,
    DeviceOutOfMemory,
    EngineDied,
    HelexaError,
    InvalidRequest,
    ModelDoesNotFit,
    ModelNotFound,
    Overloaded,
    TemplateRenderFailed,
    UnsupportedCheckpoint,
)
from .events import Completion, GenerationResult
from .generate_request import GenerateRequest
from .sampling_params import SamplingParams, StructuredOutput
from .version import __version__

if TYPE_CHECKING:
    from .llm import LLM
    from .runtime.async_engine import AsyncEngine

__all__ = [
    "LLM",
    "AsyncEngine",
    "BackendUnavailable",
    "Completion",
    "ContextLengthExceeded",
    "DeviceOutOfMemory",
    "EngineConfig",
    "EngineDied",
    "GenerateRequest",
    "GenerationResult",
    "HelexaError",
    "InvalidRequest",
    "ModelDoesNotFit",
    "ModelNotFound",
    "Overloaded",
    "SamplingParams",
    "StructuredOutput",
    "TemplateRenderFailed",
    "UnsupportedCheckpoint",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from .llm import LLM

        return LLM
    if name == "AsyncEngine":
        from .runtime.async_engine import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
