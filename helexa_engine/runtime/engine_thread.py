"""The one thread that steps an engine. :class:`LLM` and :class:`AsyncEngine` both put requests in here and get events out.

Text is handled on this thread too, right after the step that produced the tokens: a stop string then ends its answer before
another token is computed, and an interrupt in the caller's thread never meets a half-done step.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from ..errors import EngineDied, HelexaError, InvalidRequest
from ..events import Event, Failed, Finished
from .engine import Engine, EngineRequest, EngineStats, StepOutput

log = logging.getLogger(__name__)

Deliver = Callable[[list[Event]], None]


class EventMaker(Protocol):
    """Turns what the engine says about one request into events (detokenizer, stop strings, parsers)."""

    def push(self, output: StepOutput) -> list[Event]:
        """Events of one step of one answer; a :class:`Finished` among them ends the answer, also where the engine goes on."""
        ...


class _Running:
    """A request in flight."""

    def __init__(self, request: EngineRequest, events: EventMaker, deliver: Deliver) -> None:
        self.request = request
        self.events = events
        self.deliver = deliver
        self.unfinished = set(range(request.params.n))


class EngineThread:
    """Owns an :class:`Engine`; every method may be called from any thread.

    torch is kept to one thread in there: what runs in parallel is the native core, and two thread teams on the same cores cost
    more than either gives.
    """

    def __init__(self, engine: Engine, name: str = "engine") -> None:
        self._engine = engine
        self._running: dict[str, _Running] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._died: EngineDied | None = None
        self._thread = threading.Thread(target=self._run, name=f"helexa-{name}", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest, events: EventMaker, deliver: Deliver) -> None:
        """Queues a request. ``deliver`` gets its events on the engine's thread and must not block.

        Raises:
            EngineDied: the engine stopped on a fault or was closed.
            InvalidRequest, ContextLengthExceeded: see :meth:`Engine.check`; or the id is already running.
        """
        self._engine.check(request)
        with self._wake:
            if self._died or self._closing:
                raise EngineDied("the engine is closed") from self._died
            if request.request_id in self._running:
                raise InvalidRequest("request_id", f"{request.request_id!r} is already running")
            self._running[request.request_id] = _Running(request, events, deliver)
            self._commands.append(lambda: self._add(request))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; its pages are then free and no further event comes. Unknown ids are no error."""
        with self._wake:
            if self._running.pop(request_id, None) is not None:
                self._commands.append(lambda: self._engine.abort(request_id))
                self._wake.notify()

    def stop_thinking(self, request_id: str) -> bool:
        """Ends the reasoning of a request before the next step. False for an unknown id."""
        with self._wake:
            if request_id not in self._running:
                return False
            self._commands.append(lambda: self._engine.stop_thinking(request_id))
            self._wake.notify()
            return True

    def stats(self) -> EngineStats:
        """Never waits for a step."""
        return self._engine.stats()

    @property
    def died(self) -> EngineDied | None:
        """Why the engine stopped, if it did."""
        return self._died

    def close(self, timeout: float) -> bool:
        """Ends every request with :class:`EngineDied` after at most the step under way. False when that took longer than ``timeout``."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- On the engine's thread

    def _run(self) -> None:
        torch.set_num_threads(1)
        in_order = False
        try:
            while True:
                with self._wake:
                    is_wanted = self._wake.wait_for(self._is_wanted, self._engine.seconds_to_save())
                    if self._closing:
                        break
                    commands, self._commands = self._commands, deque()
                if not is_wanted:
                    self._engine.save(self._is_wanted)
                for command in commands:
                    command()
                for output in self._engine.step():
                    self._dispatch(output)
            self._end(EngineDied("the engine was closed while the request ran"))
            in_order = True
        except BaseException as error:
            log.exception("the engine died")
            died = EngineDied(f"the engine died: {type(error).__name__}: {error}")
            died.__cause__ = error
            self._end(died)
        self._engine.close(in_order=in_order)

    def _is_wanted(self) -> bool:
        return bool(self._commands or self._closing or self._engine.has_work)

    def _add(self, request: EngineRequest) -> None:
        try:
            self._engine.add_request(request)
        except Exception as error:  # a grammar that does not compile is one request's failure
            self._fail(request.request_id, error)

    def _dispatch(self, output: StepOutput) -> None:
        running = self._running.get(output.request_id)
        if running is None or output.index not in running.unfinished:
            return
        if output.error is not None:
            self._fail(output.request_id, output.error)
            return
        try:
            events = running.events.push(output)
            for event in events:
                if isinstance(event, Finished):
                    running.unfinished.discard(event.index)
                    if output.finish_reason is None:
                        self._engine.abort(output.request_id, event.index)
            if not running.unfinished:
                with self._wake:
                    self._running.pop(output.request_id, None)
            running.deliver(events)
        except Exception as error:  # a parser's fault, or a receiver that is gone
            self._fail(output.request_id, error)

    def _fail(self, request_id: str, error: Exception) -> None:
        """One request ends with ``error``; the others go on."""
        self._engine.abort(request_id)
        with self._wake:
            running = self._running.pop(request_id, None)
        if running is None:
            return
        if not isinstance(error, HelexaError):
            log.error("request %s failed", request_id, exc_info=error)
            failure = HelexaError(f"the request failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            error = failure
        _deliver_quietly(running, Failed(error))

    def _end(self, died: EngineDied) -> None:
        with self._wake:
            self._died = died
            running, self._running = list(self._running.values()), {}
        for request in running:
            _deliver_quietly(request, Failed(died))


def _deliver_quietly(running: _Running, event: Event) -> None:
    try:
        running.deliver([event])
    except Exception:  # the receiver's event loop is closed: nobody is left to tell
        log.debug("request %s has no receiver any more", running.request.request_id)
