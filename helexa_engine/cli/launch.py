"""``helexa launch NAME``: run an agent on a model of this machine, or print what a program needs to be told to use it.

A server that runs is used; where none listens one is started, and ended with the agent. Nothing is written into the agents' own
files: they are told by environment variables and arguments, which their public documentation names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from helexa_server.config import ServerConfig

from .. import env
from ..config import add_flags
from ..errors import HelexaError
from .options import UsageError, add_config_flag, resolve_config
from .running_server import RunningServer, ServerAnswers, url_of

#: Clients insist on a key, also where the server takes any.
NO_KEY = "none"


class CannotLaunch(HelexaError):
    """The agent is not installed, or there is no server that it could use."""

    code = "cannot_launch"


@dataclass(frozen=True, slots=True)
class Target:
    """The model that a program is to use.

    Attributes:
        url: of the server, without a path.
        model: its id there.
        limit: ``{context, input, output}`` in tokens.
        tools: whether the model calls tools.
        api_key: what to send, or None where the server asks for none.
    """

    url: str
    model: str
    limit: Mapping[str, int]
    tools: bool
    api_key: str | None

    @property
    def key(self) -> str:
        return self.api_key or NO_KEY


@dataclass(frozen=True, slots=True)
class Program:
    """How a program is told of a model.

    Attributes:
        executable: its name on PATH; None for one that is not started from here.
        install: how to get it.
        environment: variables to set; an empty one is one to unset.
        arguments: come before the user's own.
        settings: what to put where, for programs that read neither.
    """

    executable: str | None = None
    install: str = ""
    environment: Callable[[Target], dict[str, str]] = field(default=lambda target: {})
    arguments: Callable[[Target], list[str]] = field(default=lambda target: [])
    settings: Callable[[Target], str] | None = None


def _claude_environment(target: Target) -> dict[str, str]:
    """code.claude.com/docs/en/env-vars and /llm-gateway."""
    tiers = ("OPUS", "SONNET", "HAIKU")
    return {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        "ANTHROPIC_API_KEY": "",
        "ANTHROPIC_MODEL": target.model,
        **{f"ANTHROPIC_DEFAULT_{tier}_MODEL": target.model for tier in tiers},
        "CLAUDE_CODE_SUBAGENT_MODEL": target.model,
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(target.limit["context"]),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def _opencode_environment(target: Target) -> dict[str, str]:
    """opencode.ai/docs/config and /providers: this variable comes before every file."""
    model = {
        "name": target.model,
        "tool_call": target.tools,
        "limit": {"context": target.limit["context"], "output": target.limit["output"]},
    }
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "helexa",
        "options": {
            "baseURL": f"{target.url}/v1",
            "apiKey": "{env:HELEXA_API_KEY}" if target.api_key else NO_KEY,
        },
        "models": {target.model: model},
    }
    name = f"helexa/{target.model}"
    config = {"model": name, "small_model": name, "provider": {"helexa": provider}}
    return {"OPENCODE_CONFIG_CONTENT": json.dumps(config)}


def _codex_arguments(target: Target) -> list[str]:
    """developers.openai.com/codex/config-reference: ``-c`` takes a key of config.toml and a TOML value."""
    provider = "model_providers.helexa"
    settings: dict[str, Any] = {
        "model": target.model,
        "model_provider": "helexa",
        "model_context_window": target.limit["context"],
        f"{provider}.name": "helexa",
        f"{provider}.base_url": f"{target.url}/v1",
        f"{provider}.wire_api": "responses",
    }
    if target.api_key:
        settings[f"{provider}.env_key"] = "HELEXA_API_KEY"
    return [word for key, value in settings.items() for word in ("-c", f"{key}={json.dumps(value)}")]


def _zed_settings(target: Target) -> str:
    """zed.dev/docs/ai/llm-providers: OpenAI API compatible. Zed makes the variable's name of the provider's."""
    model = {
        "name": target.model,
        "display_name": f"{target.model} (helexa)",
        "max_tokens": target.limit["context"],
        "max_output_tokens": target.limit["output"],
        "capabilities": {
            "tools": target.tools,
            "images": False,
            "parallel_tool_calls": target.tools,
            "prompt_cache_key": False,
        },
    }
    provider = {"api_url": f"{target.url}/v1", "available_models": [model]}
    settings = {"language_models": {"openai_compatible": {"helexa": provider}}}
    return f"// ~/.config/zed/settings.json; start Zed with HELEXA_API_KEY set ({_key_words(target)})\n" + json.dumps(
        settings, indent=2
    )


def _continue_settings(target: Target) -> str:
    """docs.continue.dev/reference: config.yaml."""
    quoted = json.dumps
    return "\n".join(
        (
            f"# ~/.continue/config.yaml; the key: {_key_words(target)}",
            "name: helexa",
            "version: 0.0.1",
            "schema: v1",
            "models:",
            f"  - name: {quoted(target.model)}",
            "    provider: openai",
            f"    model: {quoted(target.model)}",
            f"    apiBase: {quoted(target.url + '/v1')}",
            f"    apiKey: {NO_KEY if target.api_key is None else '${{ secrets.HELEXA_API_KEY }}'}",
            "    roles: [chat, edit, apply]",
            f"    capabilities: [{'tool_use' if target.tools else ''}]",
            "    defaultCompletionOptions:",
            f"      contextLength: {target.limit['context']}",
        )
    )


def _key_words(target: Target) -> str:
    return "the server takes any" if target.api_key is None else "the server asks for its own"


def _openai_environment(target: Target) -> dict[str, str]:
    """The variables that OpenAI's own client libraries read, and Qwen Code with them."""
    return {"OPENAI_BASE_URL": f"{target.url}/v1", "OPENAI_API_KEY": target.key, "OPENAI_MODEL": target.model}


