"""The agents themselves, from npm, through ``helexa launch``: each reads a file by a tool call and answers with what stood in it.

``scripts/test_agents`` installs them and runs this; elsewhere it is skipped. The engine is a script, so that a call is certain to come.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from helexa_engine.events import Event, ToolCallDelta, ToolCallStart
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.testing.fake_engine import FakeEngine, FakeModelInfo
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


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_tool_round_trip(name: str, tmp_path: Path) -> None:
    if shutil.which(name, path=str(AGENTS)) is None:
        pytest.skip(f"needs {name}; scripts/test_agents installs it")
    words_of_agent, tool, arguments = CASES[name]
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    file = work / "note.txt"
    file.write_text(f"{SECRET}\n")
    call = json.dumps(arguments).replace("{file}", str(file))

    def script(request: GenerateRequest) -> Sequence[Event]:
        results = [text_of(turn) for turn in request.messages or () if turn["role"] == "tool"]
        if results:
            found = SECRET if any(SECRET in result for result in results) else f"nothing in {results}"
            return [PROMPT, *words(f"The note says {found}"), finished()]
        if tool not in {offered["function"]["name"] for offered in request.tools or ()}:
            return [PROMPT, *words("A title"), finished()]
        pieces = [call[:7], call[7:]]
        deltas = [ToolCallDelta(0, 0, piece, (i,)) for i, piece in enumerate(pieces)]
        return [PROMPT, ToolCallStart(0, 0, "call_read", tool, (9,)), *deltas, finished(reason="tool_calls")]

    engine = FakeEngine(script, INFO)
    with live_server(engine) as live:
        command = [sys.executable, "-m", "helexa_engine", "launch", name, "--port", live.url.rpartition(":")[2], "--"]
        environment = {**os.environ, "HOME": str(home), "PATH": f"{AGENTS}{os.pathsep}{os.environ['PATH']}"}
        environment["PWD"] = str(work)  # opencode believes it before the folder it is in
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [*command, *words_of_agent, "What does note.txt say?"],
            cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"The note says {SECRET}" in done.stdout, done.stdout + done.stderr
