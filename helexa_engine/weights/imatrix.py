"""Importance matrices as llama.cpp's ``llama-imatrix`` writes them: for each matrix, the mean square of each activation that
its columns multiply.

The GGUF form has two float32 tensors a matrix, ``NAME.in_sum2`` (sums of squares, one row an expert) and ``NAME.counts`` (tokens,
one an expert). The older ``.dat`` form is a count of entries and, for each, name, calls, and sums that are means times calls.
Source: ``tools/imatrix`` and ``common/imatrix-loader.cpp`` of llama.cpp.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest, ModelNotFound, UnsupportedCheckpoint
from ..quant import types
from . import gguf

MAX_ENTRIES = 1_000_000


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Importances by GGUF tensor name.

    Attributes:
        path: the file.
        entries: name -> float32 [matrices, columns]; one matrix, or one an expert. What was never seen is all ones.
        datasets: what it was computed from, as the file says.
        chunks: how many chunks of it, 0 when the file does not say.
    """

    path: Path
    entries: dict[str, npt.NDArray[np.float32]]
    datasets: tuple[str, ...] = ()
    chunks: int = 0

    def of(self, name: str, matrices: int, cols: int) -> npt.NDArray[np.float32] | None:
        """Importances [matrices, cols] of a tensor, None when the file has none.

        Raises:
            InvalidRequest: they do not fit the tensor: the importance matrix is another model's.
        """
        found = self.entries.get(name)
        if found is None:
            return None
        if found.size != matrices * cols:
            raise InvalidRequest(
                "imatrix",
                f"{self.path}: {name} has {found.size} importances, the tensor has {matrices} x {cols} columns; "
                "it was computed from another model",
            )
        return found.reshape(matrices, cols)


def read(path: str | Path) -> ImportanceMatrix:
    """Either form.

    Raises:
        ModelNotFound: no such file.
        UnsupportedCheckpoint: it is malformed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelNotFound(str(path), f"no importance matrix there: {error.strerror}") from None
    made = _read_gguf(path) if magic == gguf.MAGIC else _read_legacy(path)
    for name, values in made.entries.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise UnsupportedCheckpoint("importances that are negative or no numbers", f"{path}: {name}")
    return made


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = gguf.GGUFFile(path)
    entries: dict[str, npt.NDArray[np.float32]] = {}
    for name, tensor in file.tensors.items():
        if not name.endswith(".in_sum2"):
            continue
        stem = name.removesuffix(".in_sum2")
        counts = file.tensors.get(f"{stem}.counts")
        if counts is None or tensor.quant_type is not types.F32 or counts.quant_type is not types.F32:
            raise UnsupportedCheckpoint(f"expected float32 and {stem}.counts beside it", f"{path}: tensor {name!r}")
        tokens = counts.data.view(np.float32).reshape(-1, 1)
        sums = tensor.data.view(np.float32)
        if not len(tokens) or sums.size % len(tokens):
            raise UnsupportedCheckpoint(f"{sums.size} sums do not divide by {len(tokens)} counts", f"{path}: {stem}")
        sums = sums.reshape(len(tokens), -1)
        entries[stem] = np.where(tokens > 0, sums / np.maximum(tokens, 1), np.float32(1)).astype(np.float32)
    if not entries:
        raise UnsupportedCheckpoint("not an importance matrix: no tensor ends in .in_sum2", str(path))
    datasets = file.metadata.get("imatrix.datasets", ())
    chunks = file.metadata.get("imatrix.chunk_count", 0)
    return ImportanceMatrix(
        path,
        entries,
        tuple(datasets) if isinstance(datasets, gguf.StringArray) else (),
        chunks if isinstance(chunks, int) else 0,
    )


class _Legacy:
    """Reads forward through a ``.dat`` file."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.at = 0
        self.path = path

    def take(self, count: int) -> bytes:
        if count < 0 or count > len(self.data) - self.at:
            raise UnsupportedCheckpoint(
                f"neither a GGUF file nor an importance matrix: {count} bytes are wanted at {self.at} of {len(self.data)}",
                str(self.path),
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self) -> int:
        value: int = struct.unpack("<i", self.take(4))[0]
        return value

    @property
    def is_at_end(self) -> bool:
        return self.at == len(self.data)


def _read_legacy(path: Path) -> ImportanceMatrix:
    data = _Legacy(path)
    count = data.integer()
    if not 1 <= count <= MAX_ENTRIES:
        raise UnsupportedCheckpoint(f"not an importance matrix: it claims {count} entries", str(path))
    entries: dict[str, npt.NDArray[np.float32]] = {}
    for _ in range(count):
        name = data.take(data.integer()).decode("utf-8", "replace")
        calls, values = data.integer(), data.integer()
        sums: npt.NDArray[Any] = np.frombuffer(data.take(4 * values if values > 0 else -1), "<f4")
        entries[name] = (sums / np.float32(calls) if calls > 0 else sums).astype(np.float32)
    chunks = 0 if data.is_at_end else data.integer()
    datasets = () if data.is_at_end else (data.take(data.integer()).decode("utf-8", "replace"),)
    return ImportanceMatrix(path, entries, datasets, chunks)
