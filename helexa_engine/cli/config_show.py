"""``helexa config show``: every setting as a TOML file would say it, and where its value came from."""

from __future__ import annotations

import argparse
import json
from typing import Any

from helexa_server.config import ServerConfig

from .. import config, env
from ..config import EngineConfig, add_flags
from ..errors import InvalidRequest
from .options import (
    UsageError,
    add_config_flag,
    config_path,
    config_table,
    resolve_catalogue,
    resolve_config,
    sampling_defaults,
)

TABLES: dict[str, type] = {"server": ServerConfig, "engine": EngineConfig}

#: Taken from the environment or from files alone, and shown to nobody.
SECRETS = {"HELEXA_API_KEY": env.api_key, "HELEXA_ADMIN_KEY": env.admin_key}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=["show"], help="print the settings that `helexa serve` with the same flags would have"
    )
    add_config_flag(parser)
    for kind in TABLES.values():
        add_flags(parser, kind)


def run(arguments: argparse.Namespace) -> int:
    path = config_path(arguments)
    print(f"# file: {path or 'none'}")
    for name, read in SECRETS.items():
        print(f"# {name}: {'set' if read() else 'not set'}")
    for table, kind in TABLES.items():
        resolve_config(arguments, table, kind)  # a bad value is an error here as it is for the server
        try:
            found = config.settings(kind, vars(arguments), *config_table(path, table))
        except InvalidRequest as error:
            raise UsageError(str(error)) from None
        lines = [(_assignment(setting), setting.source) for setting in found]
        width = max(len(line) for line, _ in lines)
        print(f"\n[{table}]")
        for line, source in lines:
            print(f"{line:{width}}  # {source}")
    tables, _ = config_table(path, "models")
    # What the tables say of each other is an error here as it is for the server.
    resolve_catalogue(arguments, list(dict.fromkeys([*tables, *sampling_defaults(arguments)])), None)
    for model, own in tables.items():
        print(f"\n[models.{_toml(model)}]  # {path}")
        for name, value in own.items():
            print(f"{name} = {_toml(value)}")
    for model, defaults in sampling_defaults(arguments).items():
        print(f"\n[sampling.{_toml(model)}]  # {path}")
        for name, value in defaults.items():
            print(f"{name} = {_toml(value)}")
    return 0


def _assignment(setting: config.Setting) -> str:
    """A line of TOML; a comment where nothing is set, for which TOML has no word."""
    return f"# {setting.name} =" if setting.value is None else f"{setting.name} = {_toml(setting.value)}"


def _toml(value: Any) -> str:
    # JSON's strings, numbers and truth values are TOML's too, once the delete character is escaped.
    return json.dumps(value, ensure_ascii=True).replace("\x7f", "\\u007f")
