"""A worker process seen from the server's: started, talked to, watched and ended by :class:`WorkerProcess`. No torch here."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from .. import env
from ..config import EngineConfig
from ..errors import EngineDied, HelexaError
from .exchange import EngineRequest, EngineStats
from .model_info import ModelInfo, Progress
from .routes import Receive, Routes
from .worker_messages import (
    Abort,
    Close,
    Frames,
    FromWorker,
    Heartbeat,
    Load,
    Loaded,
    LoadProgress,
    Located,
    LogLine,
    Step,
    StopThinking,
    Submit,
    ToWorker,
    encode,
    from_worker,
)

log = logging.getLogger(__name__)

#: Lines of what the worker printed that are kept for the error it ends with.
_LAST_LINES = 20

#: A step of more tokens than this is allowed more time, in proportion.
_WATCHED_TOKENS = 64

#: Stages of a load (bringing torch from a cold disk, reading, reserving, quantising a tensor) take longer than steps do.
_LOAD_PATIENCE = 5

#: A worker that has closed its connection is given this long to end by itself.
_REAP_SECONDS = 5.0


class WorkerProcess:
    """Starts a worker that loads ``model``; every method may be called from any thread.

    One thread here does all the input and output, so nothing that is asked of a worker waits for it. That thread starts the process
    too and lasts as long: the kernel ends a worker when the thread that started it has gone.

    Args:
        progress: called on that thread with (stage, share done).
        available_bytes: what the model may take its share of; default, and at most: what the machine has.
        watchdog_seconds: how long a step of up to 64 tokens may take, and longer ones in proportion, and how long the process may give
            no sign of life; a load may go without that or without progress for five times as long. It is killed after that.

    Attributes:
        located: where the model is on disk.
        loaded: the model's facts, or the error that the load ended with.
        ended: why the process ended; it is reaped then.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        watchdog_seconds: float = 120.0,
        available_bytes: int | None = None,
    ) -> None:
        self.located: Future[Path] = Future()
        self.loaded: Future[ModelInfo] = Future()
        self.ended: Future[EngineDied] = Future()
        for future in (self.located, self.loaded, self.ended):
            future.set_running_or_notify_cancel()  # who waits for it cannot cancel it for others
        self._progress = progress
        self._watchdog_seconds = watchdog_seconds
        self._heartbeat_seconds = min(1.0, watchdog_seconds / 4)
        self._routes = Routes()
        self._stats = EngineStats(0, 0, 0, 1, 0, 0, 0, 0)
        self._outbox: deque[bytes] = deque()
        self._unsent = memoryview(b"")
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False
        self._kill_at: float | None = None
        self._killed_because: str | None = None
        self._died: HelexaError | None = None  # what the worker itself said at its end
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._line = b""
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        level = logging.getLogger("helexa_engine").getEffectiveLevel()
        self._send(Load(str(model), config, self._heartbeat_seconds, level, available_bytes))
        self._thread = threading.Thread(target=self._run, name="helexa-worker-io", daemon=True)
        self._thread.start()

    # -- Asking

    @property
    def pid(self) -> int | None:
        """Of the process, once it is started."""
        return self._process.pid if self._process is not None else None

    def submit(self, request: EngineRequest, receive: Receive) -> None:
        """Sends a request; ``receive`` gets its outputs on another thread and must not block.

        Raises:
            EngineDied: the worker has ended.
            InvalidRequest: the id is already running.
        """
        self._routes.open(request.request_id, receive)
        self._send(Submit(request))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its answers, before the next step. Unknown ids are no error."""
        known = self._routes.close(request_id) if index is None else request_id in self._routes
        if known:
            self._send(Abort(request_id, index))

    def stop_thinking(self, request_id: str) -> bool:
        """False for an unknown id."""
        if request_id not in self._routes:
            return False
        self._send(StopThinking(request_id))
        return True

    def stats(self) -> EngineStats:
        """As of the last step, or the last sign of life."""
        return self._stats

    def close(self, timeout: float) -> None:
        """Ends running requests with :class:`EngineDied` and the process after the step under way, at the latest after ``timeout``
        seconds. Returns when it has gone."""
        self._closing = True
        self._kill_at = time.monotonic() + timeout
        self._send(Close())
        self._thread.join()

    def kill(self) -> None:
        """Ends the process now."""
        self.close(0.0)

    def _send(self, message: ToWorker) -> None:
        self._outbox.append(encode(message))
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: it has gone
            self._wake_write.send(b"x")

    # -- On the thread for input and output

    def _run(self) -> None:
        oom_kills = _oom_kills()
        try:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    self._process = process = self._start(theirs)
                try:
                    self._talk(ours, process)
                except BaseException as error:  # a fault of ours must not leave the process behind
                    log.exception("talking to the worker failed")
                    self._kill(f"talking to it failed: {type(error).__name__}: {error}")
            code = self._reap(process)
            died = self._cause(code, _oom_kills() - oom_kills)
        except OSError as error:
            died = EngineDied(f"a worker process could not be started: {error}")
        self._wake_write.close()
        self._wake_read.close()
        for future in (self.located, self.loaded):
            if not future.done():
                future.set_exception(died if self._died is None else self._died)
        self._routes.fail_all(died)
        self.ended.set_result(died)

    def _start(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        """A fresh interpreter that imports what this one does, and nothing from the folder it happens to be in."""
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        descriptor = theirs.fileno()
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "helexa_engine.runtime.worker", str(descriptor), str(os.getpid())],
            env={**env.inherited(), "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(descriptor,),
        )

    def _talk(self, ours: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Until the worker closes its end."""
        ours.setblocking(False)
        assert process.stdout is not None
        output = process.stdout.fileno()
        os.set_blocking(output, False)
        frames = Frames()
        watchdog = _Watchdog(self._watchdog_seconds)
        last = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(ours, selectors.EVENT_READ)
            selector.register(output, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while True:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox or self._unsent else 0)
                selector.modify(ours, wanted)
                for key, ready in selector.select(self._heartbeat_seconds):
                    if key.fileobj is self._wake_read:
                        self._wake_read.recv(4096)
                    elif key.fileobj is not ours:
                        if not self._read_output(output):
                            selector.unregister(output)
                    elif ready & selectors.EVENT_READ:
                        data = _receive(ours)
                        if not data:
                            return
                        for body in frames.push(data):
                            message = from_worker(body)
                            watchdog.heard(message)
                            self._take(message)
                self._flush(ours)
                now = time.monotonic()
                # A pause of this process, as of the whole machine, is not held against the worker.
                fault = watchdog.passed(min(now - last, 2 * self._heartbeat_seconds))
                last = now
                if fault is not None:
                    self._kill(fault)
                if self._kill_at is not None and now >= self._kill_at:
                    self._kill("it did not end in time")

    def _kill(self, why: str) -> None:
        if self._killed_because is None and self._process is not None:
            self._killed_because = why
            self._process.kill()

    def _flush(self, ours: socket.socket) -> None:
        """Sends what the socket takes."""
        try:
            while self._unsent or self._outbox:
                if not self._unsent:
                    self._unsent = memoryview(self._outbox.popleft())
                self._unsent = self._unsent[ours.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # it has gone; reading says so too
            self._unsent = memoryview(b"")

    def _take(self, message: FromWorker) -> None:
        if isinstance(message, Step):
            self._stats = message.stats
            self._routes.deliver(message.outputs)
        elif isinstance(message, Heartbeat):
            self._stats = message.stats or self._stats
        elif isinstance(message, LoadProgress):
            if self._progress is not None:
                self._progress(message.stage, message.fraction)
        elif isinstance(message, Located):
            self.located.set_result(message.path)
        elif isinstance(message, Loaded):
            self._stats = message.stats
            self.loaded.set_result(message.info)
        elif isinstance(message, LogLine):
            logging.getLogger(message.logger).log(message.level, "%s", message.text)
        else:
            self._died = message.error

    def _read_output(self, output: int) -> bool:
        """What the worker prints past its log: the last words of a crash among it. False at its end."""
        try:
            data = os.read(output, 1 << 16)
        except BlockingIOError:
            return True
        *lines, self._line = (self._line + data).split(b"\n")
        self._line = self._line[-4096:]
        if not data and self._line:
            lines.append(self._line)
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._last_lines.append(text)
                log.warning("worker %s: %s", self.pid, text)
        return bool(data)

    def _reap(self, process: subprocess.Popen[bytes]) -> int:
        """Waits for the process, which has closed its end and so is about to go; its exit code."""
        try:
            code = process.wait(timeout=_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill("it closed its connection and did not end")
            code = process.wait()
        assert process.stdout is not None
        with process.stdout:
            for _ in range(16):  # what a pipe holds
                if not self._read_output(process.stdout.fileno()):
                    break
        return code

    def _cause(self, code: int, oom_kills: int) -> EngineDied:
        if self._closing:
            return EngineDied("the engine is closed")
        if self._killed_because is not None:
            return EngineDied(f"the worker process was killed: {self._killed_because}")
        if self._died is not None:
            died = self._died
            return died if isinstance(died, EngineDied) else EngineDied(f"the worker process ended: {died.message}")
        said = f"; its last words: {' | '.join(list(self._last_lines)[-3:])}"[:600] if self._last_lines else ""
        if code == -signal.SIGKILL:
            if oom_kills > 0:
                why = "because memory ran out, as the kernel counted; load it with a smaller max_model_len or memory_fraction"
            else:
                why = "probably because memory ran out, or by hand"
            return EngineDied(f"the worker process was killed (SIGKILL), {why}", signal="SIGKILL")
        if code < 0:
            name = _signal_name(-code)
            return EngineDied(f"the worker process ended by signal {name}{said}", signal=name)
        return EngineDied(f"the worker process ended with exit code {code}{said}", exit_code=code)


class _Watchdog:
    """Says when a worker hangs: it is silent, or a step or a load does not come on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._silent = 0.0
        self._stuck = 0.0
        self._steps = -1
        self._step_tokens = 0
        self._loading = True

    def heard(self, message: FromWorker) -> None:
        self._silent = 0.0
        if isinstance(message, LoadProgress | Located | Loaded):
            self._stuck = 0.0
            self._loading = not isinstance(message, Loaded)
        elif isinstance(message, Step | Heartbeat) and message.stats is not None:
            if message.stats.steps_total != self._steps:
                self._stuck = 0.0
            self._steps, self._step_tokens = message.stats.steps_total, message.stats.step_tokens

    def passed(self, seconds: float) -> str | None:
        """What is wrong after ``seconds`` more, if anything is."""
        self._silent += seconds
        self._stuck = self._stuck + seconds if self._loading or self._step_tokens else 0.0
        patience = _LOAD_PATIENCE * self._seconds if self._loading else self._seconds
        if self._silent > patience:
            return f"it gave no sign of life for {self._silent:.3g} seconds (watchdog_seconds={self._seconds:g})"
        if self._loading:
            if self._stuck <= patience:
                return None
            return (
                f"its load made no progress for {self._stuck:.3g} seconds "
                f"({_LOAD_PATIENCE} times watchdog_seconds={self._seconds:g})"
            )
        if self._stuck > self._seconds * max(1.0, self._step_tokens / _WATCHED_TOKENS):
            return (
                f"a step of {self._step_tokens} tokens was not done after {self._stuck:.3g} seconds "
                f"(watchdog_seconds={self._seconds:g} for each {_WATCHED_TOKENS} tokens)"
            )
        return None


def _receive(connection: socket.socket) -> bytes:
    """What has come; nothing at the end, also where it came by a reset."""
    try:
        return connection.recv(1 << 18)
    except ConnectionError:
        return b""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _oom_kills() -> int:
    """How often the kernel has killed in this process's control group for want of memory; 0 where it does not say."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().splitlines()[-1].rpartition(":")[2]
        events = Path(f"/sys/fs/cgroup{group.rstrip('/')}/memory.events").read_text(encoding="ascii")
        return int(dict(line.split() for line in events.splitlines())["oom_kill"])
    except (OSError, ValueError, KeyError, IndexError):
        return 0
