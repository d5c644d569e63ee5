"""``python -m benchmarks.server``: what a streamed chunk and a first event cost; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from helexa_engine.cli import machine
from helexa_engine.cli.bench import append_row

from . import scripted

RESULTS = Path(__file__).resolve().parent.parent / "results" / "server.jsonl"
QUESTION = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4096}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": QUESTION,
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": QUESTION,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.server", description=__doc__)
    parser.add_argument("--chunks", type=int, default=4000, help="chunks of the stream whose CPU time is taken [4000]")
    parser.add_argument("--requests", type=int, default=200, help="requests whose first event is waited for [200]")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="rows are appended here [benchmarks/results/server.jsonl]"
    )
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=scripted.serve, args=(theirs,), daemon=True)
    server.start()
    try:
        port = ours.recv()
        for path, body in BODIES.items():
            row = measure(path, body, port, server.pid or 0, arguments.chunks, arguments.requests)
            print(
                f"{path:<22} {row['chunk_cpu_milliseconds']:.4f} ms of CPU a chunk, "
                f"{row['first_event_milliseconds']:.3f} ms to the first event",
                flush=True,
            )
            append_row(arguments.output, row)
    finally:
        server.terminate()
        server.join()
    return 0


def measure(path: str, body: dict[str, Any], port: int, pid: int, chunks: int, requests: int) -> dict[str, Any]:
    """A row: CPU time of the server's process a chunk of one long stream, and the median time to a first event."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def stream(count: int) -> tuple[float, int]:
        """(seconds to the first byte of the body, bytes of it)"""
        asked = json.dumps({**body, "stream": True, "seed": count})
        started = time.perf_counter()
        connection.request("POST", path, asked, {"content-type": "application/json"})
        response = connection.getresponse()
        size = len(response.read(1))
        first = time.perf_counter() - started
        return first, size + len(response.read())

    for _ in range(20):
        stream(2)
    first = [stream(1)[0] for _ in range(requests)]
    before = cpu_seconds(pid)
    _, size = stream(chunks)
    spent = cpu_seconds(pid) - before
    connection.close()
    return {
        "benchmark": "server",
        "path": path,
        **machine.stamp(),
        "chunks": chunks,
        "chunk_cpu_milliseconds": round(spent / chunks * 1e3, 4),
        "chunk_bytes": round(size / chunks, 1),
        "requests": requests,
        "first_event_milliseconds": round(statistics.median(first) * 1e3, 4),
        "first_event_milliseconds_p99": round(sorted(first)[int(len(first) * 0.99)] * 1e3, 4),
    }


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
