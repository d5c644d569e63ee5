"""Writing GGUF files (version 3), one tensor in memory at a time.

    with GGUFWriter("model.gguf") as writer:
        writer.add_metadata("general.architecture", "qwen3")
        writer.add_tensor("token_embd.weight", types.Q8_0, (151936, 1024), make_blocks)

The file appears under its name when the block ends without an error, and not at all otherwise.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from helexa_engine.quant.types import QuantType
from helexa_engine.weights import gguf
from helexa_engine.weights.gguf import ARRAY, DEFAULT_ALIGNMENT, MAGIC, STRING

Array = npt.NDArray[Any]
TensorData = Array | Callable[[], Array | Iterable[Array]]

VALUE_TYPES = {
    "uint8": gguf.UINT8,
    "int8": gguf.INT8,
    "uint16": gguf.UINT16,
    "int16": gguf.INT16,
    "uint32": gguf.UINT32,
    "int32": gguf.INT32,
    "float32": gguf.FLOAT32,
    "bool": gguf.BOOL,
    "string": gguf.STRING,
    "uint64": gguf.UINT64,
    "int64": gguf.INT64,
    "float64": gguf.FLOAT64,
}
_FORMATS = {
    gguf.UINT8: "B",
    gguf.INT8: "b",
    gguf.UINT16: "H",
    gguf.INT16: "h",
    gguf.UINT32: "I",
    gguf.INT32: "i",
    gguf.FLOAT32: "f",
    gguf.BOOL: "?",
    gguf.UINT64: "Q",
    gguf.INT64: "q",
    gguf.FLOAT64: "d",
}


def _integer_type(values: Iterable[int]) -> int:
    """The type that llama.cpp's tools expect: uint32, int32 if negative, 64 bits when 32 do not hold it."""
    values = list(values)
    low, high = min(values, default=0), max(values, default=0)
    if low >= 0:
        return VALUE_TYPES["uint32" if high < 1 << 32 else "uint64"]
    return VALUE_TYPES["int32" if low >= -(1 << 31) and high < 1 << 31 else "int64"]


def _infer(values: list[Any]) -> int:
    """The common type number of ``values``."""
    if all(isinstance(v, str) for v in values) and values:
        return STRING
    if all(isinstance(v, (bool, np.bool_)) for v in values) and values:
        return VALUE_TYPES["bool"]
    if all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values):
        return _integer_type(values)
    if all(isinstance(v, (int, float, np.floating, np.integer)) for v in values):
        return VALUE_TYPES["float32"]
    if all(isinstance(v, (list, tuple, np.ndarray)) for v in values):
        return ARRAY
    raise TypeError(f"metadata of mixed or unknown types: {sorted({type(v).__name__ for v in values})}")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _pack(value: Any, number: int, element: int | None) -> bytes:
    if number == STRING:
        return _string(value)
    if number != ARRAY:
        return struct.pack("<" + _FORMATS[number], value)
    values = value.tolist() if isinstance(value, np.ndarray) else list(value)
    inner = _infer(values) if element is None or (values and isinstance(values[0], (list, tuple))) else element
    head = struct.pack("<IQ", inner, len(values))
    if inner in _FORMATS:
        return head + struct.pack(f"<{len(values)}{_FORMATS[inner]}", *values)
    return head + b"".join(_pack(v, inner, element) for v in values)


class GGUFWriter:
    """Collects metadata and tensor records, then streams the file out. Not thread-safe.

    Args:
        path: where the file will stand; a file of that name is replaced.
        metadata: first entries, types inferred as in :meth:`add_metadata`.
        alignment: of tensor data, a power of two.
    """

    def __init__(
        self, path: str | Path, metadata: Mapping[str, Any] | None = None, *, alignment: int = DEFAULT_ALIGNMENT
    ) -> None:
        self.path = Path(path)
        self._alignment = alignment
        self._metadata: dict[str, bytes] = {}
        self._tensors: dict[str, tuple[QuantType, tuple[int, ...], TensorData]] = {}
        if alignment != DEFAULT_ALIGNMENT:
            self.add_metadata("general.alignment", alignment)
        for key, value in (metadata or {}).items():
            self.add_metadata(key, value)

    def add_metadata(self, key: str, value: Any, value_type: str | None = None) -> None:
        """Set ``key``. Types are inferred (int: uint32 where it fits; float: float32) unless ``value_type`` names one.

        For a list, ``value_type`` is the type of its elements, at any depth.
        """
        given = None if value_type is None else VALUE_TYPES[value_type]
        is_array = isinstance(value, (list, tuple, np.ndarray))
        number = ARRAY if is_array else (_infer([value]) if given is None else given)
        self._metadata[key] = struct.pack("<I", number) + _pack(value, number, given if is_array else None)

    def copy_metadata(self, key: str, stored: bytes | memoryview) -> None:
        """Set ``key`` to what another file stores (see :attr:`GGUFFile.stored_metadata`), byte for byte."""
        self._metadata[key] = bytes(stored)

    def add_tensor(self, name: str, quant_type: QuantType, shape: tuple[int, ...], data: TensorData) -> None:
        """Declare a tensor.

        Args:
            shape: torch order, 1 to 4 dimensions, the last a multiple of the block size.
            data: the stored bytes (any dtype; quantised types as blocks), or a function called when the tensor is
                written that returns them or yields them piece by piece.
        """
        if name in self._tensors:
            raise ValueError(f"tensor {name!r} is there twice")
        if not 1 <= len(shape) <= gguf.MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {len(shape)} dimensions; GGUF allows 1 to {gguf.MAX_DIMENSIONS}")
        quant_type.row_bytes(shape[-1])
        self._tensors[name] = (quant_type, tuple(shape), data)

    def write(self) -> None:
        """Write everything. Raises ValueError where a tensor's data has not the bytes that its shape needs."""
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            with partial.open("wb") as file:
                self._write(file)
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, file: BinaryIO) -> None:
        file.write(MAGIC + struct.pack("<IQQ", 3, len(self._tensors), len(self._metadata)))
        for key, packed in self._metadata.items():
            file.write(_string(key) + packed)
        offset = 0
        for name, (quant_type, shape, _) in self._tensors.items():
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            file.write(_string(name) + dims + struct.pack("<IQ", quant_type.number, offset))
            offset += self._padded(prod(shape[:-1]) * quant_type.row_bytes(shape[-1]))
        self._pad(file)
        for name, (quant_type, shape, data) in self._tensors.items():
            expected = prod(shape[:-1]) * quant_type.row_bytes(shape[-1])
            made = data() if callable(data) else data
            written = 0
            for piece in [made] if isinstance(made, np.ndarray) else made:
                written += file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            if written != expected:
                raise ValueError(f"tensor {name!r}: {quant_type} {shape} needs {expected} bytes, got {written}")
            self._pad(file)

    def _padded(self, size: int) -> int:
        return -(-size // self._alignment) * self._alignment

    def _pad(self, file: BinaryIO) -> None:
        file.write(bytes(self._padded(file.tell()) - file.tell()))

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.write()
