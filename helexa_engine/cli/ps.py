"""``helexa ps``: the models of the server that runs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .running_server import RunningServer, add_server_flags, seconds, size, table

TITLES = ("MODEL", "STATUS", "MEMORY", "CONTEXT", "RUNNING", "WAITING", "IDLE", "NOTES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    answer = RunningServer.of(arguments).get("/models")
    if arguments.json:
        print(json.dumps(answer))
    else:
        print(table([TITLES, *map(row, answer["models"])]))
    return 0


def row(model: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    status, progress = model["status"], model["progress"]
    if progress is not None:
        status += f" ({progress['stage']}, {progress['fraction']:.0%})"
    notes = [f"also {', '.join(model['aliases'])}"] if model["aliases"] else []
    if model["pinned"]:
        notes.append("pinned")
    if model["error"] is not None and status != "ready":
        notes.append(model["error"])
    return (
        model["id"],
        status,
        size(model["reserved_bytes"]),
        str(model["max_model_len"] or "-"),
        str(model["requests_running"]),
        str(model["requests_waiting"]),
        seconds(model["idle_seconds"]),
        "; ".join(notes),
    )
