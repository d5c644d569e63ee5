"""The GGUF reader: against the gguf package where a file is good, and only ever :class:`UnsupportedCheckpoint` where it is not."""

from __future__ import annotations

import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helexa_engine.errors import HelexaError, ModelNotFound, UnsupportedCheckpoint
from helexa_engine.quant.types import QUANT_TYPES
from helexa_engine.weights.gguf import GGUFFile, StringArray

from .conftest import write_gguf


def string(text: bytes | str) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def record(name: str, dimensions: list[int], number: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, number, offset)


def build(entries: list[bytes], records: list[bytes], data: bytes = b"", version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(records), len(entries)) + b"".join(entries + records)
    return head + b"\0" * (-len(head) % 32) + data


def refuse(tmp_path: Path, content: bytes, *words: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint) as caught:
        GGUFFile(path)
    for word in ("bad.gguf", *words):
        assert word in str(caught.value), str(caught.value)


def test_agrees_with_the_gguf_package(gguf_file: Path) -> None:
    ours, theirs = GGUFFile(gguf_file), gguf.GGUFReader(gguf_file)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.quant_type.number == tensor.tensor_type
        assert list(reversed(mine.shape)) == tensor.shape.tolist()
        assert mine.data.tobytes() == tensor.data.tobytes()
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert (list(value) if isinstance(value, StringArray) else value) == field.contents()


@pytest.mark.parametrize("version", [2, 3])
def test_every_metadata_type(tmp_path: Path, version: int) -> None:
    scalars = {
        "u8": (0, "<B", 200), "i8": (1, "<b", -5), "u16": (2, "<H", 60000), "i16": (3, "<h", -300), "u32": (4, "<I", 2**31),
        "i32": (5, "<i", -7), "f32": (6, "<f", 0.5), "bool": (7, "<B", 1), "u64": (10, "<Q", 2**63), "i64": (11, "<q", -(2**40)),
        "f64": (12, "<d", 0.1),
    }  # fmt: skip
    entries = [entry(key, kind, struct.pack(code, value)) for key, (kind, code, value) in scalars.items()]
    entries.append(entry("text", 8, string("héllo")))
    entries.append(entry("not_utf8", 8, string(b"\xff")))
    entries.append(entry("strings", 9, struct.pack("<IQ", 8, 2) + string("a") + string("")))
    entries.append(entry("bools", 9, struct.pack("<IQ3B", 7, 3, 1, 0, 1)))
    nested = struct.pack("<IQ", 9, 2) + struct.pack("<IQ2i", 5, 2, -1, 7) + struct.pack("<IQ", 8, 1) + string("z")
    entries.append(entry("nested", 9, nested))
    path = tmp_path / "all.gguf"
    path.write_bytes(build(entries, [], version=version))
    metadata = GGUFFile(path).metadata
    for key, (_, _, value) in scalars.items():
        assert metadata[key] == value
    assert metadata["bool"] is True
    assert metadata["text"] == "héllo" and metadata["not_utf8"] == "\ufffd"
    assert (
        list(metadata["strings"]) == ["a", ""] and metadata["strings"][0] == "a" and metadata["strings"].raw(1) == b""
    )
    assert metadata["bools"].tolist() == [True, False, True]
    assert metadata["nested"][0].tolist() == [-1, 7] and list(metadata["nested"][1]) == ["z"]


