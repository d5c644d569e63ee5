"""``helexa serve`` with the demo under two names: one loaded at start, one on request; by HTTP and by the commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.server.live import wait_until
from tests.server.test_serve import answers, free_port

from .worker_processes import workers_of

CONFIG = """
[engine]
max_model_len = 512
max_num_seqs = 2

[models.first]
model = "demo"
load = "at start"
aliases = ["gpt-4o"]

[models.second]
model = "demo"
max_model_len = 256
"""

SHORT = {"prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL of a server of its own process that is ready, and the process."""
    file, port = folder / "config.toml", free_port()
    file.write_text(CONFIG)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "helexa_engine", "serve", "--port", str(port), "--config", str(file)]
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is None and answers(f"{url}/ready", 200), seconds=120)
        yield url, process
    finally:
        process.kill()
        process.wait()


def helexa(url: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "helexa_engine", *arguments, "--url", url]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


def models(url: str) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in httpx.get(f"{url}/models").json()["models"]}


def complete(url: str, model: str) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/completions", json={**SHORT, "model": model}, timeout=120)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert isinstance(answer, dict)
    return answer


def test_two_names_one_loaded_on_request_over_http_and_by_command(tmp_path: Path) -> None:
    with served(tmp_path) as (url, process):
        assert {name: model["status"] for name, model in models(url).items()} == {
            "first": "ready",
            "second": "unloaded",
        }
        assert len(workers_of(process.pid)) == 1
        first = complete(url, "gpt-4o")
        assert first["model"] == "first"
        second = complete(url, "second")  # which loads it
        assert second["model"] == "second" and second["choices"][0]["text"] == first["choices"][0]["text"]
        both = models(url)
        assert [both[name]["max_model_len"] for name in ("first", "second")] == [512, 256]
        assert both["first"]["reserved_bytes"] > both["second"]["reserved_bytes"] > 0
        assert len(workers_of(process.pid)) == 2
        assert helexa(url, "unload", "second") == "second: unloaded\n"
        assert len(workers_of(process.pid)) == 1 and models(url)["second"]["reserved_bytes"] == 0
        assert json.loads(helexa(url, "load", "second", "--json"))["status"] == "ready"
        assert "second  ready" in helexa(url, "ps") and "ready  first, second" in helexa(url, "status")
        assert httpx.post(f"{url}/models/unload", json={"model": "first"}).json()["status"] == "unloaded"
        assert complete(url, "first")["choices"] == first["choices"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert workers_of(process.pid) == []
