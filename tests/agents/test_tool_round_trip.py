"""The agents themselves, from npm, through ``helexa launch``: each reads a file by a tool call, and what stood in it comes back.

``scripts/test_agents`` installs them and runs this; elsewhere it is skipped. Once the engine is a script, which answers with what the
file said. Once it is the demo model, whose grammar forces the call; what it says to the result is its own, and makes no sense.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helexa_engine.config import EngineConfig
from helexa_engine.events import Event, PromptProcessed, ToolCallDelta, ToolCallStart
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.runtime.async_engine import AsyncEngine
from helexa_engine.testing.fake_engine import FakeEngine, FakeModelInfo
from tests.long_demo import demo_with_context
from tests.server.answer_scripts import PROMPT, finished, words
from tests.server.live import live_server

#: Where scripts/test_agents has put them.
AGENTS = Path(os.environ.get("HELEXA_AGENTS", "/nowhere"))

INFO = FakeModelInfo(max_model_len=131072, limit={"context": 131072, "input": 131071, "output": 131071})
SECRET = "marmalade-4711"

#: Each agent's arguments, and its tool for reading a file with that tool's arguments.
CASES: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "claude": (["-p"], "Read", {"file_path": "{file}"}),
    "opencode": (["run"], "read", {"filePath": "{file}"}),
    "qwen": (["-p"], "read_file", {"file_path": "{file}"}),
    "codex": (
        ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"],
        "exec_command",
        {"cmd": "cat {file}"},
    ),
}


def text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content)


def results_in(request: GenerateRequest) -> list[str]:
    """What tools have answered so far."""
    return [text_of(turn) for turn in request.messages or () if turn["role"] == "tool"]


def offers(request: GenerateRequest, tool: str) -> bool:
    """Agents also ask for titles and summaries, without tools."""
    return tool in {offered["function"]["name"] for offered in request.tools or ()}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder that the agent works in, with the file that it is asked about."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "note.txt").write_text(f"{SECRET}\n")
    return folder


@pytest.fixture
def ask(work: Path, tmp_path: Path) -> Callable[[str, Any], str]:
    """``ask(agent, engine)``: what the agent prints when it is asked what the file says, of a model of that engine."""

    def ask(name: str, engine: Any) -> str:
        home = tmp_path / "home"
        home.mkdir()
        with live_server(engine) as live:
            command = [sys.executable, "-m", "helexa_engine", "launch", name, "--port", live.url.rpartition(":")[2]]
            environment = {**os.environ, "HOME": str(home), "PATH": f"{AGENTS}{os.pathsep}{os.environ['PATH']}"}
            environment["PWD"] = str(work)  # opencode believes it before the folder it is in
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            done = subprocess.run(
                [*command, "--", *CASES[name][0], "What does note.txt say?"],
                cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
            )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return ask


def call_of(name: str, work: Path) -> tuple[str, dict[str, Any]]:
    """The agent's tool that reads the file, and its arguments. Skips the test where the agent is not installed."""
    if shutil.which(name, path=str(AGENTS)) is None:
        pytest.skip(f"needs {name}; scripts/test_agents installs it")
    _, tool, arguments = CASES[name]
    return tool, {key: value.replace("{file}", str(work / "note.txt")) for key, value in arguments.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_tool_round_trip(name: str, work: Path, ask: Callable[[str, Any], str]) -> None:
    tool, arguments = call_of(name, work)
    call = json.dumps(arguments)

    def script(request: GenerateRequest) -> Sequence[Event]:
        if results := results_in(request):
            found = SECRET if any(SECRET in result for result in results) else f"nothing in {results}"
            return [PROMPT, *words(f"The note says {found}"), finished()]
        if not offers(request, tool):
            return [PROMPT, *words("A title"), finished()]
        deltas = [ToolCallDelta(0, 0, piece, (i,)) for i, piece in enumerate((call[:7], call[7:]))]
        return [PROMPT, ToolCallStart(0, 0, "call_read", tool, (9,)), *deltas, finished(reason="tool_calls")]

    printed = ask(name, FakeEngine(script, INFO))
    assert f"The note says {SECRET}" in printed


# -- On the demo model

#: The agents' lists of tools are longer than what the demo was trained to read, so a copy of it declares more.
CONTEXT = 131072


@pytest.fixture
def long_demo(tmp_path: Path) -> Iterator[AsyncEngine]:
    file = demo_with_context(tmp_path / "demo.gguf", CONTEXT)
    engine = AsyncEngine(str(file), EngineConfig(max_model_len=CONTEXT, max_num_seqs=2))
    yield engine
    asyncio.run(engine.aclose())


class Forced:
    """An engine whose first answer to a request that offers ``tool`` is the call of it, forced by the grammar; nothing else calls."""

    def __init__(self, engine: AsyncEngine, tool: str, arguments: Mapping[str, Any]) -> None:
        self._engine, self._tool, self._arguments = engine, tool, arguments
        self.results: list[str] = []
        self.prompts: list[int] = []  # tokens of those that offered the tool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.results += results_in(request)
        agent, held = offers(request, self._tool), self._held(request)
        async with contextlib.aclosing(self._engine.generate(held)) as events:
            async for event in events:
                if agent and isinstance(event, PromptProcessed):
                    self.prompts.append(len(event.prompt_token_ids))
                yield event

    def _held(self, request: GenerateRequest) -> GenerateRequest:
        quiet = {**request.chat_template_kwargs, "enable_thinking": False}
        if results_in(request) or not offers(request, self._tool):
            # What it would call now, it would call at random, and the agents run it.
            words = replace(request.sampling_params, max_tokens=40, min_tokens=10)
            return replace(request, tool_choice="none", chat_template_kwargs=quiet, sampling_params=words)
        schema = {
            "type": "object",
            "properties": {key: {"const": value} for key, value in self._arguments.items()},
            "required": list(self._arguments),
        }
        tools = [
            {**tool, "function": {**tool["function"], "parameters": schema}}
            if tool["function"]["name"] == self._tool
            else tool
            for tool in request.tools or ()
        ]
        return replace(request, tools=tools, tool_choice={"name": self._tool}, chat_template_kwargs=quiet)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_tool_round_trip_on_the_demo(
    name: str,
    work: Path,
    ask: Callable[[str, Any], str],
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    """The agent's own prompt through template, prefill, grammar, wire and back; it runs the call and ends in good order."""
    tool, arguments = call_of(name, work)
    engine = Forced(request.getfixturevalue("long_demo"), tool, arguments)
    printed = ask(name, engine)
    assert any(SECRET in result for result in engine.results), printed
    assert printed.strip()
    record_property("prompt_tokens", engine.prompts[0])
