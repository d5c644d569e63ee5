"""All that keys, values and states of a prompt depend on besides its tokens, so that saved ones are never taken for others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import env
from ..cache.spec import PAGE_SIZE, CacheSpec
from ..config import EngineConfig
from ..models.config import ModelConfig
from ..ops.registry import native_core
from ..version import __version__
from ..weights.checkpoint import Checkpoint
from ..weights.file_facts import facts, head_digest, source_files
from . import cuda_device

_PACKAGE = Path(__file__).resolve().parents[1]


def model_fingerprint(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    specs: Sequence[CacheSpec],
    config: EngineConfig,
    device: str = "cpu",
) -> dict[str, str]:
    """By what it is called in a message. ``checkpoint`` is the one whose tensors were loaded, for ``device``.

    Two runs with the same fingerprint compute the same bits: what is left out (threads, seats, the length of the context, how prompts
    are cut into chunks) changes none. It errs to the other side: a file that was copied or touched is another.
    """
    arithmetic = [f"torch {torch.__version__}", *(_cuda() if device == "cuda" else _cpu())]
    arithmetic += [f"{op}={name}" for op, name in sorted(env.forced_ops().items())]
    return {
        "helexa": __version__,
        "code": _code_digest(),
        "arithmetic": ", ".join(arithmetic),
        "weight files": _files_digest(checkpoint.path),
        "shape": _digest(dataclasses.asdict(model_config)),
        "weights": f"{config.dtype}, {config.quant or 'as stored'}" + (", mapped" if config.mmap_experts else ""),
        "cache": _digest([[type(spec).__name__, dataclasses.asdict(spec)] for spec in specs]),
        "kv_dtype": ", ".join(sorted({spec.dtype for spec in specs if hasattr(spec, "dtype")})),
        "page_size": str(PAGE_SIZE),
    }


def _cpu() -> list[str]:
    core = native_core()
    level = "plain PyTorch" if core is None else core.cpu_isa()
    return [level, torch.backends.cpu.get_cpu_capability(), _processor(), "".join(platform.libc_ver())]


def _cuda() -> list[str]:
    return [cuda_device.name(), f"CUDA {torch.version.cuda}"]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _files_digest(source: Path) -> str:
    """Of names, sizes, beginnings and samples, and of the times of the last write and the last change of anything."""
    files = source_files(source)
    return _digest([[path.name, head_digest(path), facts(path), path.stat().st_ctime_ns] for path in files])


def _code_digest() -> str:
    """Of everything that computes: the sources, and the native core as it was built."""
    digest = hashlib.sha256()
    for path in sorted([*_PACKAGE.rglob("*.py"), *_PACKAGE.glob("_native*")]):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The processor's name: what libraries choose their code by."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
