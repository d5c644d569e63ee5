"""``helexa serve demo`` with a folder for its prefix cache: what one process computed the next one reuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

LONG = "".join(f"{i} and {i} make {2 * i}. " for i in range(90))


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """URL of a server of its own process that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "helexa_engine", "serve", "demo", "--port", str(port)]
    process = subprocess.Popen([*command, "--prefix-cache-folder", str(folder)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not is_ready(url):
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < deadline, "the server never got ready"
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def completion(url: str) -> tuple[str, Any]:
    """Text of a greedy answer to the long prompt, and the usage."""
    body = {"model": "demo", "prompt": LONG, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    return answer["choices"][0], answer["usage"]


def test_a_prompt_is_reused_after_an_orderly_restart_with_the_same_answer(tmp_path: Path) -> None:
    with served(tmp_path) as (url, process):
        cold, usage = completion(url)
        assert usage["prompt_tokens"] > 1000 and usage["prompt_tokens_details"]["cached_tokens"] == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    (file,) = tmp_path.glob("*.prefixes")
    assert file.stat().st_size > 0 and not list(tmp_path.glob("*.partial"))
    with served(tmp_path) as (url, process):
        again, usage = completion(url)
        assert again == cold
        assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 64
        metrics = httpx.get(f"{url}/metrics").text
        hits = next(line for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits_total"))
        assert float(hits.split()[-1]) == usage["prompt_tokens_details"]["cached_tokens"]
