"""Free memory of the card that models run on, for a loop that must not wait for a driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from helexa_engine import env
from helexa_engine.config import EngineConfig
from helexa_engine.runtime import nvml
from helexa_engine.runtime.cuda_facts import gather_without_device, obstacle
from helexa_engine.runtime.memory import available_bytes

#: What a worker takes of a card besides its model: the context, and what libraries keep.
BESIDE_MODEL_BYTES = 1 << 30


class CardMemory:
    """Bytes that the first card has free for models, each time it is called.

    A driver that does not answer within ``patience`` seconds is not waited for again until it does: the last figure stands, at first 0.
    """

    def __init__(
        self, read: Callable[[], int] = lambda: nvml.free_bytes(env.first_cuda_device()), patience: float = 0.25
    ):
        self._read = read
        self._patience = patience
        self._reader = ThreadPoolExecutor(1, "helexa-card-memory")
        self._reading: Future[int] | None = None
        self._last = 0

    def __call__(self) -> int:
        patience = self._patience if self._reading is None else 0.0
        self._reading = self._reading or self._reader.submit(self._read)
        try:
            self._last = max(0, self._reading.result(patience) - BESIDE_MODEL_BYTES)
            self._reading = None
        except TimeoutError:
            pass
        except nvml.NoDriver:
            self._last, self._reading = 0, None
        return self._last


def memory_of(configs: Iterable[EngineConfig], card: Callable[[], int] | None = None) -> Callable[[], int]:
    """What is free where models with these configs run: on the card, on this machine, or, where they run on both, the less of the two."""
    has_card = obstacle(gather_without_device()) is None
    on_card = {
        config.device == "cuda" or (config.device == "auto" and has_card and not config.mmap_experts)
        for config in configs
    }
    if True not in on_card:
        return available_bytes
    of_card = card or CardMemory()
    return of_card if on_card == {True} else lambda: min(of_card(), available_bytes())
