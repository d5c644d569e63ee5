"""A model small enough to reason about, with real paged memory: for tests of the runtime."""

from __future__ import annotations

import torch

from ..batch import Batch
from ..cache.page_pool import PagePool
from ..runtime.engine import Engine
from ..runtime.model_runner import ModelRunner
from ..runtime.scheduler import Scheduler


class ToyModel:
    """Each token's hidden state is a decaying sum of the embeddings of all tokens before it, read from the KV pages.

    Every page table, slot and length matters to the result, and each row is computed alone in a fixed order: results are equal
    bit for bit whatever is computed beside them. Pages start as NaN, so a read of an unwritten slot shows.

    Args:
        poisoned_token_id: a sequence that ends with this token has NaN logits.
    """

    def __init__(
        self, *, vocab_size: int = 96, hidden_size: int = 16, seed: int = 0, poisoned_token_id: int = -1
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocab_size, hidden_size, generator=generator)
        self.head = 0.15 * torch.randn(vocab_size, hidden_size, generator=generator)  # a wide distribution
        self.poisoned_token_id = poisoned_token_id
        self.num_forwards = 0

    def forward(self, batch: Batch) -> torch.Tensor:
        self.num_forwards += 1
        pages: torch.Tensor = batch.caches[0]  # type: ignore[assignment]  # [num_pages * page_size, hidden_size]
        pages[batch.slot_mapping] = self.embedding[batch.input_ids]
        page_size = self.page_size
        hidden = torch.empty(batch.num_tokens, self.embedding.shape[1])
        for i in range(batch.num_sequences):
            start, end = int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1])
            assert int(batch.positions[end - 1]) + 1 == int(batch.seq_lens[i])
            for row in range(start, end):
                length = int(batch.positions[row]) + 1
                steps = torch.arange(length)
                slots = batch.page_tables[i][steps // page_size].long() * page_size + steps % page_size
                decay = 0.9 ** (length - 1 - steps).float()
                hidden[row] = (decay[:, None] * pages[slots]).sum(0)
                if int(batch.input_ids[row]) == self.poisoned_token_id:
                    hidden[row] = float("nan")
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.head @ row for row in hidden])

    page_size = 64


def toy_engine(
    model: ToyModel | None = None,
    *,
    num_pages: int = 32,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 512,
    max_model_len: int | None = None,
    seed: int | None = 0,
) -> Engine:
    """An :class:`Engine` over a :class:`ToyModel`."""
    model = model or ToyModel()
    page_size = ToyModel.page_size
    pages = torch.full((num_pages * page_size, model.embedding.shape[1]), float("nan"))
    runner = ModelRunner(
        model,
        [pages],  # type: ignore[list-item]
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_pages_per_seq=num_pages,
    )
    scheduler = Scheduler(
        PagePool(num_pages),
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    return Engine(
        runner,
        scheduler,
        vocab_size=model.embedding.shape[0],
        max_model_len=max_model_len or num_pages * page_size,
        seed=seed,
    )
