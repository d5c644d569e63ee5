"""A worker process that dies or hangs, in every phase, behind a live server: who waits is told, the model comes back by itself and
answers as before, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helexa_engine import AsyncEngine, EngineConfig
from helexa_engine.runtime import worker_process
from helexa_engine.testing.checkpoints import write_qwen3_folder
from helexa_server.lifecycle.model_life import ModelLife, Progress, Recovery
from tests.server.live import Live, live_server, wait_until
from tests.server.test_serve import answers, free_port

from .worker_processes import is_alive, open_descriptors, workers_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SHORT = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 20000}
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_folder(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=32768)


@contextlib.contextmanager
def served(folder: Path, *, watchdog_seconds: float = 60.0, **recovery: Any) -> Iterator[Live]:
    """A live server over a worker; afterwards no process and no descriptor is left."""
    config = EngineConfig(max_model_len=32768, max_num_seqs=4, max_num_batched_tokens=128, seed=0, prefix_cache=False)

    async def load(progress: Progress) -> AsyncEngine:
        return await AsyncEngine.load(folder, config, progress=progress, watchdog_seconds=watchdog_seconds)

    before = open_descriptors()
    life = ModelLife(load, Recovery(**{"limit": 3, "backoff_seconds": 0.01, **recovery}))
    with live_server(None, life, load_wait_seconds=60.0) as live:
        yield live
    assert workers_of() == []
    wait_until(lambda: open_descriptors() <= before)


def ready(live: Live, recoveries: int = 0) -> int:
    """Waits for the model; the process that has it."""
    wait_until(lambda: live.model.engine is not None and live.model.life.recoveries == recoveries, 60)
    (pid,) = workers_of()
    return pid


def ask(live: Live, **body: Any) -> str:
    with live.http(timeout=60.0) as http:
        response = http.post(COMPLETIONS, json={**SHORT, **body})
    assert response.status_code == 200, response.text
    text = response.json()["choices"][0]["text"]
    assert isinstance(text, str)
    return text


def stats(live: Live) -> Any:
    assert live.model.engine is not None
    return live.model.engine.stats()


def health(live: Live) -> dict[str, Any]:
    (model,) = httpx.get(f"{live.url}/health").json()["models"]
    assert isinstance(model, dict)
    return model


def test_kill_in_decode(folder: Path) -> None:
    """A stream that has begun ends with the wire's error event; others get the status, and the next ones wait and are answered."""
    with served(folder) as live, live.http(timeout=60.0) as http:
        pid = ready(live)
        expected = ask(live)
        whole: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: whole.append(http.post(COMPLETIONS, json=LONG)))
        asking.start()
        wait_until(lambda: stats(live).num_running == 1)
        with httpx.stream("POST", f"{live.url}{COMPLETIONS}", json={**LONG, "stream": True}, timeout=60) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            os.kill(pid, signal.SIGKILL)
            last = [line for line in lines if line][-1]
        asking.join(30)
        for error, status in ((json.loads(last.removeprefix("data: ")), 500), (whole[0].json(), whole[0].status_code)):
            assert status == 500 and error["error"]["code"] == "engine_died" and "SIGKILL" in error["error"]["message"]
        assert ask(live) == expected, "asked in the middle of the recovery"
        assert ready(live, recoveries=1) != pid
        shown = health(live)
        assert (shown["status"], shown["recoveries"]) == ("ready", 1) and "SIGKILL" in shown["last_error"]
        metrics = http.get("/metrics").text
        assert (
            'helexa_recoveries_total{model_name="fake"} 1' in metrics
            and 'helexa_model_up{model_name="fake"} 1' in metrics
        )


def test_kill_in_prefill(folder: Path) -> None:
    with served(folder) as live, live.http(timeout=60.0) as http:
        pid = ready(live)
        expected = ask(live)
        got: list[httpx.Response] = []
        prompt = [5] * 32000
        asking = threading.Thread(target=lambda: got.append(http.post(COMPLETIONS, json={**SHORT, "prompt": prompt})))
        asking.start()
        wait_until(lambda: stats(live).num_running == 1)
        assert stats(live).prompt_tokens_total < 32000
        os.kill(pid, signal.SIGKILL)
        asking.join(30)
        assert got[0].status_code == 500 and got[0].json()["error"]["code"] == "engine_died"
        assert ask(live) == expected
        ready(live, recoveries=1)


def test_kill_while_loading_again(folder: Path) -> None:
    """It counts as one more try."""
    with served(folder) as live:
        pid = ready(live)
        expected = ask(live)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: any(worker != pid for worker in workers_of()))
        (loading,) = (worker for worker in workers_of() if worker != pid)
        os.kill(loading, signal.SIGKILL)
        assert ask(live) == expected
        assert ready(live, recoveries=1) not in (pid, loading)


def test_kill_while_loading_first(folder: Path) -> None:
    with served(folder) as live, live.http() as http:
        responses: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: responses.append(http.post(COMPLETIONS, json=SHORT)))
        asking.start()
        wait_until(lambda: len(workers_of()) == 1 and len(live.model.leases) == 1)
        os.kill(workers_of()[0], signal.SIGKILL)
        asking.join(60)
        (response,) = responses
        assert response.status_code == 500 and response.json()["error"]["code"] == "engine_died"
        assert health(live)["status"] == "unloaded" and "SIGKILL" in health(live)["last_error"]


