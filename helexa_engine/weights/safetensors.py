"""Safetensors files, mapped: one, or several behind ``model.safetensors.index.json``.

The format (a length, a JSON header, bytes) is small enough to read here, and reading it here gives views of the map that can be
released tensor by tensor. Source: the safetensors format description.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelNotFound, UnsupportedCheckpoint
from ..quant import types
from ..quant.types import QuantType
from . import mapped_pages
from .lfs import refuse_pointer
from .raw_tensor import RawTensor

MAX_HEADER_BYTES = 100_000_000

_DTYPES = {"F32": types.F32, "F16": types.F16, "BF16": types.BF16, "F64": types.F64}
#: 8-bit floats; they come as the bytes that they are (I8) and mean something only together with scales, see :mod:`.fp8`.
FP8 = "F8_E4M3"


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelNotFound(str(path), "this part of the checkpoint is missing; download it again") from None
        except (OSError, ValueError) as error:
            raise UnsupportedCheckpoint(f"it cannot be mapped: {error}", str(path)) from None
        refuse_pointer(self.map[:64], path)
        size = len(self.map)
        length = struct.unpack_from("<Q", self.map)[0] if size >= 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise UnsupportedCheckpoint(
                f"a header of {length} bytes does not fit a file of {size}; it is truncated", str(path)
            )
        try:
            header = json.loads(self.map[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise UnsupportedCheckpoint(f"the header is not JSON: {error}", str(path)) from None
        if not isinstance(header, dict):
            raise UnsupportedCheckpoint("the header is not a JSON object", str(path))
        header.pop("__metadata__", None)
        self.base = 8 + length
        self.tensors = {name: self._read(name, entry) for name, entry in header.items()}
        self._refuse_overlaps()

    def _read(self, name: str, entry: Any) -> tuple[QuantType, tuple[int, ...], int, int]:
        """(type, shape, first byte, number of bytes)."""
        place = f"{self.path}: tensor {name!r}"
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise UnsupportedCheckpoint("malformed header entry", place) from None
        if any(type(number) is not int for number in (*shape, begin, end)):
            raise UnsupportedCheckpoint("malformed header entry", place)
        if not isinstance(dtype, str) or (dtype not in _DTYPES and dtype != FP8):
            raise UnsupportedCheckpoint(f"dtype {dtype} is not supported; expected {', '.join(_DTYPES)}", place)
        quant_type = types.I8 if dtype == FP8 else _DTYPES[dtype]
        if any(d < 0 for d in shape) or end - begin != math.prod(shape) * quant_type.block_bytes:
            raise UnsupportedCheckpoint(
                f"{end - begin} bytes do not make a {dtype} tensor of shape {list(shape)}", place
            )
        if begin < 0 or self.base + end > len(self.map):
            raise UnsupportedCheckpoint(
                f"its data ends beyond the file's {len(self.map)} bytes; it is truncated", place
            )
        return quant_type, shape, self.base + begin, end - begin

    def _refuse_overlaps(self) -> None:
        in_order = sorted((start, nbytes, name) for name, (_, _, start, nbytes) in self.tensors.items() if nbytes)
        for (start, nbytes, before), (following, _, name) in zip(in_order, in_order[1:], strict=False):
            if start + nbytes > following:
                raise UnsupportedCheckpoint(f"its data overlaps that of {before!r}", f"{self.path}: tensor {name!r}")


class SafetensorsFolder:
    """All tensors of a HuggingFace folder.

    Raises:
        ModelNotFound: a shard that the index names is missing.
        UnsupportedCheckpoint: there are no safetensors, or one is malformed.
    """

    def __init__(self, folder: Path) -> None:
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            names = self._shards(index)
        elif single.is_file():
            names = [single.name]
        else:
            found = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
            fix = (
                f"{found[0]} is a pickle, which helexa does not open; convert it to safetensors"
                if found
                else "download it again"
            )
            raise UnsupportedCheckpoint(f"model.safetensors is missing; {fix}", str(folder))
        self._files = [_File(folder / name) for name in names]
        self._where: dict[str, _File] = {}
        for file in self._files:
            for name in file.tensors:
                if name in self._where:
                    raise UnsupportedCheckpoint(
                        f"tensor {name!r} stands also in {self._where[name].path.name}", str(file.path)
                    )
                self._where[name] = file

    @staticmethod
    def _shards(index: Path) -> list[str]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UnsupportedCheckpoint(f"not a safetensors index: {error!r}", str(index)) from None
        for name in names:
            if "/" in name or "\\" in name or name.startswith("."):
                raise UnsupportedCheckpoint(f"the shard name {name!r:.80} leaves the folder", str(index))
        return names

    @property
    def nbytes(self) -> int:
        return sum(len(file.map) for file in self._files)

    def names(self) -> list[str]:
        return list(self._where)

    def tensor(self, name: str) -> RawTensor:
        """A tensor, its bytes a view of the map. Raises KeyError, :class:`UnsupportedCheckpoint`."""
        file = self._where[name]
        quant_type, shape, start, nbytes = file.tensors[name]
        return RawTensor(name, quant_type, shape, np.frombuffer(file.map, np.uint8, nbytes, start), (name,))

    def release(self, name: str) -> None:
        """Gives the whole pages under a tensor back to the system."""
        file = self._where[name]
        _, _, start, nbytes = file.tensors[name]
        mapped_pages.release(file.map, start, nbytes)
