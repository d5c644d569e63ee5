"""Models quantised on loading, kept on disk: the second load maps a file instead of quantising again.

One GGUF file a model and mix under ``<cache>/quantized`` (``$HELEXA_CACHE``, else ``$XDG_CACHE_HOME/helexa``, else
``~/.cache/helexa``), with a record beside it of what was written. They may be deleted at any time; the least recently used go when
the folder outgrows its limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import config, env
from ..errors import InvalidRequest, ModelDoesNotFit, ModelNotFound, UnsupportedCheckpoint
from ..version import __version__
from ..weights.checkpoint import Checkpoint, GGUFCheckpoint, open_checkpoint
from ..weights.file_facts import facts, head_digest, source_files
from .quantize_model import quantize_model

log = logging.getLogger(__name__)

_LAYOUT = 2  # of key and record; a change makes old entries strangers


def folder() -> Path:
    """Where the files are."""
    return env.cache_folder() / "quantized"


def limit_bytes(text: str) -> int:
    """A size such as ``100GiB``. Raises :class:`InvalidRequest`."""
    try:
        size = config.byte_size(text)
    except ValueError:
        raise InvalidRequest("quant_cache_limit", f"expected a size such as 100GiB, got {text!r}") from None
    if size < 0:
        raise InvalidRequest("quant_cache_limit", f"expected a size not below zero, got {text!r}")
    return size


def open_quantized(
    source: Path,
    quant: str,
    *,
    name: str,
    limit: int,
    importance_file: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Checkpoint | None:
    """``source`` in the mix ``quant``, from the cache, where it is put first if it is not there.

    A file that is not what was written, cut short or changed, is made again. Callers in several processes wait for the one that
    makes it. Where the folder cannot be written to, what is in it is used.

    Args:
        name: what the model is called in the file.
        limit: bytes that all files together may have; others than this one are deleted to keep it.
        importance_file: an importance matrix to quantise with.

    Returns:
        None where the cache cannot hold it, which is logged with the reason.

    Raises:
        InvalidRequest: the same where there is an ``importance_file``, or that cannot be used.
    """
    try:
        stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[-80:]}-{quant.upper()}-{_key(source, quant, importance_file)}"
        path = folder() / f"{stem}.gguf"
        if _damage(path) is None:
            return _opened(path)
        folder().mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            damage = _damage(path)  # another process may have made it meanwhile
            if damage is None:
                return _opened(path)
            if damage:
                log.warning("the cached %s is damaged and is made again: %s", path.name, damage)
                _delete(path)
            _sweep()
            return _made(path, source, quant, name, limit, importance_file, progress)
    except (OSError, RuntimeError, ModelNotFound, ModelDoesNotFit, UnsupportedCheckpoint) as error:
        # RuntimeError: there is no home folder. ModelNotFound: evicted as it was opened.
        if importance_file is not None:
            raise InvalidRequest("imatrix", f"{name} cannot be quantised with {importance_file}: {error}") from None
        log.warning("%s in %s is not cached, so every load quantises again: %s", name, quant, error)
        return None


def _made(
    path: Path,
    source: Path,
    quant: str,
    name: str,
    limit: int,
    importance_file: Path | None,
    progress: Callable[[float], None] | None,
) -> Checkpoint:
    quantize_model(source, path, quant, name=name, importance_file=importance_file, keep_mtp=False, progress=progress)
    record = path.with_suffix(".json")
    partial = record.with_suffix(".json.partial")
    try:
        partial.write_text(json.dumps(facts(path)), encoding="utf-8")
        os.replace(partial, record)
    except OSError:
        partial.unlink(missing_ok=True)
        _delete(path)
        raise
    checkpoint = open_checkpoint(path)
    _evict(path, limit)
    return checkpoint


def _damage(path: Path) -> str | None:
    """None when the entry is what was written, else what is wrong with it; empty when there is none."""
    if not path.exists():
        return ""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return None if record == facts(path) else "it is not what was written"
    except (OSError, ValueError) as error:
        return str(error)


def _opened(path: Path) -> Checkpoint:
    with contextlib.suppress(OSError):  # of somebody else, or on a read-only disk
        os.utime(path.with_suffix(".json"))  # when it was last used
    return open_checkpoint(path)


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)


def _key(source: Path, quant: str, importance_file: Path | None = None) -> str:
    """Of the source's content, as far as names, sizes, times, beginnings and samples tell it, the mix and this version of helexa."""
    paths = source_files(source)
    if importance_file is not None:
        paths.append(importance_file)
    files = [[path.name, head_digest(path), facts(path)] for path in paths]
    identity = json.dumps([_LAYOUT, __version__, quant.upper(), importance_file is not None, files])
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that quantises %s", path.stem)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing gives the lock back; the empty file stays, for deleting it would let two hold the lock


def _sweep() -> None:
    """Deletes what processes left behind that were killed while they wrote."""
    for partial in folder().glob("*.partial"):
        lock = partial.with_name(partial.name.removesuffix(".partial")).with_suffix(".lock")
        with lock.open("a") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)


def _evict(kept: Path, limit: int) -> None:
    """Deletes the least recently used entries but ``kept`` until all together fit ``limit``."""
    entries = []
    for path in folder().glob("*.gguf"):
        record = path.with_suffix(".json")
        used = record if record.exists() else path
        entries.append((used.stat().st_mtime_ns, path, path.stat().st_size))
    total = sum(size for _, _, size in entries)
    for _, path, size in sorted(entries):
        if total <= limit:
            return
        if path == kept:
            continue
        log.info("deleting %s from the cache, which is limited to %.1f GB", path.name, limit / 1e9)
        _delete(path)
        total -= size


def can_hold(checkpoint: Checkpoint) -> bool:
    """Whether quantising to a file gives what quantising on loading gives: not so where some matrices are quantised already."""
    return not (
        isinstance(checkpoint, GGUFCheckpoint) and any(raw.quant_type.is_quantised for raw in checkpoint.tensors)
    )
