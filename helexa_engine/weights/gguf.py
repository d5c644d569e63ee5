"""A reader of GGUF files: mapped, never trusted.

Layout (ggml's ``docs/gguf.md``): magic, version, tensor count, metadata count; the metadata; one record a tensor (name, dimensions,
type, offset); padding to the alignment; the tensor data. Versions 2 and 3, little endian. Split files are read as one.

Whatever is wrong with a file becomes :class:`UnsupportedCheckpoint` naming the file and the place. Counts and lengths are compared
with the bytes that are left before anything is allocated, so time and memory stay within a small multiple of the file.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..errors import ModelNotFound, UnsupportedCheckpoint
from ..quant import types
from ..quant.types import QuantType
from . import mapped_pages
from .lfs import refuse_pointer

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 65535
MAX_DIMENSIONS = 4
MAX_NESTING = 4
MAX_PARTS = 10_000

# Value types of metadata, by number.
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)

_SCALARS: dict[int, tuple[str, np.dtype[Any]]] = {
    UINT8: ("<B", np.dtype("<u1")),
    INT8: ("<b", np.dtype("<i1")),
    UINT16: ("<H", np.dtype("<u2")),
    INT16: ("<h", np.dtype("<i2")),
    UINT32: ("<I", np.dtype("<u4")),
    INT32: ("<i", np.dtype("<i4")),
    FLOAT32: ("<f", np.dtype("<f4")),
    BOOL: ("<B", np.dtype("<u1")),
    UINT64: ("<Q", np.dtype("<u8")),
    INT64: ("<q", np.dtype("<i8")),
    FLOAT64: ("<d", np.dtype("<f8")),
}

#: Where :func:`read_architecture` stops looking.
_HEAD_BYTES, _HEAD_ENTRIES = 65536, 32

_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class StringArray(Sequence[str]):
    """An array of strings inside a mapped file, found once and read on demand; bytes that are not UTF-8 become U+FFFD."""

    def __init__(self, data: memoryview, starts: np.ndarray, lengths: np.ndarray) -> None:
        self._data = data
        self._starts = starts
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.raw(index).decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        data = self._data
        for start, length in zip(self._starts.tolist(), self._lengths.tolist(), strict=True):
            yield str(data[start : start + length], "utf-8", "replace")

    def raw(self, index: int) -> bytes:
        """The bytes of one item."""
        start = int(self._starts[index])
        return bytes(self._data[start : start + int(self._lengths[index])])


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor record. ``shape`` is in PyTorch's order, the contiguous dimension last; ``data`` is a uint8 view of the map."""

    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    data: np.ndarray
    part: int
    offset: int

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


