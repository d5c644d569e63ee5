"""The right to use a loaded model, which its holder can lose."""

from __future__ import annotations

import asyncio


class Lease:
    """While one exists, its model is not unloaded to make room. Entered once the engine is there; see
    :meth:`~.manager.ModelManager.lease`."""

    def __init__(self) -> None:
        self._scope: asyncio.Timeout | None = None

    @property
    def is_serving(self) -> bool:
        """False while its holder still waits for the engine."""
        return self._scope is not None

    def scope(self) -> asyncio.Timeout:
        """The context in which the holder uses the engine; it ends with TimeoutError when the lease is ended."""
        self._scope = asyncio.timeout(None)
        return self._scope

    @property
    def is_ended(self) -> bool:
        return self._scope is not None and self._scope.expired()

    def end(self) -> None:
        """Cancels what the holder does, at once."""
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())
