"""``helexa launch``: agents are stand-ins that write down how they were started."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helexa_engine.cli import launch, main
from helexa_engine.errors import UnsupportedCheckpoint
from helexa_engine.testing.fake_engine import FakeEngine, scripted_answer
from helexa_server.app import listen
from tests.server.live import Live, live_server
from tests.server.test_model_routes import fleet_server

AGENT = """\
    #!{python}
    import json, os, sys, urllib.request
    url = {url!r}
    answers = urllib.request.urlopen(url + "/health").status if url else None
    with open({note!r}, "w") as note:
        json.dump({{"arguments": sys.argv[1:], "environment": dict(os.environ), "answers": answers}}, note)
    sys.exit(7)
"""

SERVER = """
    import sys
    from helexa_engine.errors import HelexaError
    from helexa_engine.testing.fake_engine import FakeEngine, scripted_answer
    from helexa_server import app
    from helexa_server.config import ServerConfig

    from tests.server.lifecycle.catalogues import catalogue_of

    class Source:
        def __init__(self, model, config, watchdog_seconds):
            self.model = model

        async def load(self, available_bytes, progress):
            if self.model == "broken":
                raise HelexaError("it was a bad day")
            return FakeEngine(scripted_answer("hello"))

    app.WorkerSource = Source
    try:
        app.serve(catalogue_of(sys.argv[1]), ServerConfig(port=int(sys.argv[2])))
    except HelexaError as error:
        sys.exit(error.message)