class _Cursor:
    """Reads forward through one mapped part; every read is checked against the end."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0
        self.path = path

    def fail(self, what: str, place: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(what, f"{self.path}: {place}")

    def take(self, count: int, place: str) -> int:
        """Start of the next ``count`` bytes."""
        if count > self.size - self.at:
            raise self.fail(
                f"the file ends at byte {self.size}, {count} bytes are needed at {self.at}; it is truncated", place
            )
        start = self.at
        self.at += count
        return start

    def scalar(self, kind: int, place: str) -> int | float:
        code = _SCALARS[kind][0]
        value: int | float = struct.unpack_from(code, self.data, self.take(struct.calcsize(code), place))[0]
        return value

    def count(self, place: str) -> int:
        return int(self.scalar(UINT64, place))

    def string(self, place: str, limit: int | None = None) -> bytes:
        length = self.count(f"{place}: length")
        if limit is not None and length > limit:
            raise self.fail(f"a name of {length} bytes; at most {limit} are allowed", place)
        start = self.take(length, place)
        return bytes(self.data[start : start + length])

    def name(self, place: str) -> str:
        raw = self.string(place, MAX_NAME_BYTES)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"the name {raw[:60]!r} is not UTF-8", place) from None

    def value(self, kind: int, place: str, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string(place).decode("utf-8", "replace")
        if kind == BOOL:
            return bool(self.scalar(kind, place))
        if kind in _SCALARS:
            return self.scalar(kind, place)
        if kind == ARRAY:
            return self._array(place, depth)
        raise self.fail(f"unknown metadata type {kind}", place)

    def _array(self, place: str, depth: int) -> Any:
        if depth >= MAX_NESTING:
            raise self.fail(f"arrays nested deeper than {MAX_NESTING}", place)
        kind = int(self.scalar(UINT32, f"{place}: element type"))
        count = self.count(f"{place}: length")
        left = self.size - self.at
        if kind in _SCALARS:
            dtype = _SCALARS[kind][1]
            if count > left // dtype.itemsize:
                raise self.fail(f"an array of {count} items does not fit the {left} bytes that are left", place)
            start = self.take(count * dtype.itemsize, place)
            array = np.frombuffer(self.data, dtype, count, start)
            return array.astype(bool) if kind == BOOL else array
        smallest = 8 if kind == STRING else 12
        if kind not in (STRING, ARRAY):
            raise self.fail(f"unknown element type {kind}", place)
        if count > left // smallest:
            raise self.fail(f"an array of {count} items does not fit the {left} bytes that are left", place)
        if kind == ARRAY:
            return [self._array(f"{place}[{i}]", depth + 1) for i in range(count)]
        # The hot loop of opening a file: a vocabulary has 150,000 tokens and as many merges.
        unpack, data, size, at = struct.Struct("<Q").unpack_from, self.data, self.size, self.at
        starts: list[int] = []
        for i in range(count):
            if size - at < 8:
                raise self.fail(f"the file ends inside string {i} of {count}; it is truncated", place)
            length = unpack(data, at)[0]
            at += 8
            starts.append(at)
            at += length
            if at > size:
                raise self.fail(f"string {i} of {count} claims {length} bytes, {size - at + length} are left", place)
        self.at = at
        # A string ends where the length of the next begins.
        first = np.array(starts, np.int64)
        return StringArray(data, first, np.append(first[1:] - 8, at) - first if count else first)


def _equal(value: Any, expected: int) -> bool:
    """Of metadata, which may be anything: an array would compare element by element."""
    return isinstance(value, int) and value == expected


class GGUFFile:
    """One model in GGUF, in one file or several.

    Attributes:
        path: the first part.
        paths: every part, in order.
        version: 2 or 3.
        metadata: key -> value: int, float, bool, str, numpy array, :class:`StringArray`, or a list of these for nested arrays.
            Of a split model, the first part's.
        stored_metadata: key -> type and value as the first part stores them, for copying.
        tensors: name -> :class:`GGUFTensor`, in file order.

    Raises:
        ModelNotFound: no such file, or a part of a split model is missing.
        UnsupportedCheckpoint: anything else that is wrong, with its place.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.stored_metadata: dict[str, memoryview] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self.version = 0
        self._maps: list[mmap.mmap] = []
        split = _SPLIT_NAME.fullmatch(self.path.name)
        if split and split["number"] != "00001":
            first = f"{split['stem']}-00001-of-{split['count']}.gguf"
            raise UnsupportedCheckpoint(
                f"this is part {int(split['number'])} of a split model; give the first part, {first}", str(path)
            )
        self.metadata = self._read_part(self.path, 0)
        number = self.metadata.get("split.no", 0)
        if not _equal(number, 0):
            raise UnsupportedCheckpoint(
                f"split.no is {number!r:.40}, so this is not the first part of the model; give the first part",
                str(path),
            )
        count = self._split_count()
        self.paths = [self.path]
        if count > 1:
            if split is None or int(split["count"]) != count:
                raise UnsupportedCheckpoint(
                    f"split.count is {count}, so the name must end in -00001-of-{count:05d}.gguf; rename it back",
                    str(path),
                )
            for number in range(2, count + 1):
                part = self.path.with_name(f"{split['stem']}-{number:05d}-of-{count:05d}.gguf")
                if not part.is_file():
                    raise ModelNotFound(str(self.path), f"part {number} of {count} is missing: {part}")
                metadata = self._read_part(part, number - 1)
                if not _equal(metadata.get("split.no"), number - 1) or not _equal(metadata.get("split.count"), count):
                    raise UnsupportedCheckpoint(f"this is not part {number} of {count} of {self.path.name}", str(part))
                self.paths.append(part)
            expected = self.metadata.get("split.tensors.count", len(self.tensors))
            if not _equal(expected, len(self.tensors)):
                raise UnsupportedCheckpoint(
                    f"the parts hold {len(self.tensors)} tensors, split.tensors.count says {expected!r:.40}", str(path)
                )

    def release(self, name: str) -> None:
        """Gives the mapped pages of a tensor back to the system; they are read again from the file when touched."""
        tensor = self.tensors[name]
        mapped_pages.release(self._maps[tensor.part], tensor.offset, tensor.nbytes)

    @property
    def nbytes(self) -> int:
        """Size of all parts."""
        return sum(len(m) for m in self._maps)

    def _split_count(self) -> int:
        count = self.metadata.get("split.count", 1)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_PARTS:
            raise UnsupportedCheckpoint(f"split.count: expected at most {MAX_PARTS}, got {count!r:.80}", str(self.path))
        return count

    def _read_part(self, path: Path, part: int) -> dict[str, Any]:
        """Maps a file and checks it whole; adds its tensors and returns its metadata."""
        try:
            with path.open("rb") as file:
                head = file.read(64)
                refuse_pointer(head, path)
                if head[:4] != MAGIC:
                    raise UnsupportedCheckpoint(
                        f"not a GGUF file: it begins with {head[:4]!r} instead of {MAGIC!r}", str(path)
                    )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelNotFound(str(path), "no such file") from None
        except (OSError, ValueError) as error:
            raise UnsupportedCheckpoint(f"it cannot be mapped: {error}", str(path)) from None
        self._maps.append(mapped)
        cursor = _Cursor(memoryview(mapped), path)
        cursor.at = 4
        version = int(cursor.scalar(UINT32, "version"))
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            fix = (
                "it is big endian; convert it on the machine that wrote it"
                if swapped in (2, 3)
                else "convert the model again"
            )
            raise cursor.fail(
                f"GGUF version {version if swapped not in (2, 3) else swapped} is not supported (2 and 3 are); {fix}",
                "version",
            )
        self.version = self.version or version
        num_tensors, num_metadata = cursor.count("tensor count"), cursor.count("metadata count")
        left = cursor.size - cursor.at
        # The smallest metadata entry takes 13 bytes, the smallest tensor record 24.
        if num_metadata > left // 13:
            raise cursor.fail(
                f"{num_metadata} metadata entries do not fit the {left} bytes that are left", "metadata count"
            )
        if num_tensors > left // 24:
            raise cursor.fail(f"{num_tensors} tensors do not fit the {left} bytes that are left", "tensor count")
        metadata: dict[str, Any] = {}
        for i in range(num_metadata):
            key = cursor.name(f"metadata entry {i}")
            if key in metadata:
                raise cursor.fail("the key stands twice", f"metadata {key!r}")
            start = cursor.at
            metadata[key] = cursor.value(int(cursor.scalar(UINT32, f"metadata {key!r}")), f"metadata {key!r}")
            if part == 0:
                self.stored_metadata[key] = cursor.data[start : cursor.at]
        self._read_tensors(cursor, metadata, num_tensors, part)
        return metadata

    def _read_tensors(self, cursor: _Cursor, metadata: Mapping[str, Any], num_tensors: int, part: int) -> None:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        sane = isinstance(alignment, int) and not isinstance(alignment, bool) and 8 <= alignment <= 2**20
        if not sane or alignment & (alignment - 1):
            raise cursor.fail(
                f"expected a power of two from 8 to 2^20, got {alignment!r:.40}", "metadata 'general.alignment'"
            )
        records: list[tuple[str, QuantType, tuple[int, ...], int, int]] = []
        names: set[str] = set()
        for i in range(num_tensors):
            name = cursor.name(f"tensor {i}")
            place = f"tensor {name!r}"
            if name in names or name in self.tensors:
                raise cursor.fail("the name stands twice", place)
            names.add(name)
            num_dimensions = int(cursor.scalar(UINT32, place))
            if not 1 <= num_dimensions <= MAX_DIMENSIONS:
                raise cursor.fail(f"expected 1 to {MAX_DIMENSIONS} dimensions, got {num_dimensions}", place)
            dimensions = [cursor.count(place) for _ in range(num_dimensions)]
            number = int(cursor.scalar(UINT32, place))
            offset = cursor.count(place)
            quant_type = types.by_number(number)
            if quant_type is None:
                raise cursor.fail(f"unknown tensor type {number}; a newer helexa may know it", place)
            elements = 1
            for d in dimensions:
                elements *= d
            if not 0 < elements <= 2**48:
                raise cursor.fail(f"dimensions {dimensions} make {elements} values", place)
            if dimensions[0] % quant_type.block_size:
                raise cursor.fail(
                    f"rows of {dimensions[0]} values are not a multiple of the {quant_type} block of {quant_type.block_size}",
                    place,
                )
            if offset % alignment:
                raise cursor.fail(f"offset {offset} is not a multiple of the alignment {alignment}", place)
            nbytes = elements // quant_type.block_size * quant_type.block_bytes
            records.append((name, quant_type, tuple(reversed(dimensions)), offset, nbytes))
        base = -(-cursor.at // alignment) * alignment
        for name, _, _, offset, nbytes in records:
            if base + offset + nbytes > cursor.size:
                raise cursor.fail(
                    f"its data ends at byte {base + offset + nbytes}, the file at {cursor.size}; it is truncated",
                    f"tensor {name!r}",
                )
        in_order = sorted(records, key=lambda record: record[3])
        for before, after in zip(in_order, in_order[1:], strict=False):
            if before[3] + before[4] > after[3]:
                raise cursor.fail(f"its data overlaps that of {before[0]!r}", f"tensor {after[0]!r}")
        for name, quant_type, shape, offset, nbytes in records:
            data = np.frombuffer(cursor.data, np.uint8, nbytes, base + offset)
            self.tensors[name] = GGUFTensor(name, quant_type, shape, data, part, base + offset)


def read_architecture(path: Path) -> str | None:
    """``general.architecture``, which writers put first, without reading the rest of the file; None when it is not near the front.

    Raises:
        UnsupportedCheckpoint: not a GGUF file, or truncated before that.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise UnsupportedCheckpoint(f"it cannot be read: {error}", str(path)) from None
    cursor = _Cursor(memoryview(head), path)
    if head[:4] != MAGIC:
        raise UnsupportedCheckpoint(f"not a GGUF file: it begins with {head[:4]!r} instead of {MAGIC!r}", str(path))
    cursor.at = 16  # magic, version, tensor count
    for i in range(min(cursor.count("metadata count"), _HEAD_ENTRIES)):
        key = cursor.name(f"metadata entry {i}")
        value = cursor.value(int(cursor.scalar(UINT32, f"metadata {key!r}")), f"metadata {key!r}")
        if key == "general.architecture":
            return value if isinstance(value, str) else None
    return None
