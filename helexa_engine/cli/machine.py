"""Facts about the machine and this process, from the standard library and /proc; where a system does not tell, None."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def _colon_fields(path: str) -> Iterator[tuple[str, str]]:
    """The ``key: value`` lines of a /proc file; nothing where there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, colon, value = line.partition(":")
                if colon:
                    yield key.strip(), value.strip()
    except OSError:
        return


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    for key, value in _colon_fields("/proc/cpuinfo"):
        if key == "model name":
            return value
    return platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags as /proc/cpuinfo names them; empty elsewhere."""
    for key, value in _colon_fields("/proc/cpuinfo"):
        if key in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def usable_cpus() -> int:
    """Logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """All memory of the machine, in bytes."""
    value = dict(_colon_fields("/proc/meminfo")).get("MemTotal", "").removesuffix(" kB")
    return int(value) * 1024 if value.isdigit() else None


def resident_bytes() -> dict[str, int]:
    """Resident memory of this process in bytes: ``total``, and of it ``anonymous`` (ours) and ``file`` (mapped, evictable)."""
    names = {"VmRSS": "total", "RssAnon": "anonymous", "RssFile": "file"}
    return {
        names[key]: int(value.removesuffix(" kB")) * 1024
        for key, value in _colon_fields("/proc/self/status")
        if key in names
    }


def commit() -> str | None:
    """The commit of the source tree this package runs from, with ``+changes`` when tracked files other than recorded results differ
    from it; None when installed."""
    if not (PACKAGE_ROOT / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + (
            "+changes" if _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def describe() -> dict[str, Any]:
    """What a benchmark row says about the machine."""
    total = memory_bytes()
    return {
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "memory_gib": None if total is None else round(total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def stamp(native: Any = None) -> dict[str, Any]:
    """When and where a benchmark row was measured: date, commit and machine; with the native core its instruction set and threads too."""
    where = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe(),
    }
    if native is None:
        return where
    return where | {"machine": describe() | {"instruction_set": native.cpu_isa()}, "threads": native.num_threads()}
