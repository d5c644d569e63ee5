"""The prefix cache of a model in a file, so that a restart does not forget what was computed.

A file is a header and records, one a page, the most recently used first and none before the page it follows: whatever cuts it short
leaves a cache that is whole, only smaller. Native byte order; a file never leaves its machine (see :mod:`.model_fingerprint`).

    magic 8 bytes, length of the header uint32, header (JSON), checksum uint32
    record:  parent uint32   number of the record it follows, from 1; 0 where the prompt begins
             rank uint32     of its snapshot, 0 the most recently used one; NO_SNAPSHOT without
             key             its tokens, int32
             page            keys and values, the tensors of every layer one after the other
             snapshot        the same of the states, where there is one
             checksum uint32 CRC-32 of all this, beginning with the record's number
    end:     END uint32, number of records uint32, checksum uint32

Not safetensors: its index of offsets comes first and it knows no checksums, while records can be written as long as there is time and
be read straight into the pages.

A file is written aside, synced and renamed, so that there is a whole one at any moment. That happens when the engine is closed in order,
and when it had nothing to do for :data:`IDLE_SECONDS` while there is something new, at most :data:`BUSY_SHARE` of the time; a request
that comes meanwhile stops it within one page. A process that is killed loses what came after.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .. import config
from ..errors import InvalidRequest

if TYPE_CHECKING:
    from ..cache.prefix_cache import Node, PrefixCache
    from .cache_rows import CacheRows
    from .model_runner import ModelRunner

log = logging.getLogger(__name__)

MAGIC = b"helexaPC"
NO_SNAPSHOT = END = 2**32 - 1

#: How long the engine must have had nothing to do before the cache is saved.
IDLE_SECONDS = 5.0

#: Share of the time that saving while idle may take.
BUSY_SHARE = 0.05

#: When the engine is closed, what is written after this time is what there will be: a shutdown is bounded.
CLOSE_SECONDS = 5.0

#: Bytes between two syncs: writing then goes at the disk's pace, and the last sync does not take the time of all.
SYNC_BYTES = 1 << 26

_HEADER_BYTES = 1 << 20
_PAIR = struct.Struct("=II")
_WORD = struct.Struct("=I")


class _Unusable(Exception):
    """The file cannot be read any further; the message says why."""


def file_path(folder: str, name: str, model: Path) -> Path:
    """Where the cache of the model at ``model`` is kept: one file for each place, under a name that people recognise."""
    place = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:12]
    return Path(folder).expanduser() / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[-80:]}-{place}.prefixes"


def limit_bytes(text: str) -> int:
    """A size such as ``4GiB``. Raises :class:`InvalidRequest`."""
    try:
        size = config.byte_size(text)
    except ValueError:
        size = -1
    if size < 1:
        raise InvalidRequest("prefix_cache_limit", f"expected a size such as 4GiB, got {text!r}")
    return size


class SavedPrefixes:
    """The file of one prefix cache. Belongs to the engine's thread; nothing here raises for what is on the disk, it is logged.

    The file is this process's as long as this object is open: another one with the same file restores what is there and saves
    nothing.

    Args:
        path: the file; its folder is made.
        fingerprint: all that the bytes depend on, by what it is called; a file with another one is left alone until it is replaced.
        limit: bytes that the file may have.
        prefixes, runner: the cache and the tensors it is about.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, str],
        limit: int,
        prefixes: PrefixCache,
        runner: ModelRunner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._fingerprint = dict(fingerprint)
        self._limit = limit
        self._prefixes = prefixes
        self._pages = runner.page_memory()
        self._states = runner.state_memory()
        self._key_bytes = _WORD.size * runner.page_size
        self._page_bytes = sum(tensor.nbytes for tensor in self._pages)
        self._state_bytes = sum(tensor.nbytes for tensor in self._states)
        self._clock = clock
        self._not_before = 0.0
        self._num_saved = 0  # of the cache's ``num_kept``; what is restored does not count there
        self._lock = self._locked()

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    def _locked(self) -> IO[bytes] | None:
        """Holds the file's lock; None where it cannot be had, which is logged."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = open(self.path.with_name(self.path.name + ".lock"), "ab", opener=_private)  # noqa: SIM115
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                lock.close()
                raise
            self._partial.unlink(missing_ok=True)  # of a process that was killed while it wrote
        except BlockingIOError:
            log.warning("%s belongs to another process: this one saves no prefixes", self.path)
        except OSError as error:
            log.warning("prefixes are not saved: %s", error)
        else:
            return lock
        return None

    def close(self) -> None:
        """Lets another process have the file."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- saving

    def seconds_to_save(self) -> float | None:
        """When the cache is to be saved, if the engine has nothing to do until then; None while there is nothing new."""
        if self._lock is None or self._prefixes.num_kept == self._num_saved:
            return None
        return max(IDLE_SECONDS, self._not_before - self._clock())

    def save(self, is_wanted: Callable[[], bool]) -> None:
        """Replaces the file, or gives up as soon as the engine ``is_wanted``."""
        self._save(is_wanted, keeps_part=False)

    def save_at_close(self) -> None:
        """Replaces the file, within :data:`CLOSE_SECONDS` or little more, if there is something new."""
        if self._prefixes.num_kept != self._num_saved:
            deadline = self._clock() + CLOSE_SECONDS
            self._save(lambda: self._clock() > deadline, keeps_part=True)

    def _save(self, stop: Callable[[], bool], *, keeps_part: bool) -> None:
        """Writes the records until ``stop()``; what is there by then is kept or given up."""
        if self._lock is None:
            return
        started, num_kept = self._clock(), self._prefixes.num_kept
        nodes = self._chosen()
        try:
            with open(self._partial, "wb", opener=_private_new) as file:
                num_written = self._write(file, nodes, stop)
                if num_written < len(nodes) and not keeps_part:
                    log.debug("gave up saving prefixes: there is work")
                    self._partial.unlink()
                    return
                nbytes = file.tell()
            os.replace(self._partial, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)
            log.warning("prefixes are not saved, and %s stays as it was: %s", self.path, error)
        else:
            seconds = self._clock() - started
            rest = f" of {len(nodes)}" if num_written < len(nodes) else ""
            log.info("saved %d%s pages of prefixes, %.1f MB in %.2f s", num_written, rest, nbytes / 1e6, seconds)
        finally:
            self._not_before = self._clock() + (self._clock() - started) / BUSY_SHARE
        self._num_saved = num_kept  # also after a failure: the next attempt is when there is something new

    def _chosen(self) -> list[Node]:
        """The nodes to save: the most recently used ones, as many as the limit allows."""
        nodes, size = self._prefixes.by_last_use(), len(self._header()) + _PAIR.size + _WORD.size
        for i, node in enumerate(nodes):
            size += _PAIR.size + self._key_bytes + self._page_bytes + _WORD.size
            size += 0 if node.snapshot is None else self._state_bytes
            if size > self._limit:
                return nodes[:i]
        return nodes

    def _header(self) -> bytes:
        facts = {"fingerprint": self._fingerprint, "page_bytes": self._page_bytes, "state_bytes": self._state_bytes}
        text = json.dumps(facts).encode()
        begin = MAGIC + _WORD.pack(len(text)) + text
        return begin + _WORD.pack(zlib.crc32(begin))

    def _write(self, file: IO[bytes], nodes: Sequence[Node], stop: Callable[[], bool]) -> int:
        """Writes ``nodes`` in their order until ``stop()``, and syncs. Returns how many."""
        by_use = sorted((n for n in nodes if n.snapshot is not None), key=lambda n: -n.snapshot_used)
        ranks = {node: rank for rank, node in enumerate(by_use)}
        numbers = {self._prefixes.root: 0}
        num_written, unsynced = 0, file.write(self._header())
        for node in nodes:
            if stop():
                break
            assert node.parent is not None
            parts: list[bytes | memoryview] = [_PAIR.pack(numbers[node.parent], ranks.get(node, NO_SNAPSHOT)), node.key]
            parts += [tensor.read(node.page).data for tensor in self._pages]
            if node.snapshot is not None:
                parts += [tensor.read(node.snapshot).data for tensor in self._states]
            num_written += 1
            numbers[node] = num_written
            checksum = zlib.crc32(_WORD.pack(num_written))
            for part in parts:
                checksum = zlib.crc32(part, checksum)
                unsynced += file.write(part)
            file.write(_WORD.pack(checksum))
            if unsynced >= SYNC_BYTES:
                file.flush()
                os.fdatasync(file.fileno())
                unsynced = 0
        end = _PAIR.pack(END, num_written)
        file.write(end + _WORD.pack(zlib.crc32(end)))
        file.flush()
        os.fsync(file.fileno())
        return num_written

    # -- restoring

    def restore(self) -> None:
        """Reads the file into free pages of the cache's pool, as much of it as they hold."""
        started = self._clock()
        try:
            with open(self.path, "rb") as file:
                self._check_owner(os.fstat(file.fileno()))
                self._read_header(file)
                restored, why = self._read_records(file)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, _Unusable) as error:
            log.warning("the prefixes saved in %s are not used, the cache begins empty: %s", self.path, error)
            return
        seconds = self._clock() - started
        if why is None:
            log.info("restored %d pages of prefixes in %.2f s from %s", restored, seconds, self.path)
        else:
            log.warning("restored %d pages of prefixes from %s and no more: %s", restored, self.path, why)

    def _check_owner(self, status: os.stat_result) -> None:
        """Whoever could write the file could put words into the model's mouth."""
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _Unusable("expected a file that is ours and that nobody else may write to")

    def _read_header(self, file: IO[bytes]) -> None:
        begin = file.read(len(MAGIC) + _WORD.size)
        if len(begin) < len(MAGIC) + _WORD.size or not begin.startswith(MAGIC):
            raise _Unusable("it is no file of saved prefixes")
        (length,) = _WORD.unpack(begin[len(MAGIC) :])
        text = file.read(min(length, _HEADER_BYTES))
        if file.read(_WORD.size) != _WORD.pack(zlib.crc32(begin + text)):
            raise _Unusable("its header is damaged")
        header = json.loads(text)
        saved, ours = header["fingerprint"], self._fingerprint
        other = sorted(key for key in saved.keys() | ours.keys() if saved.get(key) != ours.get(key))
        if other:
            facts = "; ".join(f"{key} was {saved.get(key)} and is {ours.get(key)}" for key in other)
            raise _Unusable(f"they are of another model, version or setting: {facts}")
        if (header["page_bytes"], header["state_bytes"]) != (self._page_bytes, self._state_bytes):
            raise _Unusable("its pages have another size")

    def _read_records(self, file: IO[bytes]) -> tuple[int, str | None]:
        """Restores record after record. Returns how many, and why it ended before the file's end, if not for want of pages."""
        prefixes, pool = self._prefixes, self._prefixes.pool
        nodes: list[Node] = [prefixes.root]
        try:
            while pool.num_free:
                first = _read(file, _PAIR.size)
                parent, rank = _PAIR.unpack(first)
                if parent == END:
                    if rank != len(nodes) - 1 or _read(file, _WORD.size) != _WORD.pack(zlib.crc32(first)):
                        raise _Unusable("its end is damaged")
                    break
                nodes.append(self._read_record(file, first, parent, rank, nodes))
        except (OSError, _Unusable) as error:
            return len(nodes) - 1, str(error)
        return len(nodes) - 1, None

    def _read_record(self, file: IO[bytes], first: bytes, parent: int, rank: int, nodes: Sequence[Node]) -> Node:
        """Reads one record into a free page, and its snapshot into a free slot if there is one."""
        prefixes, number = self._prefixes, len(nodes)
        key = _read(file, self._key_bytes)
        has_snapshot = rank != NO_SNAPSHOT
        if parent >= number or (has_snapshot and prefixes.snapshots is None) or key in nodes[parent].children:
            raise _Unusable(f"record {number} is damaged")
        (page,) = prefixes.pool.allocate(1)
        slot = None
        if has_snapshot and prefixes.snapshots is not None and rank < prefixes.snapshots.num_slots:
            slot = prefixes.snapshots.allocate() if prefixes.snapshots.num_free else None
        try:
            checksum = zlib.crc32(key, zlib.crc32(first, zlib.crc32(_WORD.pack(number))))
            for tensor in self._pages:
                checksum = _read_into(file, tensor, page, checksum)
            for tensor in self._states if has_snapshot else ():
                if slot is not None:
                    checksum = _read_into(file, tensor, slot, checksum)
                else:
                    checksum = zlib.crc32(_read(file, tensor.nbytes), checksum)
            if _read(file, _WORD.size) != _WORD.pack(checksum):
                raise _Unusable(f"record {number} is damaged")
        except BaseException:
            prefixes.pool.release([page])
            if slot is not None and prefixes.snapshots is not None:
                prefixes.snapshots.release(slot)
            raise
        return prefixes.restore(nodes[parent], key, page, slot, rank)


def _read(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise _Unusable("it is cut short")
    return data


def _read_into(file: IO[bytes], rows: CacheRows, row: int, checksum: int) -> int:
    """Fills a row from the file. Returns the checksum that goes on from ``checksum``."""
    buffer = rows.buffer(row)
    if file.readinto(buffer.data) < buffer.nbytes:  # type: ignore[attr-defined]
        raise _Unusable("it is cut short")
    rows.write(row)
    return zlib.crc32(buffer.data, checksum)


def _private(path: str, flags: int) -> int:
    """Opens for the owner alone: prompts are private."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _private_new(path: str, flags: int) -> int:
    return _private(path, flags | os.O_EXCL)


def _sync_folder(folder: Path) -> None:
    """Makes a renaming last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
