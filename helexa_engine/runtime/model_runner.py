"""Runs the model on chunks: fills the batch, owns the tensors of the KV pages and of the recurrent states."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from ..batch import Batch
from ..cache.spec import StateCache
from ..ops.argmax import argmax
from ..ops.registry import native_core
from .memory import MOST_RECORDED
from .recorded_step import RecordedStep
from .sampler import Logits, Outcome, Sampler, sample_rows
from .scheduler import Chunk

if TYPE_CHECKING:
    from ..cache.spec import LayerCache

logger = logging.getLogger(__name__)


#: Hidden states, logits, and the places of the largest logits.
_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Model(Protocol):
    """What a model is to the runtime (see ``models/``)."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, hidden_size] float32 after the last layer; writes keys, values and states of the new tokens."""

    def stages(self, batch: Batch) -> Iterator[torch.Tensor]:
        """What :meth:`forward` computes on its way: the embeddings, then the output of each layer; each is valid until the next."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [M, vocab_size] float32 of hidden states [M, hidden_size]."""


class ModelRunner:
    """Owns the KV pages, the states and the input buffers of a step; nothing grows afterwards.

    Args:
        model: the loaded model.
        caches: one entry a layer, with room for every page, or for every state slot, of the pools.
        page_size: tokens a page holds.
        max_num_seqs, max_num_batched_tokens: limits of a step.
        max_pages_per_seq: pages of the longest sequence.

    Attributes:
        largest: of each row of logits that :meth:`logits` gave last, the id of the largest, the lowest among equals; None where
            the step did not compute it.
    """

    def __init__(
        self,
        model: Model,
        caches: list[LayerCache],
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_pages_per_seq: int,
    ) -> None:
        self.model = model
        self.page_size = page_size
        self._caches = caches
        self._state_caches = [cache for cache in caches if isinstance(cache, StateCache)]
        self._input_ids = np.zeros(max_num_batched_tokens, np.int64)
        self._positions = np.zeros(max_num_batched_tokens, np.int64)
        self._slot_mapping = np.zeros(max_num_batched_tokens, np.int64)
        self._cu_seqlens = np.zeros(max_num_seqs + 1, np.int32)
        self._seq_lens = np.zeros(max_num_seqs, np.int32)
        self._state_slots = np.zeros(max_num_seqs, np.int32)
        self._page_tables = np.zeros((max_num_seqs, max_pages_per_seq), np.int32)
        self._steps: dict[int, RecordedStep] = {}
        self._records = native_core() is not None
        self._has_run = False  # a model's first step may prepare things
        self._ready: _Results | None = None  # of a recorded step
        self.largest: list[int] | None = None

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Hidden states [T, hidden_size] of the chunks' tokens, packed in their order; valid until the next call.

        A sequence that begins has a fresh state, or that of the snapshot it resumes from; then snapshots are taken, so that one
        may take the slot of another that is read for the last time.
        """
        begin = [chunk.sequence.state_slot for chunk in chunks if chunk.start == 0]
        for cache in self._state_caches if begin else ():
            with torch.inference_mode():
                cache.clear([slot for slot in begin if slot is not None])
        self._copy_states([(chunk.resume_from, chunk.sequence.state_slot) for chunk in chunks])
        hidden = self._compute(chunks)
        self._copy_states([(chunk.sequence.state_slot, chunk.save_to) for chunk in chunks])
        return hidden

    def is_finite(self, hidden: torch.Tensor, row: int) -> bool:
        """Whether one row of the hidden states has neither NaN nor infinity. What a layer keeps of a token reaches its own row, and
        all later ones, so a sound row means that the pages and states up to it are sound."""
        return bool(hidden[row].isfinite().all())

    def first_not_finite(self, chunk: Chunk) -> str:
        """Which part of the model gives something that is not finite, found by computing the chunk again: ``layer 7``. For a sequence
        that is about to fail: its states move on once more, its pages get what is in them."""
        batch = self._batch(1, self._fill([chunk]))
        with torch.inference_mode():
            for i, hidden in enumerate(self.model.stages(batch)):
                if not hidden.isfinite().all():
                    return f"layer {i - 1}" if i else "the embedding"
        return "the output head"

    def page_memory(self) -> list[npt.NDArray[np.uint8]]:
        """The KV pages as they lie in memory, to be read or written in place: for each tensor of each layer [num_pages, bytes]."""
        return _rows([cache for cache in self._caches if not isinstance(cache, StateCache)])

    def state_memory(self) -> list[npt.NDArray[np.uint8]]:
        """The same of the recurrent states: [num_slots, bytes] each."""
        return _rows(self._state_caches)

    def _copy_states(self, slots: Sequence[tuple[int | None, int | None]]) -> None:
        """Copies from the first slot of each pair to the second, where there are both."""
        for source, target in slots:
            if source is not None and target is not None:
                for cache in self._state_caches:
                    cache.copy(source, target)

    def _compute(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        num_tokens = self._fill(chunks)
        self._ready = None
        decodes = num_tokens == len(chunks) <= MOST_RECORDED and all(chunk.samples for chunk in chunks)
        if decodes and self._has_run and self._records:
            self._ready = self._recorded(num_tokens)
            return self._ready[0]
        self._has_run = True
        with torch.inference_mode():
            return self.model.forward(self._batch(len(chunks), num_tokens))

    def logits(self, hidden: torch.Tensor, rows: Sequence[int]) -> Logits:
        """Logits [len(rows), vocab_size] of some rows of the hidden states; valid until the next call."""
        self.largest = None
        if self._ready is not None and hidden is self._ready[0]:
            _, logits, largest = self._ready
            self._ready = None  # a sampler may write into them
            if len(rows) == logits.shape[0]:
                self.largest = largest.tolist()
                return logits.numpy()
        with torch.inference_mode():
            if len(rows) != hidden.shape[0]:
                hidden = hidden[torch.tensor(rows)]
            return self.model.logits(hidden).numpy()

    def sample(self, hidden: torch.Tensor, rows: Sequence[int], samplers: Sequence[Sampler]) -> list[Outcome]:
        """What each sampler takes of the logits of its row of the hidden states, or why it takes nothing."""
        logits = self.logits(hidden, rows)
        return sample_rows(samplers, logits, self.largest)

    def _recorded(self, num_sequences: int) -> _Results:
        """Of a step of one token each."""
        step = self._steps.get(num_sequences)
        if step is not None:
            return cast(_Results, step.replay())
        batch = self._batch(num_sequences, num_sequences)

        kernels = argmax.choose("cpu")

        def function() -> _Results:
            hidden = self.model.forward(batch)
            logits = self.model.logits(hidden)
            return hidden, logits, kernels.argmax(logits)

        with torch.inference_mode():
            step = RecordedStep(function)
        if step.replayable:
            self._steps[num_sequences] = step
        else:
            self._records = False
            logger.debug("decode steps are not replayed: torch computes %s", ", ".join(sorted(step.computed_outside)))
        return cast(_Results, step.result)

    def _fill(self, chunks: Sequence[Chunk]) -> int:
        """Writes the input buffers and returns the number of tokens."""
        first = 0
        for i, chunk in enumerate(chunks):
            sequence, after = chunk.sequence, first + chunk.num_tokens
            pages = np.asarray(sequence.pages)
            if chunk.num_tokens == 1:
                self._input_ids[first] = sequence.token_ids[chunk.start]
                self._positions[first] = chunk.start
                page, offset = divmod(chunk.start, self.page_size)
                self._slot_mapping[first] = int(pages[page]) * self.page_size + offset
            else:
                positions = np.arange(chunk.start, chunk.end)
                self._input_ids[first:after] = sequence.token_ids[chunk.start : chunk.end]
                self._positions[first:after] = positions
                self._slot_mapping[first:after] = (
                    pages[positions // self.page_size].astype(np.int64) * self.page_size + positions % self.page_size
                )
            self._page_tables[i, : pages.size] = pages
            self._page_tables[i, pages.size :] = 0
            self._seq_lens[i] = chunk.end
            self._state_slots[i] = sequence.state_slot or 0
            self._cu_seqlens[i + 1] = first = after
        return first

    def _batch(self, n: int, first: int) -> Batch:
        """The first ``n`` sequences and ``first`` tokens of the input buffers."""
        return Batch(
            input_ids=torch.from_numpy(self._input_ids[:first]),
            positions=torch.from_numpy(self._positions[:first]),
            cu_seqlens=torch.from_numpy(self._cu_seqlens[: n + 1]),
            slot_mapping=torch.from_numpy(self._slot_mapping[:first]),
            page_tables=torch.from_numpy(self._page_tables[:n]),
            seq_lens=torch.from_numpy(self._seq_lens[:n]),
            state_slots=torch.from_numpy(self._state_slots[:n]),
            caches=self._caches,
        )


def _rows(caches: Sequence[LayerCache]) -> list[npt.NDArray[np.uint8]]:
    """Views of every tensor of the caches, each of which has one row for a page, or for a slot."""
    tensors = [getattr(cache, field.name) for cache in caches for field in dataclasses.fields(cache)]
    return [tensor.flatten(1).view(torch.uint8).numpy() for tensor in tensors]