"""


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HELEXA_API_KEY", "HELEXA_ADMIN_KEY", "HELEXA_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of another account")


@pytest.fixture
def live() -> Iterator[Live]:
    with live_server(FakeEngine(scripted_answer("hello"))) as server:
        yield server


class Agent:
    """A stand-in for ``name`` on PATH, alone there."""

    def __init__(self, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, url: str = "") -> None:
        self.note = folder / "note.json"
        program = folder / name
        program.write_text(textwrap.dedent(AGENT).format(python=sys.executable, note=str(self.note), url=url))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    def started_with(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.note.read_text())
        return found


def port(live: Live) -> str:
    return live.url.rpartition(":")[2]


def free_port() -> str:
    with listen("127.0.0.1", 0) as listener:
        return str(listener.getsockname()[1])


def test_claude_is_told_by_its_environment(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent(tmp_path, "claude", monkeypatch)
    assert main(["launch", "claude", "--port", port(live), "--", "-p", "say hello"]) == 7, "its own exit code"
    started = agent.started_with()
    environment = started["environment"]
    assert started["arguments"] == ["-p", "say hello"]
    assert environment["ANTHROPIC_BASE_URL"] == live.url
    assert environment["ANTHROPIC_AUTH_TOKEN"] == "none" and "ANTHROPIC_API_KEY" not in environment
    names = ("MODEL", "DEFAULT_OPUS_MODEL", "DEFAULT_SONNET_MODEL", "DEFAULT_HAIKU_MODEL")
    assert {environment[f"ANTHROPIC_{name}"] for name in names} == {"fake"}
    assert environment["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] == "4096"
    assert environment["PATH"] == str(tmp_path)


def test_opencode_is_given_its_configuration(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent(tmp_path, "opencode", monkeypatch)
    assert main(["launch", "opencode", "--port", port(live)]) == 7
    config = json.loads(agent.started_with()["environment"]["OPENCODE_CONFIG_CONTENT"])
    assert config["model"] == config["small_model"] == "helexa/fake"
    provider = config["provider"]["helexa"]
    assert provider["npm"] == "@ai-sdk/openai-compatible"
    assert provider["options"] == {"baseURL": f"{live.url}/v1", "apiKey": "none"}
    assert provider["models"]["fake"]["limit"] == {"context": 4096, "output": 4095}


def test_a_model_that_is_not_loaded_is_loaded_for_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent(tmp_path, "opencode", monkeypatch)
    with fleet_server() as (fleet, live):
        assert main(["launch", "opencode", "--port", port(live), "--model", "b"]) == 7
        assert fleet.status("b") == "ready"
        fleet.sources["a"].outcomes = [UnsupportedCheckpoint("it is broken", "a.gguf")]
        assert main(["launch", "opencode", "--port", port(live), "--model", "a"]) == 1
    config = json.loads(agent.started_with()["environment"]["OPENCODE_CONFIG_CONTENT"])
    assert config["model"] == "helexa/b"


def test_codex_is_told_by_arguments_before_the_users(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(tmp_path, "codex", monkeypatch)
    assert main(["launch", "codex", "--port", port(live), "--model", "fake", "--", "exec", "hi"]) == 7
    *ours, first, second = agent.started_with()["arguments"]
    assert (first, second) == ("exec", "hi") and set(ours[::2]) == {"-c"}
    config = tomllib.loads("\n".join(ours[1::2]))
    assert config["model"] == "fake" and config["model_provider"] == "helexa"
    provider = {"name": "helexa", "base_url": f"{live.url}/v1", "wire_api": "responses"}
    assert config["model_providers"]["helexa"] == provider and config["model_context_window"] == 4096


def test_qwen_is_told_as_openai_clients_are(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent(tmp_path, "qwen", monkeypatch)
    assert main(["launch", "qwen", "--port", port(live)]) == 7
    environment = agent.started_with()["environment"]
    told = {name: environment[f"OPENAI_{name}"] for name in ("BASE_URL", "API_KEY", "MODEL")}
    assert told == {"BASE_URL": f"{live.url}/v1", "API_KEY": "none", "MODEL": "fake"}


def test_a_key_goes_to_the_agent_and_never_into_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HELEXA_API_KEY", "sesame")
    with live_server(FakeEngine(scripted_answer("hello"))) as live:
        for name in launch.PROGRAMS:
            assert main(["launch", name, "--print", "--port", port(live)]) == 0
            printed = capsys.readouterr().out
            assert "sesame" not in printed and "HELEXA_API_KEY" in printed, name
        agent = Agent(tmp_path, "claude", monkeypatch)
        assert main(["launch", "claude", "--port", port(live)]) == 7
        assert agent.started_with()["environment"]["ANTHROPIC_AUTH_TOKEN"] == "sesame"
        monkeypatch.delenv("HELEXA_API_KEY")
        assert main(["launch", "claude", "--port", port(live)]) == 1
        assert "asks for an API key; set HELEXA_API_KEY" in capsys.readouterr().err


def test_settings_for_zed(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "zed", "--print", "--port", port(live)]) == 0
    comment, _, settings = capsys.readouterr().out.partition("\n")
    assert comment.startswith("// ") and "settings.json" in comment
    provider = json.loads(settings)["language_models"]["openai_compatible"]["helexa"]
    assert provider["api_url"] == f"{live.url}/v1"
    (model,) = provider["available_models"]
    assert model["name"] == "fake" and model["max_tokens"] == 4096 and model["capabilities"]["tools"] is True


def test_printed_lines_are_for_a_shell(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "claude", "--print", "--port", port(live)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"export ANTHROPIC_BASE_URL={live.url}" in lines and "unset ANTHROPIC_API_KEY" in lines
    assert lines[-1] == "claude"
    assert main(["launch", "continue", "--print", "--port", port(live)]) == 0
    assert f'apiBase: "{live.url}/v1"' in capsys.readouterr().out


def test_without_a_server_one_is_started_and_ended_with_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = free_port()
    url = f"http://127.0.0.1:{number}"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))

    def command(model: str, server: Any, config: Path | None) -> list[str]:
        return [sys.executable, "-c", textwrap.dedent(SERVER), model, str(server.port)]

    monkeypatch.setattr(launch, "serve_command", command)
    agent = Agent(tmp_path, "claude", monkeypatch, url=url)
    assert main(["launch", "claude", "--port", number, "--model", "some/where/model.gguf"]) == 7
    started = agent.started_with()
    assert started["answers"] == 200 and started["environment"]["ANTHROPIC_MODEL"] == "model"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    assert f"starting a server for some/where/model.gguf on {url}" in capsys.readouterr().err
    agent.note.unlink()
    assert main(["launch", "claude", "--port", number, "--model", "broken"]) == 1
    assert "the server ended with 1: it was a bad day" in capsys.readouterr().err
    assert not agent.note.exists()


def test_the_server_that_is_started_is_ours() -> None:
    from helexa_server.config import ServerConfig

    command = launch.serve_command("demo", ServerConfig(port=81), Path("some.toml"))
    assert command[1:] == "-m helexa_engine serve demo --host 127.0.0.1 --port 81 --config some.toml".split()


def test_what_cannot_be_launched_says_why(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: str) -> str:
        assert main(["launch", *arguments]) in (1, 2)
        return capsys.readouterr().err

    monkeypatch.setenv("PATH", str(tmp_path))
    words = fails("claude", "--port", free_port())
    assert "claude is not installed" in words and "npm install -g @anthropic-ai/claude-code" in words
    assert "starting a server" not in words
    assert "helexa launch zed --print" in fails("zed", "--port", port(live))
    assert "helexa serve MODEL" in fails("zed", "--print", "--port", free_port())
    assert "has no model 'other'; it has fake" in fails("zed", "--print", "--port", port(live), "--model", "other")
    assert "port: expected" in fails("claude", "--port", "0")
