"""Configuration: one dataclass field is one knob, and gives its flag (most of them), environment variable, TOML key and documentation.

Precedence: flag > environment ``HELEXA_<NAME>`` > TOML file > default. An unknown TOML key is an error with its path.
"""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from . import env
from .errors import InvalidRequest
from .sampling_params import NEUTRAL, SamplingParams

Config = TypeVar("Config")


def knob(default: Any, help: str, *, low: float | None = None, high: float | None = None, flag: bool = True) -> Any:
    """A config field with its documentation and, for numbers, its inclusive range. Without ``flag`` it is set in a file or in the
    environment: what is rarely changed would hide the rest of ``--help``."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "flag": flag})


def byte_size(value: str | int) -> int:
    """``"1.5GiB"``, ``"800MB"`` or a plain count, in bytes. Raises ValueError."""
    if isinstance(value, int):
        return value
    text = value.strip()
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    for suffix, scale in units.items():
        if text.endswith(suffix):
            return int(float(text.removesuffix(suffix)) * scale)
    return int(text)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is loaded and run. Field help is the documentation of each."""

    device: Literal["auto", "cpu", "cuda"] = knob(
        "auto", "where to run; auto is cuda where this build, this machine and the model allow it"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = knob(
        "auto", "storage type of unquantised weights; auto keeps what the file has"
    )
    quant: str | None = knob(None, "quantise the weights while loading: Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, IQ4_XS ...")
    imatrix: str | None = knob(
        None, "file with an importance matrix (llama.cpp's) for quant: which columns matter, measured on text"
    )
    quant_cache: bool = knob(
        True, "keep weights quantised while loading on disk (HELEXA_CACHE), so that the next load maps them"
    )
    quant_cache_limit: str = knob("100GiB", "size of that cache; the least recently used models make room", flag=False)
    kv_dtype: Literal["auto", "float32", "float16", "bfloat16", "q8_0"] = knob(
        "auto",
        "storage type of keys and values; auto is bfloat16 on cuda, on the processor float32 for float32 weights, else float16; q8_0 "
        "takes about half of that",
    )
    max_model_len: int | None = knob(
        None, "longest prompt plus answer in tokens; default: what the model allows and memory holds", low=1
    )
    max_num_seqs: int = knob(8, "sequences computed together", low=1, high=256)
    max_num_batched_tokens: int = knob(
        512, "most tokens in one step; longer prompts are computed in chunks", low=16, high=65536
    )
    cuda_graphs: bool = knob(
        True,
        "replay decode steps on CUDA as graphs; without them a step waits for Python and takes less memory",
        flag=False,
    )
    max_step_seconds: float = knob(
        0.5,
        "how long a running answer may wait for its next token while prompts are computed; a step has 64 of their tokens at least",
        low=0.001,
        flag=False,
    )
    memory_fraction: float = knob(0.9, "share of free memory that weights and KV pages may take", low=0.05, high=1.0)
    prefix_cache: bool = knob(True, "reuse what is computed of a prompt for others that begin with the same tokens")
    state_snapshots: int = knob(
        32, "states of hybrid models kept for that, as far as they fit beside the context", low=0, high=4096
    )
    snapshot_interval: int = knob(
        1024, "tokens of a prompt from one such state to the next, a multiple of 64", low=64, high=1048576, flag=False
    )
    prefix_cache_folder: str | None = knob(
        None,
        "folder that keeps what is computed of prompts across restarts, a file a model, readable by its owner alone; default: it "
        "ends with the process",
    )
    prefix_cache_limit: str = knob("4GiB", "size of such a file; what was used last is kept", flag=False)
    seed: int | None = knob(None, "seed for requests that give none; default: drawn at start")
    mmap_experts: bool = knob(
        False,
        "leave the experts of a GGUF file in the mapped file, for models larger than memory: slower, no memory reserved for them",
    )
    num_threads: int | None = knob(
        None, "threads of the native core; default: the physical cores this process may use", low=1, high=1024
    )
    pin_threads: bool = knob(
        False, "keep each of them on a core of its own; not where other processes may take that core", flag=False
    )
    offline: bool = knob(False, "never reach the hub: a model must be on disk; HF_HUB_OFFLINE does the same")

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(config: Any) -> None:
    """Type and range of every field; raises :class:`InvalidRequest` naming it."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        kinds, choices, optional = _kinds(hints[f.name])
        if value is None and optional:
            continue
        if choices and value not in choices:
            raise InvalidRequest(f.name, f"expected one of {', '.join(map(str, choices))}; got {value!r}")
        if not choices:
            fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
            if not fits or (isinstance(value, bool) and bool not in kinds):
                names = " or ".join(k.__name__ for k in kinds)
                raise InvalidRequest(f.name, f"expected {names}, got {value!r}")
        low, high = f.metadata.get("low"), f.metadata.get("high")
        if low is not None and value < low:
            raise InvalidRequest(f.name, f"expected at least {low}, got {value}")
        if high is not None and value > high:
            raise InvalidRequest(f.name, f"expected at most {high}, got {value}")


def _kinds(hint: Any) -> tuple[tuple[type, ...], tuple[Any, ...], bool]:
    """(accepted types, choices of a Literal, whether None is allowed) of a field's annotation."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds: list[type] = []
    choices: list[Any] = []
    for part in parts:
        origin = typing.get_origin(part)
        if origin is Literal:
            choices.extend(typing.get_args(part))
        elif part is not type(None):
            kinds.append(origin or part)
    return tuple(kinds), tuple(choices), type(None) in parts


def add_flags(parser: argparse.ArgumentParser, config: type, only: Collection[str] | None = None) -> None:
    """One ``--flag`` a field that has one, or for those in ``only``. A flag that is not given stays out of the namespace, so that it
    does not hide lower layers."""
    hints = typing.get_type_hints(config)
    group = parser.add_argument_group(f"{config.__name__.removesuffix('Config').lower()} options")
    for f in dataclasses.fields(config):
        if not f.metadata["flag"] or (only is not None and f.name not in only):
            continue
        kinds, choices, _ = _kinds(hints[f.name])
        flag = "--" + f.name.replace("_", "-")
        note = f.metadata["help"] + ("" if f.default is None else f" [{f.default}]")
        if kinds == (bool,):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=note)
        elif choices:
            group.add_argument(flag, choices=choices, default=argparse.SUPPRESS, help=note)
        else:
            metavar = f.name.rsplit("_", 1)[-1].upper()
            group.add_argument(flag, metavar=metavar, default=argparse.SUPPRESS, help=note)


