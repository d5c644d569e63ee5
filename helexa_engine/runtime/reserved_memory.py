"""Memory that a loaded model keeps: taken whole before the first request, so that no request has to find any."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..ops.registry import native_core

_ALIGNMENT = 256
_HERE = torch.device("cpu")


class ReservedMemory:
    """Zeros for KV pages, states and snapshots, in one piece.

    Reserved means resident: Linux grants addresses without having memory for them, and would end the process when it comes to use
    them. So every page is made to exist here, by the kernel, which clears it anyway (nothing is written over that), on all threads and
    in huge pages where there are such. What does not fit fails now. Without the native core torch writes the zeros. On a device
    what was granted is there.

    Args:
        nbytes: of all tensors together.
        num_tensors: how many they will be; each begins at a boundary of 256 bytes.
        device: where they are.

    Raises:
        MemoryError: the system has not as much.
    """

    def __init__(self, nbytes: int, num_tensors: int, device: torch.device = _HERE) -> None:
        total = nbytes + num_tensors * _ALIGNMENT
        core = native_core()
        self._device = device
        self._memory: Any = None
        if device.type != "cpu":
            try:
                self._memory = torch.zeros(total, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError as error:
                raise MemoryError(str(error)) from None
        elif core is not None:
            self._memory = core.ZeroedMemory(total)
        self._used = 0

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of the next bytes, which it keeps alive. Raises ValueError when fewer were reserved."""
        count = math.prod(shape)
        if self._memory is None or count == 0:
            return torch.zeros(*shape, dtype=dtype, device=self._device)
        start = self._used
        self._used += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if isinstance(self._memory, torch.Tensor):
            if self._used > self._memory.numel():
                raise ValueError(f"{self._memory.numel()} bytes were reserved, {self._used} are asked for")
            return self._memory[start : start + count * dtype.itemsize].view(dtype).view(shape)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start).view(shape)
