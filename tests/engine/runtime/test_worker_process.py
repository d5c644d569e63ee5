"""The watchdog's judgement, how an exit is described, and a worker that hangs in a step or a load."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helexa_engine import AsyncEngine, EngineConfig, GenerateRequest, SamplingParams
from helexa_engine.errors import EngineDied, HelexaError, ModelNotFound, UnsupportedCheckpoint
from helexa_engine.events import Failed
from helexa_engine.runtime import async_engine, worker_process
from helexa_engine.runtime.exchange import EngineStats, StepOutput
from helexa_engine.runtime.sampler import Logprobs
from helexa_engine.runtime.worker_messages import Heartbeat, Loaded, LoadProgress, Step
from helexa_engine.runtime.worker_process import WorkerProcess, _Watchdog
from helexa_engine.testing.checkpoints import write_qwen3_folder


def stats(steps: int, tokens: int) -> EngineStats:
    return EngineStats(1, 0, 0, 1, 0, 0, 0, steps, step_tokens=tokens)


def loaded_watchdog(seconds: float) -> _Watchdog:
    watchdog = _Watchdog(seconds)
    watchdog.heard(Loaded(None, stats(0, 0)))  # type: ignore[arg-type]
    return watchdog


def test_silence() -> None:
    watchdog = loaded_watchdog(10)
    for _ in range(50):
        watchdog.heard(Heartbeat(stats(0, 0)))
        assert watchdog.passed(9) is None
    assert "no sign of life" in (watchdog.passed(9) or "")
    loading = _Watchdog(10)
    assert [loading.passed(9) is None for _ in range(6)] == [True] * 5 + [False]


@pytest.mark.parametrize(("tokens", "patience"), [(1, 10), (64, 10), (65, 10), (512, 80)])
def test_a_step_is_allowed_time_in_proportion_to_its_tokens(tokens: int, patience: int) -> None:
    watchdog = loaded_watchdog(10)
    watchdog.heard(Step([], stats(7, 0)))
    seconds = 0
    while watchdog.passed(1) is None:
        watchdog.heard(Heartbeat(stats(7, tokens)))
        seconds += 1
    assert patience <= seconds <= patience + 2
    assert f"a step of {tokens} tokens" in (watchdog.passed(0) or "")


def test_steps_that_come_on_and_rest_are_no_fault() -> None:
    watchdog = loaded_watchdog(10)
    for i in range(100):
        watchdog.heard(Heartbeat(stats(i // 5, 64)))
        assert watchdog.passed(1.5) is None
    for _ in range(100):
        watchdog.heard(Heartbeat(stats(20, 0)))
        assert watchdog.passed(1.5) is None


def test_a_load_must_come_on() -> None:
    watchdog = _Watchdog(10)
    for i in range(20):
        watchdog.heard(LoadProgress("weights", i / 20))
        for _ in range(5):
            watchdog.heard(Heartbeat(None))
            assert watchdog.passed(9) is None
    watchdog.heard(Heartbeat(None))
    assert "its load made no progress" in (watchdog.passed(9) or "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_folder(tmp_path_factory.mktemp("models") / "tiny")


def ended(worker: WorkerProcess) -> EngineDied:
    return worker.ended.result(timeout=30)


def test_errors_of_a_load_are_those_of_the_library(tmp_path: Path) -> None:
    for model, kind in ((tmp_path / "none", ModelNotFound), (tmp_path, UnsupportedCheckpoint)):
        with pytest.raises(kind):
            AsyncEngine(model, EngineConfig())


@pytest.mark.parametrize(
    ("program", "words", "facts"),
    [
        (
            "import os; print('last words', flush=True); os._exit(7)",
            "exit code 7; its last words: last words",
            {"exit_code": 7},
        ),
        ("import os; os.kill(os.getpid(), 11)", "ended by signal SIGSEGV", {"signal": "SIGSEGV"}),
        (
            "import os; os.kill(os.getpid(), 9)",
            "killed .SIGKILL., probably because memory ran out",
            {"signal": "SIGKILL"},
        ),
    ],
)
def test_an_exit_is_described(monkeypatch: pytest.MonkeyPatch, program: str, words: str, facts: dict[str, Any]) -> None:
    popen = worker_process.subprocess.Popen
    monkeypatch.setattr(
        worker_process.subprocess, "Popen", lambda _, **options: popen([sys.executable, "-c", program], **options)
    )
    worker = WorkerProcess("demo", EngineConfig())
    died = ended(worker)
    assert died.facts == facts
    with pytest.raises(EngineDied, match=words):
        worker.loaded.result()


def test_a_kill_for_want_of_memory_is_told_by_the_kernels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    popen, counts = worker_process.subprocess.Popen, iter((4, 5))
    monkeypatch.setattr(worker_process, "_oom_kills", lambda: next(counts))
    program = "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(
        worker_process.subprocess, "Popen", lambda _, **options: popen([sys.executable, "-c", program], **options)
    )
    assert "because memory ran out, as the kernel counted" in ended(WorkerProcess("demo", EngineConfig())).message


def test_a_process_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(worker_process.subprocess, "Popen", refuse)
    worker = WorkerProcess("demo", EngineConfig())
    with pytest.raises(EngineDied, match="could not be started"):
        worker.loaded.result(timeout=10)
    worker.kill()


def test_closing_a_worker_that_hangs_takes_bounded_time(folder: Path) -> None:
    worker = WorkerProcess(folder, EngineConfig(max_model_len=128))
    worker.loaded.result(timeout=60)
    os.kill(worker.pid or 0, signal.SIGSTOP)
    started = time.monotonic()
    worker.close(0.2)
    assert time.monotonic() - started < 10
    with pytest.raises(EngineDied, match="closed"):
        raise ended(worker)
    worker.close(0.2)  # twice is harmless


def test_a_load_that_is_cancelled_ends_its_process(folder: Path) -> None:
    async def work() -> None:
        stages: list[str] = []
        loading = asyncio.create_task(
            AsyncEngine.load(folder, EngineConfig(), progress=lambda stage, _: stages.append(stage))
        )
        while not stages:
            await asyncio.sleep(0.005)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading

    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_reader_that_stays_behind_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "MAX_UNREAD", 50)

    async def work() -> None:
        engine = await AsyncEngine.load(folder, EngineConfig(max_model_len=1024))
        params = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=4)
        events = engine.generate(GenerateRequest(prompt="x", sampling_params=params))
        await anext(events)
        while engine.stats().num_running:  # it is ended though nobody reads
            await asyncio.sleep(0.005)
        rest = [event async for event in events]
        assert isinstance(rest[-1], Failed) and isinstance(rest[-1].error, async_engine.ReaderTooSlow)
        assert engine.stats().generation_tokens_total < 1000
        await engine.aclose()

    asyncio.run(asyncio.wait_for(work(), 60))


def test_the_inbox_counts_what_is_read() -> None:
    async def work() -> None:
        aborted: list[bool] = []
        inbox = async_engine._Inbox(asyncio.get_running_loop(), 10, lambda: aborted.append(True))
        for i in range(40):
            inbox.put(StepOutput("x", 0, i, logprobs=Logprobs(i, -1.0, ((1, -1.0),))))
            assert (await inbox.get()).token_id == i
        for i in range(8):
            inbox.put(StepOutput("x", 0, i, logprobs=Logprobs(i, -1.0, ((1, -1.0),))))
        got = [await inbox.get() for _ in range(6)]
        assert isinstance(got[-1].error, HelexaError) and aborted == [True]

    asyncio.run(work())
