"""Installs the clients, runs them, writes ``docs/compatibility.md``: ``scripts/test_agents``. Fails when a client does."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path

import httpx

from helexa_engine.version import __version__

from . import install
from .table import PASS, Row, not_run, render

TABLE = install.ROOT / "docs" / "compatibility.md"
CLIENT_SECONDS = 300

# -- The official clients, through the tests of the server

SUITES = {
    "openai": ("server/test_chat.py", "server/test_completions.py", "server/test_responses.py"),
    "anthropic": ("server/test_messages.py",),
}
DEMO = "end_to_end/test_demo_over_http.py"
#: The wire formats that the demo's tests of them ask through each client.
DEMO_WIRES = {"openai": ("responses",), "anthropic": ("messages",)}
#: Words in a test's name that say which features it is about, besides the wire format of its file.
WORDS = {
    "stream": ("stream",),
    "tools": ("tool", "call"),
    "parse": ("parse", "structured", "json"),
    "errors": ("error", "unknown", "bad_", "refused", "leaves", "stops_reading"),
}


def official_clients(folder: str | None) -> list[Row]:
    """The server's tests under this environment's clients, or under those of ``folder``; a row a client."""
    if folder is not None and (why := install.python_packages(folder)) is not None:
        return [
            not_run(f"{client} (older major)", "scripted, demo", (*WORDS, *wires(client)), why) for client in SUITES
        ]
    files = [f"tests/{file}" for suite in SUITES.values() for file in suite] + [f"tests/{DEMO}"]
    cases = tested(["-k", "not claimed_skills", *files], python_environment(folder))
    rows = []
    for client in SUITES:
        version = installed_version(client) if folder is None else install.python_version(folder, client)
        rows.append(Row(client, version, "scripted, demo", outcomes_of(cases, client)))
    return rows


def tested(arguments: Sequence[str], environment: Mapping[str, str]) -> list[ElementTree.Element]:
    """The test cases in the report of ``pytest ARGUMENTS``."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        subprocess.run(command, cwd=install.ROOT, env=environment, check=False)  # the report says which tests failed
        return list(ElementTree.parse(report).iter("testcase"))


def is_wrong(case: ElementTree.Element) -> bool:
    """Whether a test did anything but pass."""
    return any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))


def wires(client: str) -> list[str]:
    return [Path(file).stem.removeprefix("test_") for file in SUITES[client]]


#: The name of each client's fixture in the demo's tests; elsewhere it is made by a method with the client's own name.
FIXTURES = {"openai": "client", "anthropic": "claude"}


@cache
def tests_that_use(client: str, file: str) -> frozenset[str]:
    """The tests in ``file`` that ask through ``client``; others of them speak HTTP themselves."""
    tree = ast.parse((install.ROOT / "tests" / file).read_text(encoding="utf-8"))
    return frozenset(
        test.name
        for test in tree.body
        if isinstance(test, ast.FunctionDef)
        and (
            any(isinstance(node, ast.Attribute) and node.attr == client for node in ast.walk(test))
            or (file == DEMO and any(argument.arg == FIXTURES[client] for argument in test.args.args))
        )
    )


def outcomes_of(cases: Sequence[ElementTree.Element], client: str) -> dict[str, str]:
    """Feature to its outcome in the tests that ask through ``client``."""
    passed: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for case in cases:
        folder, _, module = case.get("classname", "").removeprefix("tests.").partition(".")
        file, name = f"{folder}/{module}.py", case.get("name", "").partition("[")[0]
        if (file not in SUITES[client] and file != DEMO) or name not in tests_that_use(client, file):
            continue
        features = [feature for feature, words in WORDS.items() if any(word in name for word in words)]
        if file == DEMO:
            features += [*DEMO_WIRES[client]] if "_wire" in name else []
        else:
            features.append(module.removeprefix("test_"))
        for feature in features:
            passed[feature] += not is_wrong(case)
            if is_wrong(case):
                failed.setdefault(feature, f"FAIL: {name}")
    return {feature: failed.get(feature, f"{PASS} ({passed[feature]})") for feature in passed}


def python_environment(folder: str | None) -> dict[str, str]:
    ahead = [] if folder is None else [str(install.FOLDER / "python" / folder)]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PYTHONPATH": os.pathsep.join([*ahead, str(install.ROOT)])}


# -- Other client libraries, on the demo


