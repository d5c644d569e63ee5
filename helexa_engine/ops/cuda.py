"""The compiled core's CUDA kernels, as the ops' ``cuda.py`` reach them: where they are, the device their tensors lie on, and the
stream they are queued on. In tests the emulation of ``csrc/simt`` stands in for a card, with tensors in this machine's memory."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable

if TYPE_CHECKING:
    import torch

#: The module that stands in for the core's kernels, see :func:`emulated`.
_emulation: Any = None


@functools.cache
def _compiled() -> Any | None:
    try:
        return getattr(importlib.import_module("helexa_engine._native"), "cuda", None)
    except ModuleNotFoundError:
        return None


def kernels() -> Any | None:
    """The module with every kernel's function (``csrc/cuda/bindings.cpp``); None in a build without nvcc."""
    return _emulation if _emulation is not None else _compiled()


def require_kernels() -> Any:
    """The same. Raises :class:`BackendUnavailable`."""
    found = kernels()
    if found is None:
        raise BackendUnavailable(
            "this build has no CUDA kernels: nvcc 12.8 or newer was not found when helexa was built; install the CUDA toolkit "
            "and install helexa again"
        )
    return found


def is_emulated() -> bool:
    """Whether a model on ``"cuda"`` computes under the emulation, with CPU tensors."""
    return _emulation is not None


def torch_device(device: str) -> torch.device:
    """Where tensors of a model on ``device`` (``"cpu"``, ``"cuda"``) lie."""
    import torch

    return torch.device("cpu" if _emulation is not None else device)


def stream(tensor: torch.Tensor) -> int:
    """The stream that torch would queue the next kernel on ``tensor`` on; 0 under the emulation."""
    if not tensor.is_cuda:
        return 0
    import torch

    return torch.cuda.current_stream(tensor.device).cuda_stream


@contextmanager
def emulated(module: Any) -> Iterator[None]:
    """Lets ``module`` (``_simt``) be what a model on ``"cuda"`` computes with. For tests; not for several threads."""
    global _emulation
    before, _emulation = _emulation, module
    try:
        yield
    finally:
        _emulation = before
