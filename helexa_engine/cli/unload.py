"""``helexa unload NAME``: have the server that runs unload a model."""

from __future__ import annotations

import argparse
import json

from .options import UsageError
from .running_server import RunningServer, add_server_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="one of the models that the server has: `helexa ps`")
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        help="how long running requests may go on before they are ended [the server's shutdown_seconds]",
    )
    add_server_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.wait is not None and not arguments.wait >= 0:
        raise UsageError(f"--wait: expected at least 0, got {arguments.wait}")
    body = {"model": arguments.name, "wait_seconds": arguments.wait}
    answer = RunningServer.of(arguments).post("/models/unload", body)
    print(json.dumps(answer) if arguments.json else f"{answer['id']}: {answer['status']}")
    return 0