@contextlib.contextmanager
def demo_server() -> Iterator[str]:
    """URL of ``helexa serve demo`` that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "helexa_engine", "serve", "demo", "--port", url.rpartition(":")[2]]
    process = subprocess.Popen(command, env=python_environment(None))
    try:
        deadline = time.monotonic() + 120
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("helexa serve demo did not get ready")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def printed_outcomes(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What a program printed on its last line: feature to outcome."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=CLIENT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"chat": f"FAIL: it took longer than {CLIENT_SECONDS} s"}
    if done.returncode != 0:
        return {"chat": f"FAIL: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1][:300]}"}
    outcomes: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return outcomes


def python_client(name: str, url: str) -> Row:
    if (why := install.python_packages("libraries")) is not None:
        return not_run(name, "demo", ("chat", "stream", "tools", "parse"), why)
    command = [sys.executable, "-m", "tests.agents.python_clients", name, url]
    outcomes = printed_outcomes(command, python_environment("libraries"), install.ROOT)
    return Row(name, install.python_version("libraries", name), "demo", outcomes)


def ai_sdk(url: str) -> list[Row]:
    """The AI SDK over three wire formats, each with its own provider package."""
    providers = {"chat": "@ai-sdk/openai-compatible", "responses": "@ai-sdk/openai", "messages": "@ai-sdk/anthropic"}
    why = install.npm_packages(*install.AI_SDK)
    if why is not None:
        return [
            not_run(f"AI SDK, {provider}", "demo", (wire, "stream", "tools", "parse", "errors"), why)
            for wire, provider in providers.items()
        ]
    script = shutil.copy(Path(__file__).with_name("ai_sdk.mjs"), install.FOLDER)  # node looks for packages beside it
    rows = []
    for wire, provider in providers.items():
        outcomes = printed_outcomes(["node", script, wire, url], os.environ, install.FOLDER)
        version = f"ai {install.npm_version('ai')}, {install.npm_version(provider)}"
        rows.append(Row(f"AI SDK, {provider}", version, "demo", outcomes))
    return rows


# -- Agents

ROUND_TRIP = "tests/agents/test_tool_round_trip.py"


@dataclass(frozen=True)
class Agent:
    """An agent from npm: its name in ``helexa launch`` and in the tests, and the wire format that it speaks."""

    name: str
    package: str
    program: str
    wire: str

    @property
    def features(self) -> tuple[str, ...]:
        return (self.wire, "tool round trip")


AGENTS = (
    Agent("opencode", "opencode-ai", "opencode", "chat"),
    Agent("Claude Code", "@anthropic-ai/claude-code", "claude", "messages"),
    Agent("Codex", "@openai/codex", "codex", "responses"),
    Agent("Qwen Code", "@qwen-code/qwen-code", "qwen", "chat"),
)


#: What an agent is run against, and the test that does it.
BACKENDS = {"scripted": "test_one_tool_round_trip", "demo": "test_one_tool_round_trip_on_the_demo"}


def agents() -> list[Row]:
    """Each agent's tool round trips; a row an agent and backend."""
    missing = {agent: install.npm_packages(agent.package) for agent in AGENTS}
    binaries = str(install.FOLDER / "node_modules" / ".bin")
    cases = tested([ROUND_TRIP], {**python_environment(None), "HELEXA_AGENTS": binaries})
    by_name = {case.get("name", ""): case for case in cases}
    rows = []
    for agent, why in missing.items():
        for backend, test in BACKENDS.items():
            case = by_name.get(f"{test}[{agent.program}]")
            if why is not None:
                rows.append(not_run(agent.name, backend, agent.features, why))
            elif case is None or case.find("skipped") is not None:
                rows.append(
                    not_run(agent.name, backend, agent.features, "it has no test, or its program does not start")
                )
            else:
                outcome = f"FAIL: {test}" if is_wrong(case) else PASS
                outcomes = dict.fromkeys(agent.features if outcome == PASS else agent.features[-1:], outcome)
                rows.append(Row(agent.name, install.npm_version(agent.package), backend, outcomes, note_of(case)))
    return rows


def note_of(case: ElementTree.Element) -> str:
    """What a test recorded besides its outcome."""
    recorded = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
    tokens = recorded.get("prompt_tokens")
    return "" if tokens is None else f"its first prompt, by the demo's tokenizer, has {int(tokens):,} tokens."


def main() -> int:
    rows = [*official_clients(None), *official_clients("older")]
    with demo_server() as url:
        rows += [python_client("litellm", url), python_client("instructor", url), *ai_sdk(url)]
    rows += agents()
    page = render(rows, __version__)
    TABLE.write_text(page, encoding="utf-8")
    print(page)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