PROGRAMS = {
    "claude": Program("claude", "npm install -g @anthropic-ai/claude-code", _claude_environment),
    "opencode": Program("opencode", "npm install -g opencode-ai", _opencode_environment),
    "codex": Program("codex", "npm install -g @openai/codex", arguments=_codex_arguments),
    "qwen": Program("qwen", "npm install -g @qwen-code/qwen-code", _openai_environment),
    "zed": Program(settings=_zed_settings),
    "continue": Program(settings=_continue_settings),
    "openai": Program(environment=_openai_environment),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        choices=PROGRAMS,
        help=f"what to run or, with --print, to configure: {', '.join(PROGRAMS)}",
    )
    parser.usage = "helexa launch [options] NAME [-- ARGUMENT ...]"
    parser.epilog = "What follows -- goes to the agent, for example: helexa launch claude -- -p 'explain this folder'"
    parser.add_argument("--print", action="store_true", dest="print_settings", help="print the settings; run nothing")
    parser.add_argument(
        "--model", help="one that the server has; where none runs, the one to serve [the first one, or demo]"
    )
    add_config_flag(parser)
    add_flags(parser, ServerConfig, only=("host", "port"))


def run(arguments: argparse.Namespace) -> int:
    program = PROGRAMS[arguments.name]
    server = resolve_config(arguments, "server", ServerConfig)
    if server.port == 0:
        raise UsageError("port: expected the port of a server, got 0")
    url = url_of(server)
    if arguments.print_settings:
        print(_settings(program, _target(url, arguments.model)))
        return 0
    if program.executable is None:
        raise UsageError(f"{arguments.name} is not started from here; `helexa launch {arguments.name} --print`")
    executable = shutil.which(program.executable)
    if executable is None:
        raise CannotLaunch(
            f"{arguments.name} is not installed: there is no {program.executable!r} on PATH; install it with: {program.install}"
        )
    with _server(url, server, arguments):
        target = _target(url, arguments.model)
        command = [executable, *program.arguments(target), *arguments.handed_on]
        return _run_agent(command, _merged(program.environment(target)))


def _settings(program: Program, target: Target) -> str:
    """For a shell: variables to export and the command; or the program's own settings. Keys stay out of it."""
    if program.settings is not None:
        return program.settings(target)
    lines = []
    for name, value in program.environment(target).items():
        shown = '"$HELEXA_API_KEY"' if target.api_key and value == target.api_key else shlex.quote(value)
        lines.append(f"export {name}={shown}" if value else f"unset {name}")
    if program.executable is not None:
        lines.append(shlex.join([program.executable, *program.arguments(target)]))
    return "\n".join(lines)


