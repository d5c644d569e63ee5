"""Does it fit? The memory that the models of a server may take together, by what they have reserved."""

from __future__ import annotations

from collections.abc import Callable

from helexa_engine.runtime.memory import available_bytes


class Budget:
    """Bytes for models, reserved and free.

    What models have reserved counts as taken from the moment they are loaded: the system hands memory out page by page as it is
    touched, so what it calls free includes pages that are promised already.

    Args:
        total_bytes: what all models may take together; default: what is free while none has reserved any.
        available: what the system has free now.
    """

    def __init__(self, total_bytes: int | None = None, available: Callable[[], int] = available_bytes) -> None:
        self._limit = total_bytes
        self._available = available
        self._total = available() if total_bytes is None else total_bytes

    @property
    def total_bytes(self) -> int:
        return self._total

    def free(self, reserved_bytes: int) -> int:
        """Bytes for another model beside those that have reserved so many."""
        available = self._available()
        if self._limit is None and not reserved_bytes:
            self._total = available
        return max(0, min(self._total - reserved_bytes, available))
