"""The emulation finds what it says it finds: each kernel of ``csrc/simt/self_test.cu`` has one fault."""

from __future__ import annotations

import numpy as np
import pytest

from helexa_engine.testing.cuda_core import EmulatedCore, emulation

pytestmark = pytest.mark.skipif(emulation() is None, reason="the emulation is not built: scripts/build_native does")

FAULTS = {
    "no barrier between a write and another thread's read": (0, "reads shared byte 4, which nobody has written"),
    "no barrier between a read and another thread's write": (
        1,
        "reads shared byte 0, touched by thread 0 since the last barrier",
    ),
    "a warp's barrier between two warps": (2, "which nobody has written"),
    "a read of what nobody wrote": (3, "reads shared byte 0, which nobody has written"),
    "one behind the end of a shared array": (4, "shared write of element 64 of an array of 64"),
    "a barrier that half the block reaches": (5, "thread 32 of the block has left the kernel"),
    "a warp operation without one lane": (6, "thread 3 of the block has left the kernel"),
    "a copy that is not waited for": (7, "while an asynchronous copy to it is under way"),
    "behind a global buffer": (8, "access outside of a global buffer"),
    "before a global buffer": (9, "access outside of a global buffer"),
    "a vector at the wrong address": (10, "misaligned global access of 16 bytes"),
    "more shared memory than there is": (11, "takes 512 bytes of shared memory of 256"),
    "two different warp operations": (12, "that not all threads reach"),
}


@pytest.fixture
def core() -> EmulatedCore:
    return EmulatedCore(at_front=True, thread_order=0)


@pytest.mark.parametrize("fault", FAULTS)
def test_finds(fault: str, core: EmulatedCore) -> None:
    which, message = FAULTS[fault]
    if which == 8:
        core = EmulatedCore(at_front=False, thread_order=0)
    x, out = core.put(np.ones(64, dtype=np.float32)), core.put(np.zeros(64, dtype=np.float32))
    with pytest.raises(RuntimeError, match=r"faulty: block \(0, 0, 0\), thread \(\d+, 0, 0\): ") as caught:
        core.kernels.self_test.faulty(core.address(x), core.address(out), which)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "fault", ["no barrier between a write and another thread's read", "a warp's barrier between two warps"]
)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_finds_races_in_every_order(fault: str, order: int) -> None:
    core = EmulatedCore(at_front=True, thread_order=order)
    x, out = core.put(np.ones(64, dtype=np.float32)), core.put(np.zeros(64, dtype=np.float32))
    with pytest.raises(RuntimeError, match="shared byte"):
        core.kernels.self_test.faulty(core.address(x), core.address(out), FAULTS[fault][0])


def test_goes_on_after_a_fault(core: EmulatedCore) -> None:
    x, out = core.put(np.arange(64, dtype=np.float32)), core.put(np.zeros(64, dtype=np.float32))
    for _ in range(3):
        with pytest.raises(RuntimeError):
            core.kernels.self_test.faulty(core.address(x), core.address(out), 6)
        core.kernels.self_test.faulty(core.address(x), core.address(out), 99)
        np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_sound_kernel_runs_in_every_order(order: int) -> None:
    core = EmulatedCore(at_front=False, thread_order=order)
    values = np.random.default_rng(0).integers(-100, 100, (3, 64)).astype(np.float32)  # sums are exact in every order
    x, out = core.put(values), core.put(np.full((3, 64), np.nan, dtype=np.float32))
    core.kernels.self_test.sums(core.address(x), core.address(out), 3)
    np.testing.assert_array_equal(out, np.broadcast_to(values.sum(1, keepdims=True), (3, 64)))


def test_int8_matrices_multiply_exactly(core: EmulatedCore) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, (rows, 32), dtype=np.int8) for rows in (16, 8))
    x, y, out = core.put(a), core.put(b), core.put(np.zeros((16, 8), dtype=np.int32))
    core.kernels.self_test.multiply(core.address(x), core.address(y), core.address(out), True)
    np.testing.assert_array_equal(out, a.astype(np.int32) @ b.T.astype(np.int32))


def test_bfloat16_matrices_multiply(core: EmulatedCore) -> None:
    rng = np.random.default_rng(0)
    a, b = (
        rng.integers(-64, 64, (rows, 16)).astype(np.float32) for rows in (16, 8)
    )  # exact in bfloat16 and in every order
    x, y = (core.put((m.view(np.uint32) >> 16).astype(np.uint16)) for m in (a, b))
    out = core.put(np.zeros((16, 8), dtype=np.float32))
    core.kernels.self_test.multiply(core.address(x), core.address(y), core.address(out), False)
    np.testing.assert_array_equal(out, a @ b.T)
