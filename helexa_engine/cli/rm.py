"""``helexa rm org/name[:quant]``: deletes a model from the hub's cache and says how many bytes that freed."""

from __future__ import annotations

import argparse
import sys

from ..errors import InvalidRequest
from ..weights.hub import format_bytes
from .options import UsageError
from .pull import hub_id


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        metavar="ID",
        nargs="+",
        help="org/name:QUANT deletes that file, org/name everything of the repository",
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")


def run(arguments: argparse.Namespace) -> int:
    if "demo" in arguments.models:
        raise InvalidRequest("model", "demo ships with helexa and is no download; uninstalling helexa deletes it")
    wanted = [hub_id(text) for text in arguments.models]
    if not arguments.yes and not sys.stdin.isatty():
        raise UsageError("nobody can be asked here: give --yes to delete without asking")
    from ..weights import hub_cache

    for one in wanted:
        removal = hub_cache.plan_removal(one)
        size = format_bytes(removal.nbytes)
        if not arguments.yes:
            try:
                answer = input(f"delete {one} ({size})? [y/N] ")
            except EOFError:
                answer = ""
            if answer.strip().lower() not in ("y", "yes"):
                print(f"{one} stays")
                continue
        hub_cache.remove(removal)
        print(f"deleted {one}: {size} freed")
    return 0
