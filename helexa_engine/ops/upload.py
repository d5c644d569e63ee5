"""Weights on their way from a file's map to the device: threads read large pieces into pinned buffers, from which the device
copies them while the next ones are read. One stream, the current one: what is queued after an upload finds it there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

#: Large enough that reading and copying run at their full speed, small enough that a few of them are no burden as pinned memory.
PIECE_BYTES = 16 << 20
NUM_PIECES = 8
NUM_READERS = 4


class _Buffer:
    """A piece of memory that the device copies from; pinned where there is one."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        on_card = device.type == "cuda"
        self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_card)
        self._array = self.memory.numpy()
        self._copied = torch.cuda.Event() if on_card else None  # type: ignore[no-untyped-call]

    def fill(self, piece: np.ndarray) -> None:
        """Reads ``piece`` once what was here before is on the device. Runs in a reader."""
        if self._copied is not None:
            self._copied.synchronize()
        np.copyto(self._array[: piece.size], piece)

    def send(self, target: torch.Tensor) -> None:
        target.copy_(self.memory[: target.numel()], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class Uploads:
    """The buffers and the readers; :meth:`close` frees them. One thread uploads at a time."""

    def __init__(self, device: torch.device, *, piece_bytes: int = PIECE_BYTES, num_pieces: int = NUM_PIECES) -> None:
        self._device = device
        self._piece_bytes = piece_bytes
        self._free = deque(_Buffer(device, piece_bytes) for _ in range(num_pieces))
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="helexa-upload")

    def upload(self, data: np.ndarray) -> torch.Tensor:
        """``data``, uint8 of one or two dimensions with adjacent columns, as a flat tensor on the device. ``data`` has been read when
        this returns; the copy to the device is queued."""
        out = torch.empty(data.size, dtype=torch.uint8, device=self._device)
        reading: deque[tuple[Future[None], _Buffer, torch.Tensor]] = deque()
        start = 0
        try:
            for piece in _pieces(data, self._piece_bytes):
                if not self._free:
                    self._send(reading)
                buffer = self._free.popleft()
                reading.append((self._readers.submit(buffer.fill, piece), buffer, out[start : start + piece.size]))
                start += piece.size
            while reading:
                self._send(reading)
        except BaseException:
            for future, buffer, _ in reading:
                future.exception()  # waits: a reader must not fill a buffer that is another's
                self._free.append(buffer)
            raise
        return out

    def _send(self, reading: deque[tuple[Future[None], _Buffer, torch.Tensor]]) -> None:
        """Queues the copy of what is read next."""
        future, buffer, target = reading.popleft()
        self._free.append(buffer)
        future.result()
        buffer.send(target)

    def close(self) -> None:
        self._readers.shutdown()
        self._free.clear()


_uploads: dict[torch.device, Uploads] = {}


def upload(data: np.ndarray, device: torch.device) -> torch.Tensor:
    """:meth:`Uploads.upload` through buffers that are kept until :func:`end_uploads`."""
    if device not in _uploads:
        _uploads[device] = Uploads(device)
    return _uploads[device].upload(data)


def end_uploads() -> None:
    """Frees the buffers: the model is loaded."""
    while _uploads:
        _uploads.popitem()[1].close()


def _pieces(data: np.ndarray, nbytes: int) -> Iterator[np.ndarray]:
    """``data`` in flat pieces of at most ``nbytes``, in order."""
    if data.flags.c_contiguous:
        flat = data.reshape(-1)
        yield from (flat[i : i + nbytes] for i in range(0, flat.size, nbytes))
    else:
        for row in data:
            yield from _pieces(row, nbytes)
