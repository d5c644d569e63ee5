"""``helexa load NAME``: have the server that runs load a model."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading

from .loading import Progress, progress
from .running_server import RunningServer, ServerAnswers, add_server_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="one of the models that the server has: `helexa ps`")
    pin = parser.add_mutually_exclusive_group()
    pin.add_argument(
        "--pin", action="store_true", default=None, help="never unload it to make room, nor for want of requests"
    )
    pin.add_argument("--unpin", action="store_false", dest="pin", help="let it go again")
    parser.add_argument("--no-wait", action="store_false", dest="wait", help="return once the load is under way")
    add_server_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    server = RunningServer.of(arguments)
    body = {"model": arguments.name, "pin": arguments.pin, "wait": arguments.wait}
    shown = arguments.wait and not arguments.json
    with progress(f"loading {arguments.name}") if shown else contextlib.nullcontext() as report:
        if report is not None and sys.stderr.isatty():
            threading.Thread(target=_follow, args=(server, arguments.name, report), daemon=True).start()
        answer = server.post("/models/load", body)
    if arguments.json:
        print(json.dumps(answer))
    elif not arguments.wait:
        print(f"{answer['id']}: {answer['status']}")
    return 0


def _follow(server: RunningServer, name: str, report: Progress) -> None:
    """Reports how far the load is, for as long as the process lasts. Where the events cannot be had the bar stands still."""
    with contextlib.suppress(ServerAnswers, OSError, ValueError):
        own = server.get("/models")["models"]
        ids = {alias: model["id"] for model in own for alias in (model["id"], *model["aliases"])}
        for kind, change in server.events("/models/events"):
            if kind == "model" and change["model"] == ids.get(name):
                report(change["stage"], change["fraction"])
