"""Weights on their way from a file's map to the device: threads read large pieces into pinned buffers, from which the device
copies and repacks them while the next ones are read. One stream, the current one: what is queued after an upload finds it there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from ..quant.types import QuantType
from . import cuda
from .quant_matmul.planes import planes_bytes

#: Large enough that reading and copying run at their full speed, small enough that a few of them are no burden as pinned memory.
PIECE_BYTES = 16 << 20
NUM_PIECES = 8
NUM_READERS = 4

#: What planes are aligned to, in bytes.
_ALIGNMENT = 256


class _Buffer:
    """A piece of memory that the device copies from; pinned where there is one."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        on_card = device.type == "cuda"
        self._device = device
        self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_card)
        self._array = self._memory.numpy()
        self._copied = torch.cuda.Event() if on_card else None  # type: ignore[no-untyped-call]

    def fill(self, piece: np.ndarray) -> None:
        """Reads ``piece`` once what was here before is on the device. Runs in a reader."""
        if self._copied is not None:
            self._copied.synchronize()
        np.copyto(self._array[: piece.size], piece)

    def sent(self, nbytes: int) -> torch.Tensor:
        """What was read, on the device; the copy is queued."""
        out = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        out.copy_(self._memory[:nbytes], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return out


class Uploads:
    """The buffers and the readers; :meth:`close` frees them. One thread uploads at a time."""

    def __init__(self, device: torch.device, *, piece_bytes: int = PIECE_BYTES, num_pieces: int = NUM_PIECES) -> None:
        self._piece_bytes = piece_bytes
        self._free = deque(_Buffer(device, piece_bytes) for _ in range(num_pieces))
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="helexa-upload")

    def pieces(self, data: np.ndarray, row_bytes: int) -> Iterator[torch.Tensor]:
        """``data`` in pieces of whole rows, in order, on the device.

        Args:
            data: uint8 of one or two dimensions with adjacent columns; it has been read when this ends.
            row_bytes: of a row, which no piece cuts; at most the size of a buffer.
        """
        if row_bytes > self._piece_bytes:
            raise ValueError(f"upload: row_bytes: expected at most {self._piece_bytes}, got {row_bytes}")
        reading: deque[tuple[Future[None], _Buffer, int]] = deque()
        try:
            for piece in _cut(data, self._piece_bytes // row_bytes * row_bytes):
                if not self._free:
                    yield self._next(reading)
                buffer = self._free.popleft()
                reading.append((self._readers.submit(buffer.fill, piece), buffer, piece.size))
            while reading:
                yield self._next(reading)
        finally:
            for future, buffer, _ in reading:
                future.exception()  # waits: a reader must not fill a buffer that is another's
                self._free.append(buffer)

    def _next(self, reading: deque[tuple[Future[None], _Buffer, int]]) -> torch.Tensor:
        future, buffer, nbytes = reading.popleft()
        self._free.append(buffer)
        future.result()
        return buffer.sent(nbytes)

    def close(self) -> None:
        self._readers.shutdown()
        self._free.clear()


_uploads: dict[torch.device, Uploads] = {}


def upload_planes(
    quant_type: QuantType, data: np.ndarray, rows: int, cols: int, device: torch.device | None = None
) -> torch.Tensor:
    """A matrix [rows, cols], or a stack of matrices with ``rows`` rows in all, in planes (``csrc/cuda/quant_planes.h``).

    Besides the planes the device holds a few pieces of :data:`PIECE_BYTES` at a time. The buffers are kept until :func:`end_uploads`.

    Args:
        data: uint8 as in a GGUF file: all rows, or [matrices, bytes of one].
        device: where to; default: where models on ``"cuda"`` lie.

    Returns:
        uint8 [:func:`planes_bytes`], aligned to 256 bytes.

    Raises:
        ValueError: ``data`` has another size, or the type is none that a device keeps.
    """
    device = device or cuda.torch_device("cuda")
    row_bytes = quant_type.row_bytes(cols)
    if data.dtype != np.uint8 or data.size != rows * row_bytes:
        raise ValueError(
            f"pack: data: expected {rows * row_bytes} bytes as uint8 for {rows} x {cols} {quant_type}, got {data.size}"
        )
    kernels = cuda.require_kernels()
    size = planes_bytes(quant_type, rows, cols)
    memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % _ALIGNMENT
    planes = memory[start : start + size]
    if device not in _uploads:
        _uploads[device] = Uploads(device)
    first = 0
    for piece in _uploads[device].pieces(data, row_bytes):
        count = piece.numel() // row_bytes
        kernels.repack_planes(
            quant_type.number, piece.data_ptr(), first, count, rows, cols, planes.data_ptr(), cuda.stream(planes)
        )
        first += count
    return planes


def end_uploads() -> None:
    """Frees the buffers: the model is loaded."""
    while _uploads:
        _uploads.popitem()[1].close()


def _cut(data: np.ndarray, nbytes: int) -> Iterator[np.ndarray]:
    """``data`` in flat pieces of at most ``nbytes``, in order."""
    if data.flags.c_contiguous:
        flat = data.reshape(-1)
        yield from (flat[i : i + nbytes] for i in range(0, flat.size, nbytes))
    else:
        for row in data:
            yield from _cut(row, nbytes)
