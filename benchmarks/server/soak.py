"""``scripts/soak``: clients that come and leave at random moments against ``helexa serve``; afterwards nothing may be left of them.

It asks over HTTP alone, and looks at processes and descriptors from outside; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from helexa_engine.cli import machine
from helexa_engine.cli.bench import append_row

RESULTS = Path(__file__).resolve().parent.parent / "results" / "soak.jsonl"

#: Greedy, so that there is one right answer whatever runs beside it.
QUESTION = {"messages": [{"role": "user", "content": "What is helexa?"}], "max_tokens": 60, "temperature": 0}

#: How long what was left may take to be gone.
PATIENCE_SECONDS = 30.0

#: Where a client leaves; one that stays reads its answer to the end.
LEAVES = ("before asking", "while asking", "after asking", "while reading", "stays", "stays")

#: Refusals that a full server owes.
REFUSED = (429, 503)


class SoakFailed(Exception):
    """Something was left, wrong or broken; the message says what."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="[demo]")
    parser.add_argument("--clients", type=int, default=500, help="clients at any moment [500]")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long they come and leave [120]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--output", type=Path, nargs="?", const=RESULTS, help="append the row [results/soak.jsonl]")
    arguments = parser.parse_args()
    try:
        row = soak(arguments.model, arguments.clients, arguments.seconds, arguments.seed)
    except SoakFailed as error:
        print(f"scripts/soak: failed: {error}", file=sys.stderr)
        return 1
    print(json.dumps(row))
    if arguments.output is not None:
        append_row(arguments.output, row)
    return 0


