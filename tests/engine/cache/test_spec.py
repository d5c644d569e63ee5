"""What layers remember: the bytes that are planned are the bytes that are allocated."""

from __future__ import annotations

import pytest
import torch

from helexa_engine.cache.spec import PAGE_SIZE, AttentionCacheSpec, KvDtype, StateCacheSpec
from helexa_engine.errors import InvalidRequest


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pages_take_the_bytes_that_are_planned(dtype: KvDtype) -> None:
    spec = AttentionCacheSpec(num_kv_heads=2, head_dim=48, dtype=dtype)
    cache = spec.allocate(3)
    assert cache.k.shape == (3, 2, 48, PAGE_SIZE) and cache.v.shape == (3, 2, PAGE_SIZE, 48)
    assert cache.k.dtype == cache.v.dtype == getattr(torch, dtype)
    assert nbytes(cache.k, cache.v) == 3 * spec.page_bytes
    assert not cache.k.any() and not cache.v.any()


def test_quantised_pages_take_the_bytes_that_are_planned() -> None:
    spec = AttentionCacheSpec(num_kv_heads=2, head_dim=96, dtype="q8_0")
    cache = spec.allocate(3)
    assert cache.k.dtype == cache.v.dtype == torch.int8
    assert nbytes(cache.k, cache.v) == 3 * spec.page_bytes == 3 * 2 * 2 * PAGE_SIZE * 96 * 34 // 32


@pytest.mark.parametrize(
    ("dtype", "rows", "stored"), [("bfloat16", PAGE_SIZE, torch.bfloat16), ("q8_0", PAGE_SIZE + 4, torch.int8)]
)
def test_pages_on_cuda_take_the_bytes_that_are_planned(dtype: KvDtype, rows: int, stored: torch.dtype) -> None:
    spec = AttentionCacheSpec(num_kv_heads=2, head_dim=96, dtype=dtype, device="cuda")
    cache = spec.allocate(3)
    assert cache.k.shape == cache.v.shape == (3, 2, rows, 96)
    assert cache.k.dtype == cache.v.dtype == stored
    assert nbytes(cache.k, cache.v) == 3 * spec.page_bytes
    assert not cache.k.any() and not cache.v.any()


@pytest.mark.parametrize(
    ("device", "dtype", "others"),
    [
        ("cpu", "bfloat16", "float32 or float16 or q8_0"),
        ("cuda", "float16", "bfloat16 or q8_0"),
        ("cuda", "float32", "bfloat16 or q8_0"),
    ],
)
def test_what_a_device_does_not_read_is_refused(device: str, dtype: KvDtype, others: str) -> None:
    with pytest.raises(InvalidRequest, match=f"kv_dtype.* on {device} are stored as {others}, not as {dtype}"):
        AttentionCacheSpec(num_kv_heads=2, head_dim=64, dtype=dtype, device=device)


def test_heads_that_blocks_do_not_fill_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="kv_dtype.*multiple of 32 dimensions, the model's have 80; take float16"):
        AttentionCacheSpec(num_kv_heads=2, head_dim=80, dtype="q8_0")
    with pytest.raises(InvalidRequest, match="take bfloat16"):
        AttentionCacheSpec(num_kv_heads=2, head_dim=80, dtype="q8_0", device="cuda")


def test_states_take_the_bytes_that_are_planned_and_are_cleared_slot_by_slot() -> None:
    spec = StateCacheSpec(conv_channels=80, conv_kernel=4, num_v_heads=3, head_k_dim=16, head_v_dim=32)
    cache = spec.allocate(4)
    assert cache.conv_state.shape == (4, 3, 80) and cache.recurrent_state.shape == (4, 3, 16, 32)
    assert cache.conv_state.dtype == cache.recurrent_state.dtype == torch.float32
    assert nbytes(cache.conv_state, cache.recurrent_state) == 4 * spec.slot_bytes
    cache.conv_state.fill_(1.0), cache.recurrent_state.fill_(1.0)
    cache.clear([0, 2])
    for slot in range(4):
        expected = 0.0 if slot in (0, 2) else 1.0
        assert (cache.conv_state[slot] == expected).all() and (cache.recurrent_state[slot] == expected).all()
    cache.copy(1, 2)
    for state in (cache.conv_state, cache.recurrent_state):
        assert [float(state[slot].mean()) for slot in range(4)] == [0.0, 1.0, 1.0, 1.0]
    cache.conv_state[1] = 5.0
    assert (cache.conv_state[2] == 1.0).all(), "a copy is a copy"
