"""A model small enough to reason about, with real paged memory: for tests of the runtime."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..batch import Batch
from ..cache.page_pool import PagePool
from ..cache.prefix_cache import PrefixCache
from ..cache.spec import AttentionCache, LayerCache, StateCache, StateCacheSpec
from ..cache.state_pool import StatePool
from ..runtime.engine import Engine
from ..runtime.model_runner import ModelRunner
from ..runtime.scheduler import Scheduler


class ToyModel:
    """Each token's hidden state is a decaying sum of the embeddings of all tokens before it, read from the KV pages.

    Every page table, slot and length matters to the result, and each row is computed alone in a fixed order: results are equal
    bit for bit whatever is computed beside them. Pages start as NaN, so a read of an unwritten slot shows.

    With states, what is kept in the pages has a second such sum and the token before in it, both read from a state slot. As in a
    delta net, a state depends on how its tokens were cut into chunks, but far more than in the last bits: one that was left
    anywhere but at the end of a page differs.

    Args:
        poisoned_token_id: a sequence that ends with this token has NaN logits.
        has_states: see above.
        page_size: tokens a page holds.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 96,
        hidden_size: int = 16,
        seed: int = 0,
        poisoned_token_id: int = -1,
        has_states: bool = False,
        page_size: int = 64,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocab_size, hidden_size, generator=generator)
        self.head = 0.15 * torch.randn(vocab_size, hidden_size, generator=generator)  # a wide distribution
        self.poisoned_token_id = poisoned_token_id
        self.has_states = has_states
        self.page_size = page_size
        self.num_forwards = 0

    def forward(self, batch: Batch) -> torch.Tensor:
        self.num_forwards += 1
        cache = batch.caches[0]
        assert isinstance(cache, AttentionCache)
        pages = cache.k.view(-1, self.embedding.shape[1])  # [num_pages * page_size, hidden_size]
        values = self.embedding[batch.input_ids]
        if self.has_states:
            for i in range(batch.num_sequences):
                self._add_states(values, batch, i)
        pages[batch.slot_mapping] = values
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
        hidden[batch.input_ids == self.poisoned_token_id] = float("nan")
        return hidden

    def stages(self, batch: Batch) -> Iterator[torch.Tensor]:
        yield self.embedding[batch.input_ids]
        yield self.forward(batch)

    def _add_states(self, values: torch.Tensor, batch: Batch, i: int) -> None:
        """To the values of sequence ``i``, each row before what is kept of it: as in a hybrid, pages depend on the states."""
        cache, slot = batch.caches[1], int(batch.state_slots[i])
        assert isinstance(cache, StateCache)
        before, state = cache.conv_state[slot, 0], cache.recurrent_state[slot, 0, 0]
        for row in range(int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1])):
            token = values[row].clone()
            state.mul_(0.95).add_(token)
            values[row] += 0.3 * state + before
            before.copy_(token)
        if int(batch.seq_lens[i]) % self.page_size:
            state.mul_(1.01)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.head @ row for row in hidden])


def toy_engine(
    model: ToyModel | None = None,
    *,
    num_pages: int = 32,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 512,
    max_model_len: int | None = None,
    seed: int | None = 0,
    prefix_cache: bool = False,
    num_snapshots: int = 8,
    snapshot_interval: int | None = None,
) -> Engine:
    """An :class:`Engine` over a :class:`ToyModel`; ``num_snapshots`` counts if that has states and there is a prefix cache, and the
    default interval is four pages."""
    model = model or ToyModel()
    page_size, hidden_size = model.page_size, model.embedding.shape[1]
    kept = torch.full((num_pages, 1, page_size, hidden_size), float("nan"))
    caches: list[LayerCache] = [AttentionCache(k=kept, v=torch.empty(num_pages, 1, page_size, 0))]
    pool, states, snapshots = PagePool(num_pages), None, None
    if model.has_states:
        spec = StateCacheSpec(
            conv_channels=hidden_size, conv_kernel=2, num_v_heads=1, head_k_dim=1, head_v_dim=hidden_size
        )
        cache = spec.allocate(max_num_seqs + num_snapshots)
        cache.conv_state.fill_(float("nan"))
        cache.recurrent_state.fill_(float("nan"))
        caches.append(cache)
        states, snapshots = StatePool(max_num_seqs), StatePool(num_snapshots, first=max_num_seqs)
    runner = ModelRunner(
        model,
        caches,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_pages_per_seq=num_pages,
    )
    scheduler = Scheduler(
        pool,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        states=states,
        prefixes=PrefixCache(pool, snapshots) if prefix_cache else None,
        snapshot_interval=snapshot_interval or 4 * page_size,
    )
    return Engine(
        runner,
        scheduler,
        vocab_size=model.embedding.shape[0],
        max_model_len=max_model_len or num_pages * page_size,
        seed=seed,
    )
