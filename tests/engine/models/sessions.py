"""Sequences fed to a model by hand, token by token or in chunks, alone or in one batch: the runner's work without the runner."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache

import torch
from transformers import PreTrainedModel

from helexa_engine import env
from helexa_engine.batch import Batch
from helexa_engine.cache.spec import AttentionCache, AttentionCacheSpec, KvDtype, StateCache
from helexa_engine.models.cache_specs import cache_specs
from helexa_engine.models.decoder import Decoder
from helexa_engine.ops.registry import native_core

PAGE_SIZE = 64
NUM_SLOTS = 4


def in_one_order() -> bool:
    """Whether every op sums in an order that nothing beside it changes. PyTorch's own matmul, in the twin, does not."""
    return native_core() is not None and not env.forced_ops()


def assert_same(
    got: torch.Tensor, expected: torch.Tensor, *, exact: bool | None = None, rounding: float = 1e-5
) -> None:
    """Bit for bit where sums have one order (``exact`` says so if not asked), else within float32 rounding."""
    if in_one_order() if exact is None else exact:
        assert torch.equal(got, expected)
    else:
        assert (got - expected).abs().max() < rounding


@torch.no_grad()
def expected_logits(theirs: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return theirs(torch.tensor([ids])).logits[0]


@cache
def float32_costs(theirs: PreTrainedModel, ids: tuple[int, ...]) -> float:
    """Largest error of transformers' own logits in float32: what another order of summing may cost."""
    exact = copy.deepcopy(theirs).double()
    if hasattr(exact.config, "num_experts"):
        exact.set_experts_implementation("eager")  # the others have no float64
    return float((expected_logits(theirs, list(ids)) - expected_logits(exact, list(ids))).abs().max())


class Pool:
    """Pages and state slots of a few sequences, NaN until written or begun."""

    def __init__(self, model: Decoder, kv_dtype: KvDtype = "float32") -> None:
        self.model = model
        specs = cache_specs(model.config, kv_dtype)
        self.caches = [spec.allocate(12 if isinstance(spec, AttentionCacheSpec) else NUM_SLOTS) for spec in specs]
        for layer in self.caches:
            tensors = (
                (layer.k, layer.v) if isinstance(layer, AttentionCache) else (layer.conv_state, layer.recurrent_state)
            )
            for tensor in tensors:
                tensor.view(torch.int8).fill_(-1)  # NaN, also as scales of codes

    @property
    def states(self) -> list[StateCache]:
        return [layer for layer in self.caches if isinstance(layer, StateCache)]

    @torch.no_grad()
    def feed(self, *chunks: tuple[Session, list[int]]) -> torch.Tensor:
        """Logits [tokens of all chunks, vocab] of the new tokens, computed in one batch."""
        ids, positions, slots, ends, cu = [], [], [], [], [0]
        tables = torch.zeros(len(chunks), 5, dtype=torch.int32)
        for i, (session, new) in enumerate(chunks):
            if session.length == 0:
                for state in self.states:
                    state.clear([session.state_slot])
            at = torch.arange(session.length, session.length + len(new))
            session.length += len(new)
            pages = torch.tensor(session.pages)
            tables[i, : len(pages)] = pages.int()
            ids.append(torch.tensor(new))
            positions.append(at)
            slots.append(pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE)
            ends.append(session.length)
            cu.append(cu[-1] + len(new))
        batch = Batch(
            input_ids=torch.cat(ids),
            positions=torch.cat(positions),
            cu_seqlens=torch.tensor(cu, dtype=torch.int32),
            slot_mapping=torch.cat(slots),
            page_tables=tables,
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            state_slots=torch.tensor([session.state_slot for session, _ in chunks], dtype=torch.int32),
            caches=self.caches,
        )
        return self.model.logits(self.model.forward(batch)).clone()


@dataclass
class Session:
    """One sequence on scattered pages of a pool of its own, or of a shared one."""

    model: Decoder
    pool: Pool = None  # type: ignore[assignment]
    pages: tuple[int, ...] = (5, 2, 7, 0, 3)
    state_slot: int = 2
    length: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.pool = self.pool or Pool(self.model)

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Logits [len(ids), vocab] of the new tokens."""
        return self.pool.feed((self, ids))

    def feed_in(self, ids: list[int], borders: list[int]) -> torch.Tensor:
        """The same in several calls, cut at ``borders``."""
        cuts = [0, *borders, len(ids)]
        return torch.cat([self.feed(ids[a:b]) for a, b in zip(cuts, cuts[1:], strict=False) if b > a])

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        logits = self.feed(prompt)[-1]
        made: list[int] = []
        for _ in range(count):
            made.append(int(logits.argmax()))
            logits = self.feed([made[-1]])[-1]
        return made