def soak(model: str, clients: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """The row. Raises :class:`SoakFailed`."""
    with serving(model) as server:
        expected = ask(server.url)
        before = server.holds()
        seen = asyncio.run(_come_and_leave(server, clients, seconds, seed, expected))
        ended = time.monotonic()
        left = _left(server, before)
        while left and time.monotonic() - ended < PATIENCE_SECONDS:
            time.sleep(0.1)
            left = _left(server, before)
        clear_seconds = time.monotonic() - ended
        problems = [f"after {PATIENCE_SECONDS:g} s {what}" for what in left]
        problems += [f"{count} times {what}" for what, count in sorted(seen.faults.items())]
        answer = ask(server.url)
        if answer != expected:
            problems.append(f"the answer was {expected!r} and is {answer!r}")
        if not seen.latencies:
            problems.append("no client got a whole answer")
        after = server.holds()
        processes = server.processes()
        status = server.stop()
        if status != 0:
            problems.append(f"the server ended with status {status}")
        problems += [f"process {pid} is left" for pid in sorted(processes) if Path(f"/proc/{pid}").exists()]
        problems += server.complaints()
        if problems:
            raise SoakFailed("; ".join(problems))
    latencies = sorted(seen.latencies)
    return {
        "benchmark": "soak",
        **machine.stamp(),
        "model": model,
        "clients": clients,
        "seconds": seconds,
        "requests": sum(seen.outcomes.values()),
        "outcomes": dict(sorted(seen.outcomes.items())),
        "right_answers": seen.right_answers,
        "answer_seconds": round(statistics.median(latencies), 3),
        "slowest_answer_seconds": round(latencies[-1], 3),
        "clear_seconds": round(clear_seconds, 2),
        "descriptors": [before.descriptors, after.descriptors],
        "processes": len(after.processes),
        "resident_bytes": [before.resident_bytes, after.resident_bytes],
    }


# -- The server and what it holds


@dataclass(frozen=True)
class Holds:
    """What a server holds, seen from outside: its tree of processes, their descriptors and memory."""

    processes: frozenset[int]
    descriptors: int
    resident_bytes: int


@dataclass
class ServerProcess:
    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def processes(self) -> frozenset[int]:
        """The server and everything below it."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        tree = {self.process.pid}
        while True:
            more = {pid for pid, parent in parents.items() if parent in tree} - tree
            if not more:
                return frozenset(tree)
            tree |= more

    def holds(self) -> Holds:
        processes = self.processes()
        descriptors = resident = 0
        for pid in processes:
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return Holds(processes, descriptors, resident)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def complaints(self) -> list[str]:
        """Tracebacks and errors in its log."""
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        found = re.findall(r"^(?:Traceback .*|\S+ \S+ (?:ERROR|CRITICAL) .*)$", text, re.MULTILINE)
        return [f"{len(found)} errors in its log, the first: {found[0]}"] if found else []


@contextmanager
def serving(model: str) -> Iterator[ServerProcess]:
    """``helexa serve`` in a process of its own, ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "helexa_engine", "serve", model, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
        server = ServerProcess(f"http://127.0.0.1:{port}", port, process, log)
        try:
            deadline = time.monotonic() + 120
            while _status(port, "/ready") != 200:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SoakFailed("the server never got ready")
                time.sleep(0.1)
            yield server
        finally:
            process.kill()
            process.wait()


def request_bytes(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    """A request after which the server closes the connection."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"\r\n" + content


def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own; status 0 where nobody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(request)
            with connection.makefile("rb") as answer:
                return parse(answer.read())
    except ConnectionError:
        return 0, b""


def parse(answer: bytes) -> tuple[int, bytes]:
    """Status and body of an answer; a chunked body is put together. Status 0 for what is none."""
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 3 or not words[1].isdigit():
        return 0, b""
    if b"transfer-encoding: chunked" in head.lower():
        whole = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            count = int(size or b"0", 16)
            whole, body = whole + body[:count], body[count + 2 :]
        body = whole
    return int(words[1]), body


def _status(port: int, path: str) -> int:
    return exchange(port, request_bytes(port, "GET", path))[0]


def ask(url: str) -> str:
    """The answer to :data:`QUESTION`."""
    port = int(url.rpartition(":")[2])
    status, body = exchange(port, request_bytes(port, "POST", "/v1/chat/completions", QUESTION))
    if status != 200:
        raise SoakFailed(f"a single request was answered with status {status}: {body[:200]!r}")
    return text_of(body)


def text_of(body: bytes) -> str:
    message = json.loads(body)["choices"][0]["message"]
    return str(message["content"])


def _left(server: ServerProcess, before: Holds) -> list[str]:
    """What is still held of requests that have ended; their connections among the descriptors."""
    _, body = exchange(server.port, request_bytes(server.port, "GET", "/metrics"))
    gauges = {
        match[1]: float(match[2]) for match in re.finditer(r"^([\w:]+)(?:\{.*\})? (\S+)$", body.decode(), re.MULTILINE)
    }
    left = []
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        if gauges.get(name) != 0:
            left.append(f"{name} is {gauges.get(name)}")
    now = server.holds()
    if now.descriptors > before.descriptors:
        left.append(f"{now.descriptors} descriptors are open, {before.descriptors} were")
    if now.processes != before.processes:
        left.append(f"the processes are {sorted(now.processes)}, they were {sorted(before.processes)}")
    return left


# -- The clients


@dataclass
class Seen:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    right_answers: int = 0


async def _come_and_leave(server: ServerProcess, clients: int, seconds: float, seed: int, expected: str) -> Seen:
    """``clients`` at any moment for ``seconds``; those that are there at the end leave."""
    seen = Seen()
    tasks = [
        asyncio.create_task(_client(server.port, random.Random(seed * 1000003 + i), expected, seen))
        for i in range(clients)
    ]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
    return seen


async def _client(port: int, chance: random.Random, expected: str, seen: Seen) -> None:
    """One client after the other on one place."""
    await asyncio.sleep(chance.uniform(0, 1))
    while True:
        leaves = chance.choice(LEAVES)
        try:
            await _visit(port, chance, leaves, expected, seen)
        except OSError as error:  # a reset where the client is still there is the server's fault
            seen.faults[f"{leaves}: {type(error).__name__}"] += 1
        await asyncio.sleep(chance.uniform(0, 0.2))


async def _visit(port: int, chance: random.Random, leaves: str, expected: str, seen: Seen) -> None:
    path, body = _request(chance)
    request = request_bytes(port, "POST", path, body)
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if leaves == "before asking":
            await asyncio.sleep(chance.uniform(0, 0.5))
        elif leaves == "while asking":
            writer.write(request[: chance.randrange(1, len(request))])
            await writer.drain()
            await asyncio.sleep(chance.uniform(0, 0.2))
        else:
            writer.write(request)
            await writer.drain()
            if leaves == "after asking":
                await asyncio.sleep(chance.uniform(0, 2))
            elif leaves == "while reading":
                await reader.read(1)
                await asyncio.sleep(chance.uniform(0, 0.5))
            else:
                leaves = _judge(await reader.read(-1), path, body, expected, time.monotonic() - started, seen)
        seen.outcomes[leaves] += 1
    finally:
        writer.transport.abort()  # no farewell: unread data makes it a reset


def _judge(answer: bytes, path: str, body: dict[str, Any], expected: str, seconds: float, seen: Seen) -> str:
    """What became of a client that stayed."""
    status, content = parse(answer)
    if status in REFUSED:
        return "refused"
    if status != 200:
        seen.faults[f"{path} answered with status {status}"] += 1
        return "failed"
    seen.latencies.append(seconds)
    if body.get("stream"):
        ends = b"message_stop" if path == "/v1/messages" else b"data: [DONE]"
        if ends not in content or b'"error"' in content:
            seen.faults[f"{path} ended its stream without {ends.decode()}"] += 1
    elif body == QUESTION:
        if text_of(content) == expected:
            seen.right_answers += 1
        else:
            seen.faults["the answer was another one"] += 1
    return "answered"


def _request(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A question with one right answer, or a random one: short or long, streamed or not, one answer or several."""
    kind = chance.randrange(5)
    if kind < 2:
        return "/v1/chat/completions", QUESTION
    words = " ".join(f"{chance.randrange(1000)}" for _ in range(chance.choice((3, 30, 300))))
    stream = chance.random() < 0.7
    if kind == 2:
        return "/v1/completions", {
            "prompt": words,
            "max_tokens": chance.randrange(1, 80),
            "stream": stream,
            "n": chance.randrange(1, 3),
        }
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": chance.randrange(1, 80),
        "stream": stream,
    }
    return ("/v1/chat/completions" if kind == 3 else "/v1/messages"), body


if __name__ == "__main__":
    sys.exit(main())