def test_every_tensor_type(tmp_path: Path) -> None:
    records, offset, expected = [], 0, {}
    for quant_type in QUANT_TYPES:
        nbytes = 2 * quant_type.block_bytes
        records.append(record(quant_type.name, [quant_type.block_size, 2], quant_type.number, offset))
        expected[quant_type.name] = (offset, nbytes)
        offset += -(-nbytes // 32) * 32
    data = np.random.default_rng(0).integers(0, 256, offset, np.uint8).tobytes()
    path = tmp_path / "types.gguf"
    path.write_bytes(build([], records, data))
    tensors = GGUFFile(path).tensors
    for quant_type in QUANT_TYPES:
        start, nbytes = expected[quant_type.name]
        assert tensors[quant_type.name].quant_type is quant_type
        assert tensors[quant_type.name].shape == (2, quant_type.block_size)
        assert tensors[quant_type.name].data.tobytes() == data[start : start + nbytes]


def test_types_cover_the_gguf_package() -> None:
    assert {t.number for t in QUANT_TYPES} >= {int(t) for t in gguf.GGMLQuantizationType}


def test_split_files_read_as_one(hf_model, gguf_file: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", hf_model, split=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    whole, split = GGUFFile(gguf_file), GGUFFile(parts[0])
    assert set(split.tensors) == set(whole.tensors)
    for name, tensor in split.tensors.items():
        assert tensor.data.tobytes() == whole.tensors[name].data.tobytes()
        split.release(name)
    with pytest.raises(UnsupportedCheckpoint, match="give the first part"):
        GGUFFile(parts[1])
    renamed = tmp_path / "other.gguf"
    shutil.copy(parts[0], renamed)
    with pytest.raises(UnsupportedCheckpoint, match="rename it back"):
        GGUFFile(renamed)
    parts[-1].unlink()
    with pytest.raises(ModelNotFound, match=parts[-1].name):
        GGUFFile(parts[0])


def test_a_large_vocabulary_opens_quickly(tmp_path: Path) -> None:
    tokens = b"".join(string(f"token{i}") for i in range(152_000))
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(build([entry("tokens", 9, struct.pack("<IQ", 8, 152_000) + tokens)], []))
    start = time.perf_counter()
    metadata = GGUFFile(path).metadata
    assert time.perf_counter() - start < 2.0  # about 0.1 s on an idle machine; the bound only catches a change of order
    assert metadata["tokens"][151_999] == "token151999"


def test_released_pages_read_again(gguf_file: Path) -> None:
    file = GGUFFile(gguf_file)
    before = {name: tensor.data.tobytes() for name, tensor in file.tensors.items()}
    for name in file.tensors:
        file.release(name)
    assert {name: tensor.data.tobytes() for name, tensor in file.tensors.items()} == before


GOOD = record("t", [4], 0, 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["not a GGUF"]),
        (b"PK\3\4" + bytes(60), ["not a GGUF"]),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), ["version 1"]),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), ["big endian"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), ["tensor count"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), ["metadata count"]),
        (build([entry("k", 8, struct.pack("<Q", 2**62))], []), ["'k'", "truncated"]),
        (build([entry("k", 9, struct.pack("<IQ", 8, 2**61))], []), ["'k'", "items"]),
        (build([entry("k", 9, struct.pack("<IQ", 4, 2**61))], []), ["'k'", "items"]),
        (build([entry("k", 77, b"")], []), ["unknown metadata type 77"]),
        (build([entry("k", 9, struct.pack("<IQ", 99, 0))], []), ["unknown element type 99"]),
        (build([entry("k", 9, struct.pack("<IQ", 9, 1) * 9)], [], bytes(256)), ["nested deeper"]),
        (build([entry("k", 0, b"\1"), entry("k", 0, b"\1")], []), ["stands twice"]),
        (build([string(b"\xff\xfe") + struct.pack("<IB", 0, 1)], []), ["not UTF-8"]),
        (build([entry("general.alignment", 4, struct.pack("<I", 24))], []), ["general.alignment"]),
        (build([], [GOOD, GOOD], bytes(64)), ["'t'", "stands twice"]),
        (build([], [record("t", [4], 1234)], bytes(64)), ["'t'", "unknown tensor type 1234"]),
        (build([], [record("t", [33], 8)], bytes(64)), ["'t'", "block of 32"]),
        (build([], [record("t", [2**40, 2**40])], bytes(64)), ["'t'", "dimensions"]),
        (build([], [record("t", [0])], bytes(64)), ["'t'", "dimensions"]),
        (build([], [record("t", [1, 1, 1, 1, 1])], bytes(64)), ["'t'", "5"]),
        (build([], [record("t", [4], 0, 16)], bytes(64)), ["'t'", "alignment"]),
        (build([], [record("t", [4], 0, 2**40)], bytes(64)), ["'t'", "truncated"]),
        (build([], [record("t", [4], 0, 2**63)], bytes(64)), ["'t'", "truncated"]),
        (build([], [record("a", [16], 0, 0), record("b", [4], 0, 32)], bytes(64)), ["'b'", "overlaps", "'a'"]),
        (build([entry("split.count", 2, struct.pack("<H", 3))], []), ["split.count", "rename"]),
        (build([entry("split.count", 8, string("x"))], []), ["split.count"]),
    ],
)  # fmt: skip
def test_malformed(tmp_path: Path, content: bytes, words: list[str]) -> None:
    refuse(tmp_path, content, *words)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        GGUFFile(tmp_path / "nowhere.gguf")


def test_truncation_at_every_byte_of_the_header(gguf_file: Path, tmp_path: Path) -> None:
    content = gguf_file.read_bytes()
    first = min(t.offset for t in GGUFFile(gguf_file).tensors.values())
    path = tmp_path / "cut.gguf"
    for cut in [*range(0, first, 7), *range(first, len(content), 4099), len(content) - 1]:
        path.write_bytes(content[:cut])
        with pytest.raises(UnsupportedCheckpoint):
            GGUFFile(path)


@st.composite
def mutations(draw: st.DrawFn, size: int) -> list[tuple[int, bytes]]:
    # Most of a file is data that nothing can be wrong with, so most edits go to the header.
    place = st.one_of(st.integers(0, min(size, 4000) - 1), st.integers(0, size - 1))
    edit = st.one_of(
        st.binary(min_size=1, max_size=16),
        st.sampled_from([2**64 - 1, 2**63, 2**32, 2**31 - 1, 0, 1, 255]).map(lambda n: struct.pack("<Q", n)),
    )
    return draw(st.lists(st.tuples(place, edit), min_size=1, max_size=4))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_never_break_out(data: st.DataObject, gguf_file: Path, tmp_path: Path) -> None:
    content = bytearray(gguf_file.read_bytes())
    for at, edit in data.draw(mutations(len(content))):
        content[at : at + len(edit)] = edit
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content[:cut])
    tracemalloc.start()
    start = time.perf_counter()
    try:
        for tensor in GGUFFile(path).tensors.values():
            tensor.data.sum()
    except HelexaError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 * len(content) + 2**20
    assert time.perf_counter() - start < 5
