"""The CUDA device of this process: whether models can run on it, and why not. Every refusal to use it is made here."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ..errors import BackendUnavailable
from ..ops import cuda

if TYPE_CHECKING:
    import torch

#: Device memory that no plan counts: what the libraries beside us load (cuBLAS and its workspace, torch's own kernels), graph
#: instances, and the pieces of 2 to 20 MiB that torch's allocator rounds up to. The context itself is there once the free bytes have
#: been asked for.
RESERVED_BYTES = 512 << 20


def diagnose() -> str | None:
    """None where models can run on CUDA; else what is in the way and what to do about it. Imports torch only where there are
    kernels and a driver."""
    if cuda.is_emulated():
        return None
    try:
        cuda.require_kernels()
    except BackendUnavailable as error:
        return error.message
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver here (libcuda.so.1 cannot be loaded)"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build of torch for CUDA 12.8 or newer"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: there is no NVIDIA card, no driver, or CUDA_VISIBLE_DEVICES hides it"
    return None


def require_cuda() -> torch.device:
    """Where tensors of a model on ``"cuda"`` lie. Raises :class:`BackendUnavailable` with what :func:`diagnose` finds."""
    if (reason := diagnose()) is not None:
        raise BackendUnavailable(f"device cuda: {reason}", device="cuda")
    return cuda.torch_device("cuda")


def free_bytes() -> int:
    """Bytes of the device that a model may take: what is free beside the context, less :data:`RESERVED_BYTES`. Under the emulation,
    this machine's. Raises :class:`BackendUnavailable`."""
    device = require_cuda()
    if device.type != "cuda":
        from .memory import available_bytes

        return available_bytes()
    import torch

    torch.cuda.empty_cache()  # of a model that has gone
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free - RESERVED_BYTES)


def name() -> str:
    """What messages call the device: ``cuda (NVIDIA H200)``. Raises :class:`BackendUnavailable`."""
    device = require_cuda()
    if device.type != "cuda":
        return "cuda (emulated)"
    import torch

    return f"cuda ({torch.cuda.get_device_name(device)})"
