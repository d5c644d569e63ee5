"""The models that a server may load: those of its command line and those of its configuration file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from helexa_engine.config import EngineConfig
from helexa_engine.errors import InvalidRequest

from ..config import ModelSettings


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model that may be loaded.

    Attributes:
        id: the name clients use, and the one in answers.
        model: file, folder, hub id or ``demo``.
        engine: how to load and run it.
        settings: of its table; for one without a table, those of the command line: loaded at start.
        sampling: defaults for what requests leave open.
    """

    id: str
    model: str
    engine: EngineConfig
    settings: ModelSettings
    sampling: Mapping[str, Any] = field(default_factory=dict)


class Catalogue:
    """The entries in the order they were given. Raises :class:`InvalidRequest` where two go by the same name."""

    def __init__(self, entries: Sequence[CatalogueEntry]) -> None:
        self._entries = tuple(entries)
        owners: dict[str, str] = {}
        for entry in entries:
            for name in (entry.id, *(entry.settings.aliases or ())):
                if name in owners:
                    place = "models" if name == entry.id else f"models.{entry.id}.aliases"
                    raise InvalidRequest(
                        place, f"{name!r} is a name of {owners[name]} already; each name stands for one model"
                    )
                owners[name] = entry.id

    def __iter__(self) -> Iterator[CatalogueEntry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def build(
    models: Sequence[str],
    engine_config: Callable[[Mapping[str, Any], str], EngineConfig],
    *,
    served_model_name: str | None = None,
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    file: Path | None = None,
    sampling: Mapping[str, Mapping[str, Any]] | None = None,
) -> Catalogue:
    """What ``helexa serve`` offers.

    Models of the command line are loaded at start, whatever their tables say, and no others are; those of the file are offered beside
    them. Without any on the command line the file's are as their tables say; without those either there is the demo.

    Args:
        models: of the command line: a name in ``tables``, or a file, folder, hub id or ``demo``.
        engine_config: settings of the engine with those of a table, which is called as the second argument says in messages.
        served_model_name: the name of the only model on the command line.
        tables: ``[models.NAME]`` of ``file``, by name.
        sampling: defaults of the models, by name.

    Raises:
        InvalidRequest: with the path of what is wrong.
    """
    tables, sampling = tables or {}, sampling or {}
    if not models and not tables:
        models = ["demo"]
    if served_model_name is not None and len(models) != 1:
        raise InvalidRequest("served_model_name", f"names one model, but {len(models)} are given")
    entries: list[CatalogueEntry] = []
    for model in models:
        if model in tables:
            entries.append(_configured(model, tables[model], engine_config, file, "at start"))
            if served_model_name is not None:
                entries[-1] = dataclasses.replace(entries[-1], id=served_model_name)
        else:
            name = served_model_name or model_name(model)
            entries.append(CatalogueEntry(name, model, engine_config({}, ""), ModelSettings(load="at start")))
    for name, table in tables.items():
        if name not in models:
            entries.append(_configured(name, table, engine_config, file, "on request" if models else None))
    names = [entry.id for entry in entries]
    for name in sampling:
        if name not in names:
            raise InvalidRequest(f"sampling.{name}", f"no model of this name is served; expected {', '.join(names)}")
    return Catalogue([dataclasses.replace(entry, sampling=sampling.get(entry.id, {})) for entry in entries])


def _configured(
    name: str,
    table: Mapping[str, Any],
    engine_config: Callable[[Mapping[str, Any], str], EngineConfig],
    file: Path | None,
    load: Literal["at start", "on request"] | None,
) -> CatalogueEntry:
    """``load`` comes before what the table says."""
    place = f"{file}: models.{name}."
    own = {f.name for f in dataclasses.fields(ModelSettings)}
    try:
        settings = ModelSettings(**{key: value for key, value in table.items() if key in own})
    except InvalidRequest as error:
        raise InvalidRequest(place + error.path, error.reason) from None
    engine = engine_config({key: value for key, value in table.items() if key not in own}, place)
    if load is not None:
        settings = dataclasses.replace(settings, load=load)
    return CatalogueEntry(name, _relative_to(file, settings.model or name), engine, settings)


def _relative_to(file: Path | None, model: str) -> str:
    """A path in a file is relative to that file; what is not there is a hub id, or for loading to complain about."""
    if file is None or model == "demo":
        return model
    beside = file.absolute().parent / Path(model).expanduser()
    return str(beside) if beside.exists() else model


def model_name(model: str) -> str:
    """The name clients use for ``model``: a file's stem, a folder's name, else the id as it is."""
    path = Path(model)
    if model.endswith(".gguf"):
        return path.stem
    return path.resolve().name if path.is_dir() else model