def _merged(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with ``changes``, for one that is started."""
    return {name: value for name, value in {**env.inherited(), **changes}.items() if value or name not in changes}


def _run_agent(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Its exit code. Ctrl-C is the agent's to answer, and not the end of the server beneath it."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # Ignored signals are inherited: the agent starts as from a shell.
        agent = subprocess.Popen(command, env=environment, preexec_fn=_default_interrupt)
        code = agent.wait()
    finally:
        signal.signal(signal.SIGINT, handler)
    return code if code >= 0 else 128 - code


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# -- The server


def _get(url: str) -> Any:
    """The JSON at ``url``. Raises OSError where nothing listens, :class:`CannotLaunch` for what is no answer of ours."""
    key = env.api_key()
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10.0) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise CannotLaunch(f"{url} asks for an API key; set HELEXA_API_KEY") from None
        raise CannotLaunch(f"{url} answers with status {error.code}") from None
    except ValueError:
        raise CannotLaunch(f"{url} does not answer in JSON; is another program on that port? See --port") from None


def _is_ready(url: str) -> bool:
    """Whether the server that was started has loaded its model."""
    try:
        _get(f"{url}/ready")
    except (OSError, CannotLaunch):
        return False
    return True


def _is_running(url: str) -> bool:
    """Whether helexa serves there. Raises :class:`CannotLaunch` when something else does."""
    try:
        version = _get(f"{url}/version")
    except OSError:
        return False
    if not isinstance(version, dict) or version.get("name") != "helexa":
        raise CannotLaunch(f"what answers on {url} is not helexa; choose another port with --port")
    return True


def _target(url: str, model: str | None) -> Target:
    """The model on a server that runs, once it is loaded. Raises :class:`CannotLaunch`."""
    if not _is_running(url):
        raise CannotLaunch(f"no server answers on {url}; start one: helexa serve MODEL")
    while True:
        try:
            models = {entry["id"]: entry for entry in _get(f"{url}/v1/models")["data"]}
        except OSError:
            raise CannotLaunch(f"the server on {url} has gone while it was loading; its log says why") from None
        if model is not None and model not in models:
            raise CannotLaunch(f"the server on {url} has no model {model!r}; it has {', '.join(models)}")
        entry = models[model] if model is not None else next(iter(models.values()))
        if "limit" in entry:
            break
        if entry["status"] == "unloaded":
            _have_loaded(url, entry["id"])
        time.sleep(0.2)
    return Target(url, entry["id"], entry["limit"], entry["capabilities"].get("tools", False), env.api_key())


def _have_loaded(url: str, model: str) -> None:
    """Asks for a model that is not loaded, as any client may, which loads it. Raises :class:`CannotLaunch`: it cannot be loaded."""
    server = RunningServer(url, env.api_key())
    try:
        server.post("/tokenize", {"model": model, "prompt": ""})
    except ServerAnswers as error:
        if server.get(f"/v1/models/{model}")["status"] == "unloaded":  # else it goes on loading
            raise CannotLaunch(error.message) from None


@contextlib.contextmanager
def _server(url: str, server: ServerConfig, arguments: argparse.Namespace) -> Iterator[None]:
    """A server on ``url``: the one that runs, or one that lasts as long as this context. Raises :class:`CannotLaunch`."""
    if _is_running(url):
        yield
        return
    if arguments.model is not None:
        # The server is asked for the model by the name it gives it, which need not be what was typed.
        from helexa_server.lifecycle.catalogue import model_name

        spec, arguments.model = arguments.model, server.served_model_name or model_name(arguments.model)
    else:
        spec = "demo"
    log_path = env.cache_folder() / "logs" / f"serve-{server.port}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    print(f"starting a server for {spec} on {url}; its log: {log_path}", file=sys.stderr)
    with log_path.open("wb") as log, _ending_on_terminate():
        process = subprocess.Popen(
            serve_command(spec, server, arguments.config), stdout=log, stderr=log, start_new_session=True
        )
        try:
            while not _is_ready(url):
                if process.poll() is not None:
                    last = log_path.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                    raise CannotLaunch(f"the server ended with {process.returncode}: {last[0]}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            try:
                process.wait(server.shutdown_seconds + 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve_command(model: str, server: ServerConfig, config: Path | None) -> list[str]:
    place = ["--host", server.host, "--port", str(server.port)]
    file = [] if config is None else ["--config", str(config)]
    return [sys.executable, "-m", "helexa_engine", "serve", model, *place, *file]


@contextlib.contextmanager
def _ending_on_terminate() -> Iterator[None]:
    """SIGTERM unwinds this process, so that what it started ends too."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    handler = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
