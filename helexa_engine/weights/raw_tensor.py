"""A tensor as a checkpoint stores it, and the few ways to make one out of others. Nothing is read before ``data`` is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedCheckpoint
from ..quant import types
from ..quant.dequantize import dequantize
from ..quant.types import QuantType

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as stored.

    Attributes:
        name: under which the checkpoint presents it.
        shape: PyTorch's order ([out, in]).
        source: uint8 as in a GGUF file of this type, usually a view of a map; or what makes it when it is wanted. Of a stack it
            may be [matrices, bytes of one], then not always contiguous.
        stored_names: tensors of the file that it is made of.
        scales: what the values are multiplied with besides: none, one, or of a stack one a matrix. They are not in ``data``.
    """

    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    source: np.ndarray | Callable[[], np.ndarray]
    stored_names: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """The name for a message, with the file's own where that is another."""
        stored = self.stored_names
        return (
            f"{self.name!r} (stored as {stored[0]!r})"
            if len(stored) == 1 and stored[0] != self.name
            else repr(self.name)
        )

    @property
    def data(self) -> np.ndarray:
        """uint8, as in a GGUF file of this type. A tensor made of others is made anew each time."""
        return self._made().reshape(-1)

    def members(self) -> np.ndarray:
        """A stack's matrices, uint8 [matrices, bytes of one]: a view of the file where it holds each in one piece."""
        return self._made().reshape(self.shape[0], -1)

    def _made(self) -> np.ndarray:
        return self.source() if callable(self.source) else self.source

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.quant_type.block_size * self.quant_type.block_bytes

    @property
    def row_bytes(self) -> int:
        return self.quant_type.row_bytes(self.shape[-1])

    def values(self) -> npt.NDArray[np.float32]:
        """float32 of ``shape``, without ``scales``."""
        if self.quant_type is types.F64:
            return self.data.view(np.float64).astype(np.float32).reshape(self.shape)
        return np.asarray(dequantize(self.quant_type, self.data, self.shape), np.float32)

    def presented(self, name: str, shape: tuple[int, ...] | None = None) -> RawTensor:
        """The same bytes under another name, or seen in another shape with as many values."""
        assert shape is None or math.prod(shape) == math.prod(self.shape)
        return replace(self, name=name, shape=self.shape if shape is None else shape)

    def rearranged(self, name: str, shape: tuple[int, ...], rows: Callable[[Bytes], Bytes]) -> RawTensor:
        """Some rows in some order: exact in every type, because no block spans two rows.

        ``rows`` maps uint8 [rows, row bytes] (all leading dimensions taken together) to the bytes of ``shape``; a slice stays a view.
        """

        def take() -> np.ndarray:
            return rows(self.data.reshape(-1, self.row_bytes)).reshape(-1)

        return replace(self, name=name, shape=shape, source=take)

    def mapped(self, name: str, function: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> RawTensor:
        """``function`` of the values, in float32."""
        assert not self.scales, self.name

        def compute() -> np.ndarray:
            return np.ascontiguousarray(function(self.values()), np.float32).reshape(-1).view(np.uint8)

        return replace(self, name=name, quant_type=types.F32, source=compute)


def stack(name: str, tensors: Sequence[RawTensor], where: str) -> RawTensor:
    """Tensors of one shape and type as one [len(tensors), *shape]. Raises :class:`UnsupportedCheckpoint` when they differ."""
    first = tensors[0]
    for tensor in tensors:
        if (tensor.shape, tensor.quant_type) != (first.shape, first.quant_type):
            raise UnsupportedCheckpoint(
                f"expected {first.quant_type} {list(first.shape)} as {first.name!r} has, got {tensor.quant_type} "
                f"{list(tensor.shape)}",
                f"{where}: tensor {tensor.name!r}",
            )

    assert not any(tensor.scales for tensor in tensors), name

    def join() -> np.ndarray:
        return np.concatenate([tensor.data.reshape(-1) for tensor in tensors])

    stored = tuple(stored_name for tensor in tensors for stored_name in tensor.stored_names)
    return RawTensor(name, first.quant_type, (len(tensors), *first.shape), join, stored)


def scaled(raw: RawTensor, scale: RawTensor, where: str) -> RawTensor:
    """``raw`` with the GGUF tensor ``NAME.scale`` that stands beside it: one number, or one for each matrix of a stack. They multiply
    its products, as llama.cpp does it; NVFP4 files have them.

    Raises:
        UnsupportedCheckpoint: it does not fit, or is no finite number.
    """
    place, count = f"{where}: tensor {scale.name!r}", math.prod(scale.shape)
    if len(raw.shape) < 2 or count not in (1, math.prod(raw.shape[:-2])):
        raise UnsupportedCheckpoint(
            f"expected the scale of a matrix, or one an expert; got {list(scale.shape)} for {list(raw.shape)}", place
        )
    if scale.quant_type is not types.F32 or not np.isfinite(values := scale.values()).all():
        raise UnsupportedCheckpoint(f"expected finite numbers in F32, got {scale.quant_type}", place)
    names = (*raw.stored_names, *scale.stored_names)
    return replace(raw, scales=tuple(values.reshape(-1).tolist()), stored_names=names)
