"""The CUDA device of this process: whether models can run on it, and why not. Every refusal to use it is made here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import BackendUnavailable
from ..ops import cuda
from .cuda_facts import CudaFacts, Obstacle, gather, obstacle

if TYPE_CHECKING:
    import torch

#: Device memory that no plan counts: what the libraries beside us load (cuBLAS and its workspace, torch's own kernels), graph
#: instances, and the pieces of 2 to 20 MiB that torch's allocator rounds up to. The context itself is there once the free bytes have
#: been asked for.
RESERVED_BYTES = 512 << 20


def diagnose(facts: CudaFacts | None = None) -> Obstacle | None:
    """None where models can run on CUDA; else what is in the way and what to do about it.

    Judges by ``facts``; default: by those of this process. Then torch is imported, but only where nothing else is in the way.
    """
    if facts is not None:
        return obstacle(facts)
    if cuda.is_emulated():
        return None
    facts = gather()
    found = obstacle(facts)
    if found is not None:
        return found
    import torch

    if not torch.cuda.is_available():
        return Obstacle(
            "torch_sees_no_device",
            f"torch {torch.__version__} cannot use {facts.devices[0].name}, which helexa's own core sees",
            "python -c 'import torch; torch.cuda.init()' says why",
        )
    return obstacle(replace(facts, torch_architectures=tuple(torch.cuda.get_arch_list())))


def has_device() -> bool:
    """Whether this process has a device, whether or not models can run on it."""
    return bool(gather().devices)


def require_cuda() -> torch.device:
    """Where tensors of a model on ``"cuda"`` lie. Raises :class:`BackendUnavailable` with what :func:`diagnose` finds."""
    if (found := diagnose()) is not None:
        raise BackendUnavailable(f"device cuda: {found}", device="cuda", reason=found.reason)
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
