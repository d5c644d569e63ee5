"""The worker process: one loaded model, asked over a socket. ``python -m helexa_engine.runtime.worker FD PARENT``.

It belongs to the process that started it (:class:`~.worker_process.WorkerProcess`): it ends when that one does, however it does, and
leaves signals from a terminal or a service manager to it. Four threads: the engine's, which alone steps; one that reads what is
asked; one that compiles grammars; one that shows life. The step loop sends each step's outputs itself: it waits only where the
server's process has stopped reading altogether, for that has a thread that does nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import EngineDied, HelexaError
from .exchange import EngineRequest, StepOutput
from .worker_messages import (
    Abort,
    Close,
    Died,
    Frames,
    FromWorker,
    Heartbeat,
    Load,
    Loaded,
    LoadProgress,
    Located,
    LogLine,
    Step,
    Submit,
    ToWorker,
    encode,
    to_worker,
)

if TYPE_CHECKING:
    from .engine_thread import EngineThread
    from .sampler import Grammar

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

#: When memory runs out, the kernel is to take the model and not the server, which can load it again. From -1000 to 1000.
_OOM_SCORE_ADJUSTMENT = "500"


class Channel:
    """The worker's end of the socket. Whatever is tried on it after the server has gone ends the process."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: FromWorker) -> None:
        """From any thread."""
        data = encode(message)
        try:
            with self._lock:
                self._connection.sendall(data)
        except OSError:
            os._exit(0)

    def messages(self) -> Iterator[ToWorker]:
        """What the server says, until it has gone."""
        frames = Frames()
        while True:
            try:
                data = self._connection.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                os._exit(0)
            for body in frames.push(data):
                yield to_worker(body)


class ChannelHandler(logging.Handler):
    """Log records for the server to log."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(LogLine(record.name, record.levelno, self.format(record)))


class Worker:
    """Loads a model and answers for it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._engine: EngineThread | None = None
        self._closing = False
        self._compiling: set[str] = set()  # requests whose grammar is being compiled, unless aborted
        self._compiling_lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, "helexa-compile")

    def run(self) -> int:
        """Until the engine ends; the process's exit code."""
        messages = self._channel.messages()
        load = next(messages)
        assert isinstance(load, Load)
        root = logging.getLogger()
        root.addHandler(ChannelHandler(self._channel))
        root.setLevel(load.log_level)
        threading.Thread(target=self._read, args=(messages,), name="helexa-read", daemon=True).start()
        threading.Thread(target=self._beat, args=(load.heartbeat_seconds,), name="helexa-beat", daemon=True).start()
        try:
            engine = self._load(load)
        except HelexaError as error:
            self._channel.send(Died(error))
            return 1
        engine.join()
        if self._closing:
            return 0
        self._channel.send(Died(engine.died or EngineDied("the engine ended")))
        return 1

    def _load(self, load: Load) -> EngineThread:
        from ..text.structured import GrammarCompiler
        from .engine_thread import EngineThread  # brings torch
        from .load import load_engine
        from .locate import locate_model

        def report(stage: str, fraction: float) -> None:
            self._channel.send(LoadProgress(stage, fraction))

        report("starting", 0.0)
        path = locate_model(load.model, offline=load.config.offline, progress=report)
        self._channel.send(Located(path))
        loaded = load_engine(load.model, load.config, report, load.available_bytes)
        self._grammars = GrammarCompiler(loaded.processor.tokenizer)
        self._grammars.warm()  # now, so that no running answer waits for it later
        self._engine = EngineThread(loaded.engine, self._deliver, loaded.info.name)
        self._channel.send(Loaded(loaded.info, self._engine.stats()))
        return self._engine

    def _deliver(self, outputs: list[StepOutput]) -> None:
        assert self._engine is not None
        self._channel.send(Step(outputs, self._engine.stats()))

    def _beat(self, seconds: float) -> None:
        pause = threading.Event()
        while not pause.wait(seconds):
            self._channel.send(Heartbeat(None if self._engine is None else self._engine.stats()))

    # -- On the reading thread

    def _read(self, messages: Iterator[ToWorker]) -> NoReturn:
        try:
            for message in messages:
                self._handle(message)
        except BaseException:
            log.exception("the worker's reader failed")
        os._exit(1)

    def _handle(self, message: ToWorker) -> None:
        if isinstance(message, Close):
            self._closing = True
            if self._engine is None:
                os._exit(0)
            self._engine.close(0)
            return
        assert self._engine is not None and not isinstance(message, Load)
        if isinstance(message, Submit):
            request = message.request
            if request.constraint is None:
                self._submit(request)
            else:
                with self._compiling_lock:
                    self._compiling.add(request.request_id)
                self._compiler.submit(self._compile, request)
        elif isinstance(message, Abort):
            if message.index is None:
                with self._compiling_lock:
                    self._compiling.discard(message.request_id)
            self._engine.abort(message.request_id, message.index)
        else:
            self._engine.stop_thinking(message.request_id)

    def _submit(self, request: EngineRequest, make_grammar: Callable[[], Grammar] | None = None) -> None:
        assert self._engine is not None
        try:
            self._engine.submit(request, make_grammar=make_grammar)
        except HelexaError as error:
            self._refuse(request, error)

    def _compile(self, request: EngineRequest) -> None:
        """On the compiling thread."""
        assert request.constraint is not None
        try:
            make_grammar = self._grammars.maker(request.constraint)
        except HelexaError as error:
            self._refuse(request, error)
        except Exception as error:
            log.exception("request %s failed", request.request_id)
            self._refuse(request, HelexaError(f"the request failed: {type(error).__name__}: {error}"))
        else:
            with self._compiling_lock:
                if request.request_id in self._compiling:
                    self._compiling.discard(request.request_id)
                    self._submit(request, make_grammar)

    def _refuse(self, request: EngineRequest, error: HelexaError) -> None:
        self._deliver([StepOutput(request.request_id, error=error)])


def die_with(parent: int) -> None:
    """The kernel kills this process when the thread that started it ends, or ``parent`` with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had gone already
        os._exit(0)


def main() -> NoReturn:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with(parent)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJUSTMENT, encoding="ascii")
    faulthandler.enable()
    code = Worker(Channel(socket.socket(fileno=descriptor))).run()
    # Without the interpreter's farewell: threads of the core and of torch are still about, and the memory goes with the process.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
