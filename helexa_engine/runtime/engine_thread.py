"""The one thread that steps an engine, in a worker process as under :class:`LLM`. It knows no text: ids go in and come out."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

import torch

from ..errors import EngineDied, HelexaError, InvalidRequest
from .device_faults import device_lost, fault_of
from .engine import Engine, OnPromptLogits
from .exchange import EngineRequest, EngineStats, StepOutput
from .sampler import Grammar

log = logging.getLogger(__name__)

#: Takes what a step did for all its answers, on the engine's thread. Called with an empty list after a round without outputs, when
#: only the stats have changed.
Deliver = Callable[[list[StepOutput]], None]


class EngineThread:
    """Owns an :class:`Engine`; every method may be called from any thread.

    torch is kept to one thread in there: what runs in parallel is the native core, and two thread teams on the same cores cost
    more than either gives.
    """

    def __init__(self, engine: Engine, deliver: Deliver, name: str = "engine") -> None:
        self._engine = engine
        self._deliver = deliver
        self._running: dict[str, set[int]] = {}  # answers that have not ended
        self._commands: deque[Callable[[], None]] = deque()
        self._refused: list[StepOutput] = []
        self._wake = threading.Condition()
        self._closing = False
        self._died: EngineDied | None = None
        self._thread = threading.Thread(target=self._run, name=f"helexa-{name}", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: EngineRequest,
        *,
        make_grammar: Callable[[], Grammar] | None = None,
        on_prompt_logits: OnPromptLogits | None = None,
    ) -> None:
        """Queues a request; see :meth:`Engine.add_request`.

        Raises:
            EngineDied: the engine stopped on a fault or was closed.
            InvalidRequest, ContextLengthExceeded: see :meth:`EngineRequest.check`; or the id is already running.
        """
        self._engine.check(request)
        with self._wake:
            if self._died or self._closing:
                raise EngineDied("the engine is closed") from self._died
            if request.request_id in self._running:
                raise InvalidRequest("request_id", f"{request.request_id!r} is already running")
            self._running[request.request_id] = set(range(request.params.n))
            self._commands.append(lambda: self._add(request, make_grammar, on_prompt_logits))
            self._wake.notify()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its answers, before the next step; its pages are then free and no output comes any more.

        Unknown ids are no error.
        """
        with self._wake:
            unfinished = self._running.get(request_id)
            if unfinished is None:
                return
            if index is not None:
                unfinished.discard(index)
            if index is None or not unfinished:
                del self._running[request_id]
            self._commands.append(lambda: self._engine.abort(request_id, index))
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

    def join(self) -> None:
        """Waits until the engine has stopped, however it does."""
        self._thread.join()

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
                outputs = self._refused + self._engine.step()
                self._refused = []
                self._deliver(self._of_running(outputs))
            self._end(EngineDied("the engine was closed while the request ran"))
            in_order = True
        except BaseException as error:
            log.exception("the engine died")
            if fault_of(error) == "device_lost":
                died = device_lost(error, "in a step")
            else:
                died = EngineDied(f"the engine died: {type(error).__name__}: {error}")
                died.__cause__ = error
            self._end(died)
        self._engine.close(in_order=in_order)

    def _is_wanted(self) -> bool:
        return bool(self._commands or self._closing or self._engine.has_work)

    def _add(
        self,
        request: EngineRequest,
        make_grammar: Callable[[], Grammar] | None,
        on_prompt_logits: OnPromptLogits | None,
    ) -> None:
        try:
            self._engine.add_request(request, make_grammar=make_grammar, on_prompt_logits=on_prompt_logits)
        except Exception as error:  # a grammar's fault is one request's failure
            if not isinstance(error, HelexaError):
                log.error("request %s failed", request.request_id, exc_info=error)
                failure = HelexaError(f"the request failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                error = failure
            self._refused.append(StepOutput(request.request_id, error=error))

    def _of_running(self, outputs: list[StepOutput]) -> list[StepOutput]:
        """Without those that an abort has overtaken; notes which answers have ended."""
        kept = []
        with self._wake:
            for output in outputs:
                unfinished = self._running.get(output.request_id)
                if unfinished is None or not (output.error or output.index in unfinished):
                    continue
                kept.append(output)
                if output.finish_reason is not None:
                    unfinished.discard(output.index)
                if output.error is not None or not unfinished:
                    del self._running[output.request_id]
        return kept

    def _end(self, died: EngineDied) -> None:
        with self._wake:
            self._died = died
            running, self._running = list(self._running), {}
        self._deliver([StepOutput(request_id, error=died) for request_id in running])
