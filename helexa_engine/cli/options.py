"""Arguments that several commands share, and the way from them to config objects."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import config, env
from ..config import EngineConfig
from ..errors import InvalidRequest

if TYPE_CHECKING:
    from helexa_server.lifecycle.catalogue import Catalogue


class UsageError(Exception):
    """A flag, an environment variable or a configuration file is wrong: exit code 2."""


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="TOML file with tables [engine], [server], [models.NAME] for the models that may be served and [sampling.NAME] for their "
        "sampling defaults; "
        "environment HELEXA_CONFIG, else ~/.config/helexa/config.toml if it exists. Precedence: flag, environment HELEXA_<NAME>, "
        "this file, default; `helexa config show` says what came from where",
    )


def config_path(arguments: argparse.Namespace) -> Path | None:
    """The TOML file that is read, if any."""
    path: Path | None = arguments.config or env.config_file()
    return path


def resolve_config(arguments: argparse.Namespace, name: str, kind: type[config.Config]) -> config.Config:
    """``kind`` filled from flags, environment, table ``name`` of the TOML file and defaults. Raises :class:`UsageError`."""
    try:
        return config.resolve(kind, vars(arguments), *config_table(config_path(arguments), name))
    except InvalidRequest as error:
        raise UsageError(str(error)) from None


def sampling_defaults(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Tables ``[sampling.NAME]`` of the TOML file, by model. Raises :class:`UsageError`."""
    return _named_tables(arguments, "sampling")


def _named_tables(arguments: argparse.Namespace, name: str) -> dict[str, dict[str, Any]]:
    try:
        return config_table(config_path(arguments), name)[0]
    except InvalidRequest as error:
        raise UsageError(str(error)) from None


def resolve_catalogue(arguments: argparse.Namespace, models: Sequence[str], served_model_name: str | None) -> Catalogue:
    """What ``helexa serve`` with these arguments offers. Raises :class:`UsageError`."""
    from helexa_server.lifecycle import catalogue

    path = config_path(arguments)

    def engine_config(own: Mapping[str, Any], own_name: str) -> EngineConfig:
        table = config_table(path, "engine")
        return config.resolve(EngineConfig, vars(arguments), *table, own=own, own_name=own_name)

    try:
        return catalogue.build(
            models,
            engine_config,
            served_model_name=served_model_name,
            tables=_named_tables(arguments, "models"),
            file=path,
            sampling=sampling_defaults(arguments),
        )
    except InvalidRequest as error:
        raise UsageError(str(error)) from None


def config_table(path: Path | None, name: str) -> tuple[dict[str, Any], str]:
    """Table ``name`` of the file and what to call it in messages. Raises :class:`InvalidRequest`: the file has unknown keys."""
    if path is None:
        return {}, ""
    from helexa_server.config import ModelSettings, ServerConfig

    tables = config.read_toml(path, {"engine": EngineConfig, "server": ServerConfig}, (ModelSettings, EngineConfig))
    return tables.get(name, {}), f"{path}: {name}."


def model_path(model: str, *, offline: bool = False) -> Path:
    """Where MODEL lies; whether anything is there is for the reader to find out. A hub id that is not on disk is downloaded.

    Raises:
        ModelNotFound, DownloadFailed: of a hub id.
    """
    if model == "demo":
        from .. import demo

        return demo.path()
    path = Path(model).expanduser()
    from ..weights import hub

    hub_id = None if path.exists() else hub.HubId.parse(model)
    if hub_id is None:
        return path
    from .downloads import bars

    with bars() as on_transfer:
        return hub.locate(hub_id, offline=offline or env.offline(), on_transfer=on_transfer)
