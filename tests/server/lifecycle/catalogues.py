"""Catalogues as command lines and files give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helexa_engine.config import EngineConfig, resolve
from helexa_server.lifecycle.catalogue import Catalogue, build


def engine_config(own: Mapping[str, Any], own_name: str) -> EngineConfig:
    return resolve(EngineConfig, {}, own=own, own_name=own_name)


def catalogue_of(*models: str, **options: Any) -> Catalogue:
    return build(models, engine_config, **options)
