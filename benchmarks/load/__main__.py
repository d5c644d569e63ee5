"""``python -m benchmarks.load``: several streams of chat at once, by AIPerf, and whether its counts agree with the server's.

See benchmarks/README.md. Leaves with status 1 where they do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helexa_engine import demo
from helexa_engine.cli import machine
from helexa_engine.cli.bench import append_row
from helexa_engine.text.tokenizer import Tokenizer
from helexa_engine.weights.gguf import GGUFFile

from .agreement import disagreements
from .install import ROOT, TOOL, VERSION, program

RESULTS = ROOT / "benchmarks" / "results" / "load.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.load", description=__doc__)
    parser.add_argument("--concurrency", type=int, default=8, help="streams at once [8]")
    parser.add_argument("--requests", type=int, default=128, help="requests in all [128]")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="mean length of a prompt's text [256]")
    parser.add_argument("--output-tokens", type=int, default=128, help="exact length of an answer [128]")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts [1]")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="a row is appended here [benchmarks/results/load.jsonl]"
    )
    arguments = parser.parse_args()
    tool = program()
    with serving_demo() as url, tempfile.TemporaryDirectory(prefix="helexa-load-") as folder:
        overhead = get(url, "/tokenize", {"messages": [{"role": "user", "content": ""}]})["count"]
        before = counters(url)
        records, totals = run(tool, url, Path(folder), arguments)
        counted = {name: value - before.get(name, 0) for name, value in counters(url).items()}
    problems = disagreements(
        records, counted, requests=arguments.requests, output_tokens=arguments.output_tokens, overhead=overhead
    )
    row = make_row(arguments, totals, counted, agrees=not problems)
    print(report(row))
    for problem in problems:
        print(f"{TOOL} and helexa disagree: {problem}", file=sys.stderr)
    append_row(arguments.output, row)
    return 1 if problems else 0


def run(
    tool: Path, url: str, folder: Path, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(figures of each request, figures of the run) as the tool wrote them."""
    write_tokenizer(folder / "tokenizer")
    command = [
        str(tool), "profile", "--model", "demo", "--url", url, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", str(folder / "tokenizer"),
        "--concurrency", str(arguments.concurrency), "--request-count", str(arguments.requests),
        "--isl", str(arguments.prompt_tokens), "--isl-stddev", str(arguments.prompt_tokens // 4),
        "--osl", str(arguments.output_tokens), "--osl-stddev", "0",
        "--extra-inputs", "ignore_eos:true", "--random-seed", str(arguments.seed),
        "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics", "--workers-max", "1",
        "--artifact-dir", str(folder / "results"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise SystemExit(f"{TOOL} ended with status {done.returncode}")
    lines = (folder / "results" / "profile_export.jsonl").read_text(encoding="utf-8").splitlines()
    totals = json.loads((folder / "results" / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    return [json.loads(line) for line in lines], totals


def write_tokenizer(folder: Path) -> None:
    """The demo's tokenizer as HuggingFace's files, so that the tool counts prompts by itself."""
    folder.mkdir()
    tokenizer = Tokenizer.from_gguf(GGUFFile(demo.path()).metadata)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@contextlib.contextmanager
def serving_demo() -> Iterator[str]:
    """URL of a ``helexa serve demo`` of this tree that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "helexa_engine", "serve", "demo", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"helexa serve demo did not get ready:\n{log.read()}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def is_ready(url: str) -> bool:
    try:
        return get(url, "/ready")["status"] == "ready"
    except (urllib.error.URLError, ConnectionError):
        return False


def get(url: str, path: str, body: Any = None) -> Any:
    return json.loads(fetch(url, path, body))


def fetch(url: str, path: str, body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=30) as response:
        return str(response.read().decode())


def counters(url: str) -> dict[str, int]:
    """The server's own totals: tokens of prompts and answers, and requests by how they ended."""
    found: dict[str, int] = {}
    pattern = re.compile(r"^(vllm:(?:prompt|generation)_tokens_total|vllm:request_success_total)\{(.*)\} (\S+)$")
    for line in fetch(url, "/metrics").splitlines():
        if match := pattern.match(line):
            reason = re.search(r'finished_reason="(\w+)"', match[2])
            found[match[1] + (f":{reason[1]}" if reason else "")] = int(float(match[3]))
    return found


def make_row(
    arguments: argparse.Namespace, totals: Mapping[str, Any], counted: Mapping[str, int], *, agrees: bool
) -> dict[str, Any]:
    def milliseconds(metric: str) -> dict[str, float]:
        return {key: round(totals[metric][key], 3) for key in ("avg", "p50", "p99")}

    return {
        "benchmark": "load",
        "tool": f"{TOOL} {VERSION}",
        "model": "demo",
        "wire": "/v1/chat/completions, streamed",
        **machine.stamp(),
        "concurrency": arguments.concurrency,
        "requests": arguments.requests,
        "output_tokens_each": arguments.output_tokens,
        "seconds": round(totals["benchmark_duration"]["avg"], 3),
        "tool_prompt_tokens": int(totals["total_usage_prompt_tokens"]["avg"]),
        "tool_completion_tokens": int(totals["total_usage_completion_tokens"]["avg"]),
        "server_prompt_tokens": counted["vllm:prompt_tokens_total"],
        "server_completion_tokens": counted["vllm:generation_tokens_total"],
        "counts_agree": agrees,
        "completion_tokens_per_second": round(
            totals["total_usage_completion_tokens"]["avg"] / totals["benchmark_duration"]["avg"], 1
        ),
        "requests_per_second": round(totals["request_throughput"]["avg"], 2),
        "first_token_milliseconds": milliseconds("time_to_first_token"),
        "inter_token_milliseconds": milliseconds("inter_token_latency"),
    }


def report(row: Mapping[str, Any]) -> str:
    """The row for people."""
    return (
        f"{row['tool']}: {row['requests']} requests, {row['concurrency']} at once, {row['seconds']} s: "
        f"{row['completion_tokens_per_second']} tokens/s, first token {row['first_token_milliseconds']['p50']} ms, "
        f"then {row['inter_token_milliseconds']['p50']} ms each\n"
        f"tokens of prompts: {row['tool_prompt_tokens']} by the tool, {row['server_prompt_tokens']} by the server; "
        f"of answers: {row['tool_completion_tokens']} and {row['server_completion_tokens']}"
    )


if __name__ == "__main__":
    sys.exit(main())
