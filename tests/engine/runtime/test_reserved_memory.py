"""What a model keeps is there before its first request: zeros, in one piece, resident."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from helexa_engine.cache.spec import AttentionCacheSpec, StateCacheSpec
from helexa_engine.ops.registry import native_core
from helexa_engine.runtime import reserved_memory
from helexa_engine.runtime.reserved_memory import ReservedMemory

MB = 2**20
needs_native = pytest.mark.skipif(native_core() is None, reason="the native core is not built")


@pytest.fixture(params=["native", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the native core and without it."""
    if request.param == "torch":
        monkeypatch.setattr(reserved_memory, "native_core", lambda: None)
    elif native_core() is None:
        pytest.skip("the native core is not built")


def test_tensors_are_zeros_of_their_own(either: None) -> None:
    shapes = [((3, 5), torch.float16), ((7,), torch.float32), ((0, 4), torch.float32), ((1000, 1000), torch.float32)]
    nbytes = sum(torch.empty(shape, dtype=dtype).nbytes for shape, dtype in shapes)
    memory = ReservedMemory(nbytes, len(shapes))
    tensors = [memory.zeros(*shape, dtype=dtype) for shape, dtype in shapes]
    for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape and tensor.dtype is dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0 and not tensor.any()
        tensor.fill_(i + 1)
    assert all((tensor == i + 1).all() for i, tensor in enumerate(tensors)), "they overlap"


def test_a_tensor_keeps_the_memory_alive(either: None) -> None:
    tensor = ReservedMemory(4 * MB, 1).zeros(MB)
    gc.collect()
    other = ReservedMemory(4 * MB, 1).zeros(MB).fill_(7.0)
    tensor += 1
    assert tensor.sum() == MB and (other == 7.0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")
def test_memory_of_a_device_is_taken_in_one_piece() -> None:
    memory = ReservedMemory(4 * MB, 2, torch.device("cuda"))
    first, second = memory.zeros(MB // 4), memory.zeros(3, MB, dtype=torch.uint8)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    first.fill_(1.0)
    assert first.is_cuda and not second.any()
    with pytest.raises(ValueError, match="were reserved"):
        memory.zeros(MB)


@needs_native
def test_more_than_was_reserved_is_refused() -> None:
    with pytest.raises(ValueError):
        ReservedMemory(1024, 1).zeros(2 * MB)


@needs_native
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("nbytes", [MB // 2, 33 * MB + 12345])
def test_reserved_is_resident(nbytes: int) -> None:
    """Not only addresses: nothing grows when it is written to, and it goes with its last tensor."""
    before = resident()
    tensor = ReservedMemory(nbytes, 1).zeros(nbytes // 4)
    reserved = resident()
    assert nbytes <= reserved - before < nbytes + MB
    tensor.fill_(1.0)
    assert resident() - reserved < MB
    del tensor
    assert resident() - before < MB


def resident() -> int:
    """Bytes of this process that are in memory, counted page by page and not from per-processor caches of the counters."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def test_caches_take_their_zeros_from_it(either: None) -> None:
    attention = AttentionCacheSpec(num_kv_heads=2, head_dim=32, dtype="float16")
    delta_net = StateCacheSpec(conv_channels=24, conv_kernel=4, num_v_heads=2, head_k_dim=16, head_v_dim=16)
    memory = ReservedMemory(3 * attention.page_bytes + 5 * delta_net.slot_bytes, 4)
    cache, state = attention.allocate(3, memory.zeros), delta_net.allocate(5, memory.zeros)
    assert cache.k.nbytes + cache.v.nbytes == 3 * attention.page_bytes
    assert state.conv_state.nbytes + state.recurrent_state.nbytes == 5 * delta_net.slot_bytes
    state.copy(1, 2)
    state.clear([1])