def read_toml(path: Path, sections: Mapping[str, type], per_model: Collection[type] = ()) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file, checked: every table is one of ``sections`` and every key a field of its dataclass.

    Beside them, table ``sampling.NAME`` has sampling defaults of a model, which are checked as :class:`SamplingParams` are, and table
    ``models.NAME`` fields of the dataclasses ``per_model``.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidRequest("config", f"no such file: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("config", f"{path}: not valid TOML: {error}") from None
    for section, table in document.items():
        if section == "sampling":
            for model, defaults in _table(f"{path}: sampling", table).items():
                _check_sampling(f"{path}: sampling.{model}", defaults)
            continue
        if section == "models" and per_model:
            known = {f.name for kind in per_model for f in dataclasses.fields(kind)}
            for model, own in _table(f"{path}: models", table).items():
                _check_keys(f"{path}: models.{model}", own, known)
            continue
        if section not in sections:
            raise InvalidRequest(
                f"{path}: {section}", f"unknown table; expected one of {', '.join(sections)}, models, sampling"
            )
        _check_keys(f"{path}: {section}", table, {f.name for f in dataclasses.fields(sections[section])})
    return document


def _table(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(place, f"expected a table, got {value!r:.80}")
    return value


def _check_keys(place: str, table: Any, known: Collection[str]) -> None:
    for key in _table(place, table):
        if key not in known:
            raise InvalidRequest(f"{place}.{key}", f"unknown key; expected one of {', '.join(sorted(known))}")


def _check_sampling(place: str, defaults: Any) -> None:
    _check_keys(place, defaults, NEUTRAL)
    try:
        SamplingParams(**defaults)
    except InvalidRequest as error:
        raise InvalidRequest(f"{place}.{error.path}", error.reason) from None


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a config with where its value comes from: a flag, ``environment HELEXA_...``, a key of a file, or ``default``."""

    name: str
    value: Any
    source: str


def settings(
    config: type,
    flags: Mapping[str, Any],
    toml: Mapping[str, Any] | None = None,
    toml_name: str = "",
    *,
    own: Mapping[str, Any] | None = None,
    own_name: str = "",
) -> list[Setting]:
    """Every field of ``config``, from flags, environment, TOML table and defaults, in this order.

    ``toml_name`` stands before the keys of the table in messages. ``own`` is a table that comes before ``toml``: a model's. Raises
    :class:`InvalidRequest` that names the source.
    """
    hints = typing.get_type_hints(config)
    found: list[Setting] = []
    for f in dataclasses.fields(config):
        kinds, choices, _ = _kinds(hints[f.name])
        if flags.get(f.name) is not None:
            value, source = flags[f.name], "--" + f.name.replace("_", "-")
        elif (from_env := env.option(f.name)) is not None:
            value, source = from_env, f"environment {env.PREFIX}{f.name.upper()}"
        elif own and f.name in own:
            value, source = own[f.name], own_name + f.name
        elif toml and f.name in toml:
            value, source = toml[f.name], toml_name + f.name
        else:
            value, source = f.default, "default"
        if isinstance(value, str) and source != "default" and not choices and str not in kinds:
            value = _parse(value, kinds, source)
        found.append(Setting(f.name, value, source))
    return found


def resolve(
    config: type[Config],
    flags: Mapping[str, Any],
    toml: Mapping[str, Any] | None = None,
    toml_name: str = "",
    *,
    own: Mapping[str, Any] | None = None,
    own_name: str = "",
) -> Config:
    """``config`` filled as :func:`settings` says. Raises :class:`InvalidRequest` that names the source of a bad value."""
    found = settings(config, flags, toml, toml_name, own=own, own_name=own_name)
    try:
        return config(**{setting.name: setting.value for setting in found})
    except InvalidRequest as error:
        source = next(setting.source for setting in found if setting.name == error.path)
        raise InvalidRequest(source, error.reason) from None


def _parse(text: str, kinds: tuple[type, ...], source: str) -> Any:
    if bool in kinds:
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() in words:
            return words[text.lower()]
        raise InvalidRequest(source, f"expected true or false, got {text!r}")
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    raise InvalidRequest(source, f"expected {' or '.join(k.__name__ for k in kinds)}, got {text!r}")