def test_a_worker_that_hangs_is_replaced(folder: Path) -> None:
    with served(folder, watchdog_seconds=3.0) as live, live.http(timeout=60.0) as http:
        pid = ready(live)
        expected = ask(live)
        os.kill(pid, signal.SIGSTOP)
        response = http.post(COMPLETIONS, json=SHORT)
        assert response.status_code == 500
        assert "no sign of life" in response.json()["error"]["message"]
        assert ask(live) == expected
        ready(live, recoveries=1)


#: A worker whose first process loses the device in its third step, and whose later ones do not.
LOSES_THE_DEVICE = """
from pathlib import Path
import torch
from helexa_engine.runtime import worker
from helexa_engine.runtime.model_runner import ModelRunner
mark, forward = Path({mark!r}), ModelRunner.forward
calls = 0
def failing(self, chunks):
    global calls
    calls += 1
    if calls == 3 and not mark.exists():
        mark.touch()
        error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        error.error_code = 700
        raise error
    return forward(self, chunks)
ModelRunner.forward = failing
worker.main()
"""


def test_a_lost_device_ends_the_process_with_its_reason_and_the_model_comes_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    popen, program = subprocess.Popen, LOSES_THE_DEVICE.format(mark=str(tmp_path / "lost"))

    def patched(command: list[str], **options: Any) -> Any:
        at = command.index("helexa_engine.runtime.worker")  # behind -P -m
        return popen([sys.executable, "-c", program, *command[at + 1 :]], **options)

    monkeypatch.setattr(worker_process.subprocess, "Popen", patched)
    with served(folder) as live, live.http(timeout=60.0) as http:
        ready_pid = live_worker(live)
        response = http.post(COMPLETIONS, json=SHORT)
        assert response.status_code == 500
        assert (
            response.json()["error"]["code"] == "engine_died"
            and "device was lost" in response.json()["error"]["message"]
        )
        assert len(ask(live)) > 0
        wait_until(lambda: live.model.life.recoveries == 1)
        assert live_worker(live) != ready_pid
        error = live.model.life.error
        assert error is not None and error.facts == {"reason": "device_lost", "cuda_error": 700}
        assert "device was lost" in health(live)["last_error"]
    assert "device was lost" in caplog.text


def live_worker(live: Live) -> Any:
    """The process of a model that is ready, whatever its command is."""
    wait_until(lambda: live.model.engine is not None, 60)
    return live.model.engine._worker.pid  # type: ignore[union-attr]


def test_a_client_that_leaves_ends_its_request_in_the_worker(folder: Path) -> None:
    with served(folder) as live:
        ready(live)
        with httpx.stream("POST", f"{live.url}{COMPLETIONS}", json={**LONG, "stream": True}, timeout=60) as response:
            next(response.iter_lines())
        wait_until(lambda: stats(live).num_running == 0 and stats(live).kv_pages_used == 0)
        steps = stats(live).steps_total
        assert steps < 20000
        assert ask(live)
        assert stats(live).steps_total <= steps + 1 + 8


def test_a_server_that_stops_while_it_loads_leaves_nothing(folder: Path) -> None:
    with served(folder) as live:
        wait_until(lambda: len(workers_of()) == 1)
        assert live.model.life.status == "loading"


PROGRAM = """
    import sys
    from helexa_server import app
    from helexa_server.config import ServerConfig
    from tests.server.lifecycle.catalogues import catalogue_of

    catalogue = catalogue_of(tables={sys.argv[2]: {"load": "at start", "max_model_len": 2048}})
    code = app.serve(catalogue, ServerConfig(port=int(sys.argv[1])))
    print("exit", code, [name for name in ("torch", "llguidance", "helexa_engine._native") if name in sys.modules])
"""


@contextlib.contextmanager
def process(model: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own that has answered, and its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(port), model],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        wait_until(lambda: answers(f"{url}/ready", 200), seconds=60)
        yield server, url
    finally:
        server.kill()
        server.communicate()


def test_the_server_never_loads_torch_and_ends_in_good_order() -> None:
    """Not even after it has answered with a grammar. Interrupts from a terminal reach the worker too, and are the server's affair."""
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "response_format": {"type": "json_object"},
    }
    with process("demo") as (server, url):
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        (worker,) = workers_of(server.pid)
        assert int(Path(f"/proc/{worker}/oom_score_adj").read_text()) == 500, "what the kernel takes first"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker, number)
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=30)[0] == "exit 0 []\n"
        assert not is_alive(worker)


def test_a_server_that_is_killed_leaves_no_worker(folder: Path) -> None:
    """In the middle of a step as in rest."""
    with process(str(folder)) as (server, url):
        (worker,) = workers_of(server.pid)
        body = {**LONG, "max_tokens": 2000, "stream": True}
        with httpx.stream("POST", f"{url}{COMPLETIONS}", json=body, timeout=60) as response:
            next(response.iter_lines())
            server.kill()
            server.wait()
            wait_until(lambda: not is_alive(worker))
