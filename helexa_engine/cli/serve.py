"""``helexa serve [MODEL...]``"""

from __future__ import annotations

import argparse

from helexa_server.config import ServerConfig

from ..config import EngineConfig, add_flags
from .options import add_config_flag, resolve_catalogue, resolve_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="models to load at start, by their names in the configuration file too; its other models are loaded when they are asked "
        "for [the models of the file, else demo]",
    )
    add_config_flag(parser)
    add_flags(parser, ServerConfig)
    add_flags(parser, EngineConfig)


def run(arguments: argparse.Namespace) -> int:
    server = resolve_config(arguments, "server", ServerConfig)
    resolve_config(arguments, "engine", EngineConfig)  # a bad value is an error, whatever the models' own tables say
    catalogue = resolve_catalogue(arguments, arguments.models, server.served_model_name)
    from helexa_server.app import serve

    return serve(catalogue, server)
