"""What a step reads besides weights and caches: token ids, positions, page tables. Written on the host, and for a device copied there
in one piece."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..batch import Batch

if TYPE_CHECKING:
    from ..cache.spec import LayerCache
    from .scheduler import Chunk

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Scratch:
    """A page and a state slot that are nobody's: where rows write that only fill a batch up."""

    page: int
    state_slot: int


@dataclass(slots=True)
class _Arrays:
    """The inputs of one shape of step as the host writes them, and as the model reads them.

    They are memory views, not numpy's arrays: a decode step writes single numbers, right after the weights have passed through the
    caches, and numpy would have to be brought back for that.
    """

    input_ids: memoryview
    positions: memoryview
    slot_mapping: memoryview
    cu_seqlens: memoryview
    seq_lens: memoryview
    state_slots: memoryview
    page_tables: memoryview  # row after row
    nbytes: int
    batch: Batch


class StepInputs:
    """The buffers of the largest step. A step uses their beginning, laid out by its numbers of tokens and sequences alone: steps of
    one shape find their inputs at the same addresses.

    Args:
        device: where the model reads them; on a CPU that is where they are written.
        caches: of every batch.
        page_size: tokens a page holds.
        pages_per_seq: pages of the longest sequence.
        scratch: for rows that fill a batch up.
    """

    def __init__(
        self,
        device: torch.device,
        caches: list[LayerCache],
        *,
        max_tokens: int,
        max_seqs: int,
        page_size: int,
        pages_per_seq: int,
        scratch: Scratch | None = None,
    ) -> None:
        self._caches = caches
        self._page_size = page_size
        self._pages_per_seq = pages_per_seq
        self._scratch = scratch
        self._no_pages = memoryview(array("i", [0]) * pages_per_seq)
        nbytes = sum(_padded(size) for size, _ in self._layout(max_tokens, max_seqs))
        on_card = device.type == "cuda"
        host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=on_card)
        self._host = host.numpy().data
        self._device = torch.zeros(nbytes, dtype=torch.uint8, device=device) if on_card else host
        self._source = host
        self._copied = torch.cuda.Event() if on_card else None  # type: ignore[no-untyped-call]
        self._decodes: dict[int, _Arrays] = {}

    def fill(self, chunks: Sequence[Chunk], num_rows: int | None = None) -> Batch:
        """The batch of ``chunks``, valid until the next call; its copy to the device is queued.

        With ``num_rows`` there are as many sequences: those missing are of one token each, and write where it does not matter.
        """
        num_tokens, num_sequences = sum(chunk.num_tokens for chunk in chunks), len(chunks)
        missing = 0 if num_rows is None else num_rows - num_sequences
        if self._copied is not None:
            self._copied.synchronize()
        arrays = self._arrays(num_tokens + missing, num_sequences + missing)
        first = arrays.cu_seqlens[0] = 0
        for i, chunk in enumerate(chunks):
            first = self._fill_row(arrays, i, first, chunk)
        for i in range(num_sequences, num_sequences + missing):
            first = self._fill_up(arrays, i, first)
        if self._copied is not None:
            self._device[: arrays.nbytes].copy_(self._source[: arrays.nbytes], non_blocking=True)
            self._copied.record()
        return arrays.batch

    def _fill_row(self, arrays: _Arrays, i: int, first: int, chunk: Chunk) -> int:
        """Writes sequence ``i``, whose first token is ``first``; returns the number of tokens so far."""
        sequence, after, page_size = chunk.sequence, first + chunk.num_tokens, self._page_size
        if chunk.num_tokens == 1:
            arrays.input_ids[first] = sequence.token_ids[chunk.start]
            arrays.positions[first] = chunk.start
            page, offset = divmod(chunk.start, page_size)
            arrays.slot_mapping[first] = sequence.pages[page] * page_size + offset
        else:
            positions = np.arange(chunk.start, chunk.end)
            pages = np.asarray(sequence.pages)[positions // page_size].astype(np.int64)
            np.asarray(arrays.input_ids[first:after])[:] = sequence.token_ids[chunk.start : chunk.end]
            np.asarray(arrays.positions[first:after])[:] = positions
            np.asarray(arrays.slot_mapping[first:after])[:] = pages * page_size + positions % page_size
        self._write_table(arrays, i, sequence.pages)
        arrays.seq_lens[i] = chunk.end
        arrays.state_slots[i] = sequence.state_slot or 0
        arrays.cu_seqlens[i + 1] = after
        return after

    def _fill_up(self, arrays: _Arrays, i: int, first: int) -> int:
        """Writes a row that is nobody's."""
        assert self._scratch is not None, "there is no scratch page"
        arrays.input_ids[first] = arrays.positions[first] = 0
        arrays.slot_mapping[first] = self._scratch.page * self._page_size
        self._write_table(arrays, i, array("i", [self._scratch.page]))
        arrays.seq_lens[i] = 1
        arrays.state_slots[i] = self._scratch.state_slot
        arrays.cu_seqlens[i + 1] = first + 1
        return first + 1

    def _write_table(self, arrays: _Arrays, i: int, pages: array[int]) -> None:
        begin = i * self._pages_per_seq
        written, end = begin + len(pages), begin + self._pages_per_seq
        arrays.page_tables[begin:written] = pages
        arrays.page_tables[written:end] = self._no_pages[: end - written]

    def _layout(self, num_tokens: int, num_sequences: int) -> list[tuple[int, str]]:
        """(values, dtype) of each array, in the order in which they lie."""
        ids = [(8 * num_tokens, "int64")] * 3
        counts = [
            4 * (num_sequences + 1),
            4 * num_sequences,
            4 * num_sequences,
            4 * num_sequences * self._pages_per_seq,
        ]
        return [*ids, *((nbytes, "int32") for nbytes in counts)]

    def _arrays(self, num_tokens: int, num_sequences: int) -> _Arrays:
        is_decode = num_tokens == num_sequences
        if is_decode and (known := self._decodes.get(num_tokens)) is not None:
            return known
        host: list[memoryview] = []
        device: list[torch.Tensor] = []
        start = 0
        for nbytes, dtype in self._layout(num_tokens, num_sequences):
            host.append(self._host[start : start + nbytes].cast("q" if dtype == "int64" else "i"))
            device.append(self._device[start : start + nbytes].view(getattr(torch, dtype)))
            start += _padded(nbytes)
        input_ids, positions, slot_mapping, cu_seqlens, seq_lens, state_slots, page_tables = host
        batch = Batch(
            input_ids=device[0],
            positions=device[1],
            slot_mapping=device[2],
            cu_seqlens=device[3],
            seq_lens=device[4],
            state_slots=device[5],
            page_tables=device[6].view(num_sequences, self._pages_per_seq),
            caches=self._caches,
        )
        arrays = _Arrays(
            input_ids,
            positions,
            slot_mapping,
            cu_seqlens,
            seq_lens,
            state_slots,
            page_tables,
            start,
            batch,
        )
        if is_decode:
            self._decodes[num_tokens] = arrays
        return arrays


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
