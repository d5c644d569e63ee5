"""From the outputs of an engine to whoever waits for each request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from ..errors import EngineDied, InvalidRequest
from .exchange import StepOutput

log = logging.getLogger(__name__)

#: Takes the outputs of one request, on the thread that they come in on; must not block.
Receive = Callable[[StepOutput], None]


class Routes:
    """The requests in flight by id. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._receivers: dict[str, Receive] = {}
        self._died: EngineDied | None = None

    def open(self, request_id: str, receive: Receive) -> None:
        """Raises :class:`InvalidRequest` for an id that is taken, and what :meth:`fail_all` was told."""
        with self._lock:
            if self._died is not None:  # a new one each time: what is raised again and again grows
                raise EngineDied(self._died.message, **self._died.facts)
            if request_id in self._receivers:
                raise InvalidRequest("request_id", f"{request_id!r} is already running")
            self._receivers[request_id] = receive

    def close(self, request_id: str) -> bool:
        """No output comes any more. False for an unknown id."""
        with self._lock:
            return self._receivers.pop(request_id, None) is not None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._receivers

    def deliver(self, outputs: Iterable[StepOutput]) -> None:
        """A receiver that fails is gone: nobody is left to tell."""
        for output in outputs:
            receive = self._receivers.get(output.request_id)
            if receive is None:
                continue
            try:
                receive(output)
            except Exception:  # its event loop is closed
                log.debug("request %s has no receiver any more", output.request_id)
                self.close(output.request_id)

    def fail_all(self, died: EngineDied) -> None:
        """Tells everybody, those who come later too."""
        with self._lock:
            self._died = died
            waiting = list(self._receivers)
        self.deliver(StepOutput(request_id, error=died) for request_id in waiting)
