"""``serve`` as a process: the port first, then the model; an orderly end; clear words when it cannot begin."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from helexa_server.app import CannotListen, listen, serve
from helexa_server.config import ServerConfig
from helexa_server.logs import JsonFormatter

from .lifecycle.catalogues import catalogue_of
from .live import wait_until

#: ``serve`` over an engine that loads for as long as a file is missing. Prints its exit code, or the error it ends with.
PROGRAM = """
    import asyncio, pathlib, sys
    from helexa_engine.errors import HelexaError, ModelNotFound
    from helexa_engine.runtime.memory_need import MemoryNeed
    from helexa_engine.testing.fake_engine import FakeEngine, scripted_answer
    from helexa_server import app
    from helexa_server.config import ServerConfig
    from tests.server.lifecycle.catalogues import catalogue_of

    port, loaded, models = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:] or ["demo"]

    class Source:
        def __init__(self, model, config, watchdog_seconds):
            self.model = model

        async def need(self):
            return MemoryNeed(1, 2**50)

        async def load(self, available_bytes, progress):
            progress("weights", 0.25)
            while not loaded.exists():
                await asyncio.sleep(0.02)
            if loaded.read_text() in ("broken", f"broken {self.model}"):
                raise ModelNotFound(self.model, "it was a bad day")
            return FakeEngine(scripted_answer("slow", pause=0.2))

    app.WorkerSource = Source
    try:
        print("exit", app.serve(catalogue_of(*models), ServerConfig(port=port, shutdown_seconds=5)))
    except HelexaError as error:
        print("error", error)
"""


def free_port() -> int:
    with listen("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(port: int, loaded: Path, *models: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(port), str(loaded), *models],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answers(url: str, status: int) -> bool:
    try:
        return httpx.get(url).status_code == status
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_from_binding_to_an_orderly_end(tmp_path: Path, number: signal.Signals) -> None:
    port, loaded = free_port(), tmp_path / "loaded"
    url = f"http://127.0.0.1:{port}"
    with serving(port, loaded) as process:
        wait_until(lambda: answers(f"{url}/health", 200), seconds=30)
        wait_until(lambda: "weights, 25%" in httpx.get(f"{url}/ready").text)
        (model,) = httpx.get(f"{url}/v1/models").json()["data"]
        assert model["progress"] == {"stage": "weights", "fraction": 0.25}
        loaded.write_text("yes")
        wait_until(lambda: answers(f"{url}/ready", 200))
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        text = ""
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if not text:
                    process.send_signal(number)  # the request that runs is answered to its end
                text += line
        assert text.endswith("[DONE]") and text.count('"content"') == len("slow")
        assert process.communicate(timeout=10)[0] == "exit 0\n"


def test_a_signal_ends_a_server_that_is_still_loading(tmp_path: Path) -> None:
    port = free_port()
    with serving(port, tmp_path / "never") as process:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health", 200), seconds=30)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10)[0] == "exit 0\n"


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    loaded.write_text("broken")
    with serving(free_port(), loaded) as process:
        assert process.communicate(timeout=30)[0] == "error model 'demo' not found: it was a bad day\n"


def test_of_several_models_those_that_can_be_loaded_are_served(tmp_path: Path) -> None:
    port, loaded = free_port(), tmp_path / "loaded"
    url = f"http://127.0.0.1:{port}"
    loaded.write_text("broken two")
    with serving(port, loaded, "one", "two", "three") as process:
        wait_until(lambda: answers(f"{url}/ready", 200), seconds=30)
        listed = httpx.get(f"{url}/models").json()["models"]
        assert [(model["id"], model["status"]) for model in listed] == [
            ("one", "ready"),
            ("two", "unloaded"),
            ("three", "ready"),
        ]
        assert "it was a bad day" in listed[1]["error"]
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10)[0] == "exit 0\n"
    loaded.write_text("broken")
    with serving(free_port(), loaded, "one", "two") as process:
        assert process.communicate(timeout=30)[0] == "error model 'one' not found: it was a bad day\n"


def test_json_log_lines() -> None:
    record = logging.LogRecord("helexa_server.x", logging.WARNING, __file__, 1, 'a "word" %d\n', (3,), None)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == ("warning", "helexa_server.x", 'a "word" 3\n')
    try:
        raise ValueError("why")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "ValueError: why" in json.loads(JsonFormatter().format(record))["error"]


def test_a_port_in_use_is_named_with_the_way_out() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=f"port {port} on 127.0.0.1 is in use.*--port") as caught:
            serve(catalogue_of("demo"), ServerConfig(port=port))
    assert caught.value.facts["port"] == port
    listen("127.0.0.1", port).close()


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(CannotListen, match="--host"):
        listen("192.0.2.1", 0)
    with pytest.raises(CannotListen, match="cannot resolve"):
        listen("no-such-host.invalid", 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_loopback() -> None:
    with listen("::1", 0) as listener:
        assert listener.family == socket.AF_INET6
