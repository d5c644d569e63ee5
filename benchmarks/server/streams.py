"""``python -m benchmarks.server.streams``: the demo model behind ``helexa serve``, asked over HTTP: time to a first event, tokens/s of one
and of several streams, and the seconds that a model whose process was killed takes to come back."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from helexa_engine.cli import machine
from helexa_engine.cli.bench import append_row

from .__main__ import RESULTS, cpu_seconds

BODY = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True, "stream": True}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.server.streams", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1000, help="length of each answer [1000]")
    parser.add_argument("--repetitions", type=int, default=5, help="runs, of which the median counts [5]")
    parser.add_argument("--recoveries", type=int, default=3, help="times that the model's process is killed [3]")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a row is appended here")
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "helexa_engine", "serve", "demo", "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(port)
        row = measure(port, server.pid, arguments.tokens, arguments.repetitions)
        if arguments.recoveries:
            seconds = [recovery_seconds(port, server.pid) for _ in range(arguments.recoveries)]
            row["recovery_seconds"] = round(statistics.median(seconds), 3)
        print(json.dumps({key: value for key, value in row.items() if key not in ("machine", "date")}))
        append_row(arguments.output, row)
    finally:
        server.terminate()
        server.wait()
    return 0


def measure(port: int, pid: int, tokens: int, repetitions: int) -> dict[str, Any]:
    stream(port, tokens)
    first = [stream(port, 2)[0] for _ in range(100)]
    row: dict[str, Any] = {
        "benchmark": "server_streams",
        **machine.stamp(),
        "tokens": tokens,
        "first_event_milliseconds": round(statistics.median(first) * 1e3, 3),
        "first_event_milliseconds_p99": round(sorted(first)[98] * 1e3, 3),
    }
    for count in (1, 8):
        rates, spent = [], cpu_seconds(pid)
        for _ in range(repetitions):
            started = time.perf_counter()
            threads = [threading.Thread(target=stream, args=(port, tokens)) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rates.append(count * tokens / (time.perf_counter() - started))
        spent = (cpu_seconds(pid) - spent) / (repetitions * count * tokens)
        row[f"tokens_per_second_{count}"] = round(statistics.median(rates), 1)
        row[f"server_cpu_milliseconds_per_token_{count}"] = round(spent * 1e3, 4)
    return row


def stream(port: int, tokens: int) -> tuple[float, int]:
    """(seconds to the first byte of the body, bytes of it)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({**BODY, "max_tokens": tokens})
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    size = len(response.read(1))
    first = time.perf_counter() - started
    size += len(response.read())
    connection.close()
    return first, size


def wait_until_ready(port: int) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.02)


def recovery_seconds(port: int, server: int) -> float:
    """From the kill to the answer of a request that was asked right then."""
    children = Path(f"/proc/{server}/task").glob("*/children")
    (worker,) = (int(pid) for path in children for pid in path.read_text(encoding="ascii").split())
    os.kill(worker, signal.SIGKILL)
    started = time.perf_counter()
    while True:
        try:
            stream(port, 2)
        except AssertionError:  # it had not been noticed yet
            continue
        return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
