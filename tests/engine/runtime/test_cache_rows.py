"""Rows of a cache are read and written as bytes, where they lie or by way of a copy."""

from __future__ import annotations

import pytest
import torch

from helexa_engine.cache.spec import StateCache
from helexa_engine.runtime.cache_rows import cache_rows

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", [pytest.param(d, marks=pytest.mark.gpu if d == "cuda" else ()) for d in DEVICES])
def test_rows_go_out_and_come_back(device: str) -> None:
    numbers = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    cache = StateCache(numbers.to(device), torch.zeros(5, 2, 4, 4, device=device))
    rows, states = cache_rows([cache])
    assert (rows.nbytes, states.nbytes) == (3 * 8 * 4, 2 * 4 * 4 * 4)
    kept = rows.read(3).copy()
    assert kept.tobytes() == numbers[3].numpy().tobytes()
    rows.buffer(1)[...] = kept
    rows.write(1)
    assert torch.equal(cache.conv_state[1].cpu(), numbers[3]), "where the model reads it"
    assert torch.equal(cache.conv_state[[0, 2, 3, 4]].cpu(), numbers[[0, 2, 3, 4]])
