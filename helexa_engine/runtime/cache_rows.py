"""The bytes of pages and state slots, wherever they are, for those who keep them elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from ..cache.spec import LayerCache

Bytes = npt.NDArray[np.uint8]


class CacheRows:
    """One tensor of a cache as rows of bytes, one a page or a slot.

    In this machine's memory :meth:`read` and :meth:`buffer` give the row itself; on a device they go by way of a copy.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._rows = tensor.flatten(1).view(torch.uint8)
        self._is_here = tensor.device.type == "cpu"
        self._buffer = None if self._is_here else np.empty(self.nbytes, np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return int(self._rows.shape[1])

    def read(self, row: int) -> Bytes:
        """A row's bytes [nbytes]."""
        bytes_: Bytes = self._rows[row].cpu().numpy()
        return bytes_

    def buffer(self, row: int) -> Bytes:
        """Where to put a row's new bytes [nbytes] before :meth:`write`; valid until the next call."""
        return self.read(row) if self._buffer is None else self._buffer

    def write(self, row: int) -> None:
        """Makes what is in the :meth:`buffer` the row."""
        if self._buffer is not None:
            self._rows[row].copy_(torch.from_numpy(self._buffer))


def cache_rows(caches: Sequence[LayerCache]) -> list[CacheRows]:
    """Every tensor of the caches, each of which has one row for a page, or for a slot."""
    return [CacheRows(getattr(cache, field.name)) for cache in caches for field in dataclasses.fields(cache)]
