"""``helexa status``: how the server that runs is doing."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .running_server import RunningServer, add_server_flags, seconds, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    server = RunningServer.of(arguments)
    answer = server.get("/models")
    print(json.dumps(answer) if arguments.json else report(server.url, answer))
    return 0


def report(url: str, answer: dict[str, Any]) -> str:
    """The server's figures, for people."""
    models, memory = answer["models"], answer["memory"]
    states: dict[str, list[str]] = {}
    for model in models:
        states.setdefault(model["status"], []).append(model["id"])

    def total(name: str) -> Any:
        return sum(model[name] for model in models)

    lines = [
        ("server", f"helexa {answer['version']} on {url}, up for {seconds(answer['uptime_seconds'])}"),
        *((status, ", ".join(names)) for status, names in states.items()),
        (
            "memory",
            f"{size(memory['reserved_bytes'])} reserved of {size(memory['total_bytes'])}; {size(memory['free_bytes'])} free",
        ),
        ("requests", f"{total('requests_running')} running, {total('requests_waiting')} waiting"),
        (
            "tokens",
            f"{total('prompt_tokens')} of prompts, {total('generation_tokens')} of answers; lately "
            f"{total('tokens_per_second'):.1f} of answers a second",
        ),
    ]
    return "\n".join(f"{title:>10}  {text}" for title, text in lines)
