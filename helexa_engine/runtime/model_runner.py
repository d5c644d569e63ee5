"""Runs the model on chunks: fills the batch, owns the tensors of the KV pages and of the recurrent states."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch

from ..batch import Batch
from ..cache.spec import StateCache
from ..ops.argmax import argmax
from ..ops.cuda import torch_device
from ..ops.registry import native_core
from .cache_rows import CacheRows, cache_rows
from .cuda_graphs import DecodeGraphs, Results
from .device_sampler import DeviceSampler
from .memory import MOST_RECORDED
from .recorded_step import RecordedStep
from .sampler import Logits, Outcome, Sampler, sample_rows
from .scheduler import Chunk
from .sequence import Sequence as AnswerSequence
from .step_inputs import Scratch, StepInputs

if TYPE_CHECKING:
    from ..cache.spec import LayerCache

logger = logging.getLogger(__name__)

#: Hidden states, logits, and the place of each row's largest logit [rows] int64, of a recorded step.
_Recorded = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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

    Decode steps are replayed: on the CPU recorded calls of up to a few sequences, on CUDA graphs. On CUDA nothing here waits for the
    device but what gives numbers to the host: :meth:`is_finite`, :meth:`logits`, :meth:`sample`.

    Args:
        model: the loaded model.
        caches: one entry a layer, with room for every page, or for every state slot, of the pools.
        page_size: tokens a page holds.
        max_num_seqs, max_num_batched_tokens: limits of a step.
        max_pages_per_seq: pages of the longest sequence.
        device: where the model is, ``"cpu"`` or ``"cuda"``.
        graph_sizes: numbers of sequences, ascending, that have a CUDA graph each.
        scratch: with graphs, a page and a state slot beyond those of the pools.

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
        device: str = "cpu",
        graph_sizes: Sequence[int] = (),
        scratch: Scratch | None = None,
    ) -> None:
        self.model = model
        self.page_size = page_size
        self._caches = caches
        self._state_caches = [cache for cache in caches if isinstance(cache, StateCache)]
        self._states = [state for cache in self._state_caches for state in (cache.conv_state, cache.recurrent_state)]
        self._device = device
        self._scratch = scratch
        self._inputs = StepInputs(
            torch_device(device),
            caches,
            max_tokens=max_num_batched_tokens,
            max_seqs=max_num_seqs,
            page_size=page_size,
            pages_per_seq=max_pages_per_seq,
            scratch=scratch,
        )
        self._steps: dict[int, RecordedStep] = {}
        self._records = device == "cpu" and native_core() is not None
        self._has_run = False  # a model's first step may prepare things
        self._ready: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None  # of a replayed step
        self.largest: list[int] | None = None
        self._device_sampler = DeviceSampler(device) if device == "cuda" else None
        self._graphs: DecodeGraphs | None = None
        if graph_sizes:
            with torch.inference_mode():
                self._graphs = DecodeGraphs(
                    self._decode, lambda rows: self._inputs.fill([], rows), graph_sizes, torch_device(device)
                )

    def warm_up(self) -> None:
        """Computes a prompt of nobody's, so that the first request does not wait for what kernels and libraries do at first use. Needs
        ``scratch``."""
        assert self._scratch is not None
        sequence = AnswerSequence("warm-up", 0, [0] * self.page_size, self.page_size, 1)
        sequence.pages, sequence.state_slot = array("i", [self._scratch.page]), self._scratch.state_slot
        self.logits(self.forward([Chunk(sequence, 0, self.page_size)]), [self.page_size - 1])

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Hidden states [T, hidden_size] of the chunks' tokens, packed in their order; valid until the next call.

        A sequence that begins has a fresh state, or that of the snapshot it resumes from; then snapshots are taken, so that one
        may take the slot of another that is read for the last time.
        """
        begin = [chunk.sequence.state_slot for chunk in chunks if chunk.start == 0]
        self._clear_states([slot for slot in begin if slot is not None])
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
        batch = self._inputs.fill([chunk])
        with torch.inference_mode():
            for i, hidden in enumerate(self.model.stages(batch)):
                if not hidden.isfinite().all():
                    return f"layer {i - 1}" if i else "the embedding"
        return "the output head"

    def page_memory(self) -> list[CacheRows]:
        """The KV pages as bytes: every tensor of each layer, a row a page."""
        return cache_rows([cache for cache in self._caches if not isinstance(cache, StateCache)])

    def state_memory(self) -> list[CacheRows]:
        """The same of the recurrent states, a row a slot."""
        return cache_rows(self._state_caches)

    def _clear_states(self, slots: Sequence[int]) -> None:
        """The states of sequences that have not begun. On a device in a launch or two, however many layers there are."""
        if slots and self._states:
            torch._foreach_zero_([state[slot] for state in self._states for slot in slots])

    def _copy_states(self, slots: Sequence[tuple[int | None, int | None]]) -> None:
        """Copies from the first slot of each pair to the second, where there are both; likewise."""
        for source, target in slots:
            if source is not None and target is not None and self._states:
                torch._foreach_copy_(
                    [state[target] for state in self._states], [state[source] for state in self._states]
                )

    def _compute(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self._ready = None
        is_decode = all(chunk.num_tokens == 1 and chunk.samples for chunk in chunks)
        if is_decode and self._graphs is not None and (rows := self._graphs.rows_for(len(chunks))) is not None:
            batch = self._inputs.fill(chunks, rows)
            with torch.inference_mode():
                hidden, logits = (result[: len(chunks)] for result in self._graphs.replay(batch))
            self._ready = hidden, logits, None
            return hidden
        batch = self._inputs.fill(chunks)
        if is_decode and self._records and self._has_run and len(chunks) <= MOST_RECORDED:
            self._ready = self._recorded(batch)
            return self._ready[0]
        self._has_run = True
        with torch.inference_mode():
            return self.model.forward(batch)

    def logits(self, hidden: torch.Tensor, rows: Sequence[int]) -> Logits:
        """Logits [len(rows), vocab_size] of some rows of the hidden states, on the host; valid until the next call."""
        logits, largest = self.device_logits(hidden, rows)
        self.largest = None if largest is None else largest.tolist()
        return logits.cpu().numpy()

    def sample(self, hidden: torch.Tensor, rows: Sequence[int], samplers: Sequence[Sampler]) -> list[Outcome]:
        """What each sampler takes of the logits of its row of the hidden states, or why it takes nothing. On a device the logits stay
        there."""
        if self._device_sampler is not None:
            return self._device_sampler.sample(samplers, self.device_logits(hidden, rows)[0]).outcomes()
        logits = self.logits(hidden, rows)
        return sample_rows(samplers, logits, self.largest)

    def device_logits(self, hidden: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [len(rows), vocab_size] of some rows of the hidden states, and the places of the largest [len(rows)] where the step
        computed them. On the device, and valid until the next call."""
        if self._ready is not None and hidden is self._ready[0]:
            _, logits, largest = self._ready
            self._ready = None  # a sampler may write into them
            if len(rows) == logits.shape[0]:
                return logits, largest
        with torch.inference_mode():
            if len(rows) != hidden.shape[0]:
                hidden = hidden[torch.tensor(rows).to(hidden.device, non_blocking=True)]
            return self.model.logits(hidden), None

    def _decode(self, batch: Batch) -> Results:
        hidden = self.model.forward(batch)
        return hidden, self.model.logits(hidden)

    def _recorded(self, batch: Batch) -> _Recorded:
        """Of a step of one token each."""
        step = self._steps.get(batch.num_sequences)
        if step is not None:
            return cast(_Recorded, step.replay())

        kernels = argmax.choose("cpu")

        def function() -> _Recorded:
            hidden, logits = self._decode(batch)
            return hidden, logits, kernels.argmax(logits)

        with torch.inference_mode():
            step = RecordedStep(function)
        if step.replayable:
            self._steps[batch.num_sequences] = step
        else:
            self._records = False
            logger.debug("decode steps are not replayed: torch computes %s", ", ".join(sorted(step.computed_outside)))
        return cast(_Recorded, step.result)
