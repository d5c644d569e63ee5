"""The only module that reads the environment. Every variable helexa knows is one property here.

Values are read when asked for, not at import, so that tests can set them with ``monkeypatch.setenv``.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import InvalidRequest

PREFIX = "HELEXA_"


def _get(name: str) -> str | None:
    value = os.environ.get(PREFIX + name)
    return value if value else None


def _positive_int(name: str) -> int | None:
    value = _get(name)
    if value is None:
        return None
    if not value.isdigit() or int(value) < 1:
        raise InvalidRequest(f"environment {PREFIX}{name}", f"expected a positive integer, got {value!r}")
    return int(value)


def cpu_isa() -> str | None:
    """``HELEXA_CPU_ISA``: force a level of the native core, ``generic``, ``avx2``, ``avx2_vnni``, ``avx512_vnni`` or
    ``avx512`` (that with what newer processors add); None chooses by cpuid."""
    return _get("CPU_ISA")


def num_threads() -> int | None:
    """``HELEXA_NUM_THREADS``: threads of the native core; None takes the physical cores this process may run on."""
    return _positive_int("NUM_THREADS")


def forced_ops() -> dict[str, str]:
    """``HELEXA_OPS=op=implementation,...``: implementations to force, by op name."""
    forced: dict[str, str] = {}
    for item in (_get("OPS") or "").split(","):
        if not item.strip():
            continue
        op, equals, implementation = item.partition("=")
        if not equals or not op.strip() or not implementation.strip():
            raise InvalidRequest(f"environment {PREFIX}OPS", f"expected op=implementation[,...], got {item!r}")
        forced[op.strip()] = implementation.strip()
    return forced


def option(name: str) -> str | None:
    """``HELEXA_<NAME>`` for a config field ``name``: the layer between the command line and the TOML file."""
    return _get(name.upper())


def inherited() -> dict[str, str]:
    """The whole environment, for a program that is started from here."""
    return dict(os.environ)


def config_file() -> Path | None:
    """``HELEXA_CONFIG``: path of a TOML file; relative to the working directory. Else ``$XDG_CONFIG_HOME/helexa/config.toml``
    (``~/.config`` without it), if that is there."""
    value = _get("CONFIG")
    if value:
        return Path(value)
    usual = _xdg_folder("XDG_CONFIG_HOME", ".config") / "helexa" / "config.toml"
    return usual if usual.is_file() else None


def _xdg_folder(name: str, below_home: str) -> Path:
    base = os.environ.get(name, "")  # to be ignored unless absolute, says the XDG specification
    return Path(base) if base.startswith("/") else Path.home() / below_home


def cache_folder() -> Path:
    """``HELEXA_CACHE``: where files go that can be made again. Default: ``$XDG_CACHE_HOME/helexa``, else ``~/.cache/helexa``."""
    value = _get("CACHE")
    if value:
        return Path(value).expanduser().absolute()
    return _xdg_folder("XDG_CACHE_HOME", ".cache") / "helexa"


def hides_cuda_devices() -> bool:
    """Whether ``CUDA_VISIBLE_DEVICES`` leaves CUDA none: it is set, and empty or begins with a number that no device has."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return value is not None and (not value.strip() or value.strip().startswith("-"))


def first_cuda_device() -> int:
    """The number of the first device that ``CUDA_VISIBLE_DEVICES`` leaves, as far as it is one; else 0."""
    first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")[0].strip()
    return int(first) if first.isdigit() else 0


def api_key() -> str | None:
    """``HELEXA_API_KEY``: the key clients must send; read here so that it never stands on a command line."""
    return _get("API_KEY")


def admin_key() -> str | None:
    """``HELEXA_ADMIN_KEY``: the key that loading and unloading models takes."""
    return _get("ADMIN_KEY")


def _true(name: str, value: str | None) -> bool:
    words = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "": False,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if (value or "").lower() not in words:
        raise InvalidRequest(f"environment {name}", f"expected true or false, got {value!r}")
    return words[(value or "").lower()]


def offline() -> bool:
    """``HELEXA_OFFLINE`` or huggingface-hub's ``HF_HUB_OFFLINE``: never reach the hub."""
    return _true(f"{PREFIX}OFFLINE", _get("OFFLINE")) or _true("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE"))


def hub_cache() -> Path:
    """Where huggingface-hub keeps models: ``HF_HUB_CACHE``, else ``hub`` in ``HF_HOME``, else in ``$XDG_CACHE_HOME/huggingface``."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME")
    if not cache and home:
        cache = os.path.join(home, "hub")
    if not cache:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface", "hub")
    return Path(os.path.expandvars(cache)).expanduser()


def hub_endpoint() -> str:
    """``HF_ENDPOINT``: the hub, or a mirror of it."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
