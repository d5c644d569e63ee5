"""``helexa serve [MODEL...]``"""

from __future__ import annotations

import argparse

from helexa_server.config import ServerConfig

from ..config import EngineConfig, add_flags
from .options import add_config_flag, resolve_config, sampling_defaults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="*", default=["demo"], help="models to serve [demo]")
    add_config_flag(parser)
    add_flags(parser, ServerConfig)
    add_flags(parser, EngineConfig)


def run(arguments: argparse.Namespace) -> int:
    server = resolve_config(arguments, "server", ServerConfig)
    engine = resolve_config(arguments, "engine", EngineConfig)
    from helexa_server.app import serve

    return serve(arguments.models, server, engine, sampling_defaults(arguments))
