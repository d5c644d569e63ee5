"""What tells a model's files from others without reading all of them."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

from .gguf import GGUFFile

_SOURCE_FILES = (".json", ".safetensors", ".jinja")
_HEAD_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def source_files(source: Path) -> list[Path]:
    """The files of a model: those of a folder that say something about it, or every part of a GGUF file."""
    if source.is_dir():
        return sorted(p for p in source.iterdir() if p.suffix in _SOURCE_FILES and p.is_file())
    return list(GGUFFile(source).paths)


def head_digest(path: Path) -> str:
    """SHA-256 of the first MiB: of a model file, all that describes its tensors."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()


def facts(path: Path) -> dict[str, int]:
    """What tells a file from another or a damaged one: size, time of writing, checksum of head, tail and samples between."""
    status = path.stat()
    checksum = 0
    with path.open("rb") as file:
        for i in range(_SAMPLES + 1):
            file.seek(max(0, status.st_size - _SAMPLE_BYTES) * i // _SAMPLES)
            checksum = zlib.crc32(file.read(_SAMPLE_BYTES), checksum)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "checksum": checksum}
