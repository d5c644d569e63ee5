"""What models may take together."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from helexa_engine.config import EngineConfig
from helexa_engine.errors import InvalidRequest
from helexa_engine.runtime import nvml
from helexa_engine.runtime.cuda_facts import CudaDevice, CudaFacts
from helexa_server.config import ServerConfig
from helexa_server.lifecycle import card_memory
from helexa_server.lifecycle.budget import Budget
from helexa_server.lifecycle.card_memory import BESIDE_MODEL_BYTES, CardMemory, memory_of


def test_what_is_reserved_is_taken_also_where_the_system_has_not_handed_it_out() -> None:
    budget = Budget(available=lambda: 1000)
    assert budget.total_bytes == 1000 and budget.free(0) == 1000
    assert budget.free(700) == 300 and budget.free(1200) == 0


def test_what_others_have_taken_is_not_free() -> None:
    available = [1000]
    budget = Budget(available=lambda: available[0])
    available[0] = 200
    assert budget.free(700) == 200
    assert budget.total_bytes == 1000


def test_where_nothing_is_reserved_the_total_is_what_there_is_now() -> None:
    available = [1000]
    budget = Budget(available=lambda: available[0])
    available[0] = 5000
    assert budget.free(10) == 990, "the system calls free what is promised already"
    assert budget.free(0) == 5000 and budget.total_bytes == 5000


def test_a_limit_holds_whatever_there_is() -> None:
    budget = Budget(600, lambda: 1000)
    assert budget.free(0) == 600 and budget.free(400) == 200 and budget.total_bytes == 600


def test_the_limit_is_a_size() -> None:
    assert ServerConfig(memory_budget="1.5GiB").memory_budget_bytes() == 3 * 2**29
    assert ServerConfig().memory_budget_bytes() is None
    for bad in ("much", "0", "-1GiB"):
        with pytest.raises(InvalidRequest, match="memory_budget: expected a size such as 20GiB"):
            ServerConfig(memory_budget=bad)


def test_a_cards_memory_is_what_a_worker_leaves_of_it() -> None:
    free = [80 << 30]
    card = CardMemory(lambda: free[0], patience=5.0)
    assert card() == (80 << 30) - BESIDE_MODEL_BYTES
    free[0] = 1
    assert card() == 0


def test_a_driver_that_hangs_is_waited_for_once() -> None:
    released, hangs = threading.Event(), False

    def read() -> int:
        if hangs:
            released.wait(10)
        return 2 << 30

    card = CardMemory(read, patience=0.3)
    assert card() == 1 << 30
    hangs = True
    started = time.monotonic()
    assert [card() for _ in range(50)] == [1 << 30] * 50
    assert time.monotonic() - started < 0.3 + 1.0
    released.set()


def test_a_driver_that_goes_leaves_nothing() -> None:
    def read() -> int:
        raise nvml.NoDriver("gone")

    assert CardMemory(read, patience=5.0)() == 0


FACTS = CudaFacts(
    True, ("80",), 13000, 13000, (CudaDevice("card", (8, 0), 1), ), torch="2.11", torch_cuda="13.0"
)  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "facts", "expected"),
    [
        (["auto"], FACTS, "card"),
        (["cuda", "auto"], FACTS, "card"),
        (["cpu"], FACTS, "machine"),
        (["auto"], replace(FACTS, driver=0), "machine"),
        (["cuda"], replace(FACTS, driver=0), "card"),  # its load says what is in the way
        (["cpu", "auto"], FACTS, "less"),
    ],
)
def test_memory_is_counted_where_models_run(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], facts: CudaFacts, expected: str
) -> None:
    monkeypatch.setattr(card_memory, "gather_without_device", lambda: facts)
    monkeypatch.setattr(card_memory, "available_bytes", lambda: 5)
    free = memory_of([EngineConfig(device=device) for device in devices], lambda: 7)  # type: ignore[arg-type]
    assert free() == {"card": 7, "machine": 5, "less": 5}[expected]
    mapped = memory_of([EngineConfig(device="auto", mmap_experts=True)], lambda: 7)
    assert mapped() == 5, "experts in the mapped file are computed on the processor"
