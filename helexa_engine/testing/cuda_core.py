"""The CUDA kernels as tests call them: on a card, or on a CPU under the emulation of ``csrc/simt``, with the same arrays."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from helexa_engine.ops import cuda

Array = npt.NDArray[Any]

BUILD_FOLDER = Path(__file__).resolve().parents[2] / "build"


@cache
def emulation() -> ModuleType | None:
    """The module ``_simt``, which ``scripts/build_native`` builds; None where it has not been."""
    for path in BUILD_FOLDER.glob("_simt.*.so"):
        spec = importlib.util.spec_from_file_location("_simt", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return None


class EmulatedCore:
    """The kernels under emulation. Arrays lie between pages that nothing may touch.

    Args:
        at_front: arrays begin right behind such a page, so that an access before one is found; else they end right before one.
        thread_order: see ``_simt.set_thread_order``.
    """

    def __init__(self, *, at_front: bool, thread_order: int) -> None:
        module = emulation()
        assert module is not None, "the emulation is not built"
        self.kernels: Any = module
        self._at_front = at_front
        module.set_thread_order(thread_order)

    def put(self, array: Array) -> Array:
        """A copy of ``array`` that kernels may be given."""
        memory = self.kernels.Guarded(array.nbytes, self._at_front)
        placed = np.frombuffer(memory, dtype=np.uint8)[: array.nbytes].view(array.dtype).reshape(array.shape)
        placed[...] = array
        return placed

    def address(self, placed: Array) -> int:
        """What a kernel takes for what :meth:`put` gave."""
        return placed.ctypes.data

    def get(self, placed: Array) -> Array:
        """What is there when the kernels so far have ended."""
        return placed.copy()


class CardCore:
    """The kernels on the first CUDA device; arrays are torch tensors there."""

    def __init__(self) -> None:
        from helexa_engine.ops.registry import require_native

        self.kernels: Any = require_native().cuda

    def put(self, array: Array) -> Any:
        """A copy of ``array`` on the device."""
        import torch

        flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return flat.to("cuda"), array.dtype, array.shape

    def address(self, placed: Any) -> int:
        """What a kernel takes for what :meth:`put` gave."""
        address: int = placed[0].data_ptr()
        return address

    def get(self, placed: Any) -> Array:
        """What is there when the kernels so far have ended."""
        tensor, dtype, shape = placed
        copied: Array = tensor.cpu().numpy().view(dtype).reshape(shape)
        return copied


@contextmanager
def emulated_cuda(*, thread_order: int = 0) -> Iterator[None]:
    """Lets ops and models that are built for ``"cuda"`` run on this CPU under the emulation: their tensors are CPU tensors. Slow;
    for tiny shapes. Skips nothing: see :func:`emulation` for whether it is built."""
    module = emulation()
    assert module is not None, "the emulation is not built"
    module.set_thread_order(thread_order)
    with cuda.emulated(module):
        yield
