"""Weights quantised on loading are kept: the second load takes the file, and only ever the right and whole one."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helexa_engine import LLM, SamplingParams, env
from helexa_engine.errors import InvalidRequest, ModelDoesNotFit
from helexa_engine.presets import write_preset_gguf
from helexa_engine.runtime import quant_cache
from helexa_engine.runtime.quantize_model import quantize_model
from helexa_engine.testing.checkpoints import write_folder
from helexa_engine.weights.checkpoint import open_checkpoint
from helexa_engine.weights.gguf import GGUFFile

from ..weights.test_imatrix import squares, write

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LIMIT = 10**9


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hf") / "my model", "qwen35")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("HELEXA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "helexa" / "quantized"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Every file that was quantised."""
    files: list[Path] = []

    def counted(source: Path, destination: Path, *arguments: Any, **keywords: Any) -> object:
        files.append(destination)
        return quantize_model(source, destination, *arguments, **keywords)

    monkeypatch.setattr(quant_cache, "quantize_model", counted)
    yield files


def answer(model: Path, **settings: Any) -> list[int]:
    with LLM(model, quant="Q4_K_M", max_model_len=128, **settings) as llm:
        return list(llm.generate([1, 2, 3, 4, 5], GREEDY).token_ids)


def entry(source: Path, quant: str = "Q8_0", limit: int = LIMIT) -> Path | None:
    checkpoint = quant_cache.open_quantized(source, quant, name=source.name, limit=limit)
    return None if checkpoint is None else checkpoint.path


def test_the_second_load_quantises_nothing_and_answers_the_same(hybrid: Path, cache: Path, made: list[Path]) -> None:
    uncached = answer(hybrid, quant_cache=False)
    assert not made and not cache.exists()
    first = answer(hybrid)
    (path,) = cache.glob("*.gguf")
    assert made == [path] and path.name.startswith("my-model-Q4_K_M-")
    assert answer(hybrid) == first == uncached
    assert len(made) == 1


def test_an_importance_matrix_counts(hybrid: Path, cache: Path, tmp_path: Path, made: list[Path]) -> None:
    importances = write(tmp_path / "i.gguf", {"blk.0.ffn_gate.weight": (squares()[None] * 40, np.array([40.0]))})
    answer(hybrid)
    expected = answer(hybrid, imatrix=str(importances))
    plain, weighted = made
    assert answer(hybrid, imatrix=str(importances)) == expected and len(made) == 2
    assert GGUFFile(weighted).metadata["quantize.imatrix.file"] == "i.gguf"
    a, b = (GGUFFile(path).tensors for path in (plain, weighted))
    assert [name for name in a if (a[name].data != b[name].data).any()] == ["blk.0.ffn_gate.weight"]
    write(importances, {"blk.0.ffn_gate.weight": (squares()[None] * 20, np.array([40.0]))})
    answer(hybrid, imatrix=str(importances))
    assert len(set(made)) == 3


def test_an_importance_matrix_is_never_left_out_in_silence(
    hybrid: Path, cache: Path, tmp_path: Path, made: list[Path]
) -> None:
    importances = write(tmp_path / "i.gguf", {"blk.0.ffn_gate.weight": (squares()[None], np.ones(1))})
    with pytest.raises(InvalidRequest, match="imatrix: expected quant beside it, quant_cache on"):
        answer(hybrid, imatrix=str(importances), quant_cache=False)
    with pytest.raises(InvalidRequest, match="imatrix: expected quant beside it"):
        LLM(hybrid, imatrix=str(importances), max_model_len=128)
    with pytest.raises(InvalidRequest, match="cannot be quantised with .*none: .*No such file"):
        answer(hybrid, imatrix=str(tmp_path / "none"))
    (tmp_path / "text").write_text("no matrix")
    with pytest.raises(InvalidRequest, match="cannot be quantised with .*text: "):
        answer(hybrid, imatrix=str(tmp_path / "text"))
    write(importances, {"blk.0.ffn_gate.weight": (squares(64)[None], np.ones(1))})
    with pytest.raises(InvalidRequest, match="imatrix: .*computed from another model"):
        answer(hybrid, imatrix=str(importances))
    assert not list(cache.glob("*.gguf"))
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    with pytest.raises(InvalidRequest, match="imatrix: my model cannot be quantised with .*File exists"):
        answer(hybrid, imatrix=str(importances))


def test_the_key_tells_sources_and_mixes_apart(hybrid: Path, tmp_path: Path, made: list[Path]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(hybrid, copy)
    keys = {path.stem.rpartition("-")[2] for path in (entry(hybrid), entry(copy)) if path is not None}
    assert len(keys) == 1, "where it lies does not matter"
    assert entry(hybrid) != entry(hybrid, "Q4_0")
    before = entry(copy)
    status = (copy / "model.safetensors").stat()
    os.utime(copy / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert entry(copy) != before, "weights of another time"
    weights = copy / "model.safetensors"
    for at in (0, weights.stat().st_size // 2, -1):
        before, status = entry(copy), weights.stat()
        content = bytearray(weights.read_bytes())
        content[at] ^= 1
        found = quant_cache._key(copy, "Q8_0")
        weights.write_bytes(content)
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert quant_cache._key(copy, "Q8_0") != found, "of the same size and time"
        content[at] ^= 1
        weights.write_bytes(content)
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert entry(copy) == before
    before = entry(copy)
    (copy / "README.md").write_text("not part of the model")
    count = len(made)
    assert entry(copy) == before and len(made) == count


@pytest.mark.parametrize("damage", ["truncated", "changed", "record gone", "record cut"])
def test_a_damaged_entry_is_made_again_and_said(
    hybrid: Path, made: list[Path], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = entry(hybrid)
    assert path is not None
    whole, record = path.read_bytes(), path.with_suffix(".json")
    status = path.stat()
    if damage == "truncated":
        os.truncate(path, len(whole) // 2)
    elif damage == "changed":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "record gone":
        record.unlink()
    else:
        record.write_text(record.read_text()[:5])
    if damage in ("truncated", "changed"):  # as a disk does it: the time stays
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with caplog.at_level(logging.WARNING):
        assert entry(hybrid) == path
    assert "is damaged and is made again" in caplog.text
    assert len(made) == 2 and path.read_bytes() == whole


def test_two_at_once_make_it_once(hybrid: Path, made: list[Path]) -> None:
    found: list[Path | None] = []
    threads = [threading.Thread(target=lambda: found.append(entry(hybrid))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(set(found)) == 1 and found[0] is not None


def test_the_least_recently_used_makes_room(hybrid: Path, cache: Path) -> None:
    first, second = entry(hybrid, "Q8_0"), entry(hybrid, "Q4_0")
    assert first is not None and second is not None
    for path, used in ((first, 2_000_000_000), (second, 1_000_000_000)):
        os.utime(path.with_suffix(".json"), (used, used))
    third = entry(hybrid, "Q5_K_M", limit=first.stat().st_size + 2 * second.stat().st_size)
    assert {p.name for p in cache.glob("*.gguf")} == {p.name for p in (first, third) if p is not None}
    assert not second.with_suffix(".json").exists()
    fourth = entry(hybrid, "Q6_K", limit=0)
    assert list(cache.glob("*.gguf")) == [fourth], "what is in use stays"


def test_without_room_it_quantises_in_memory_and_says_so(
    hybrid: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise ModelDoesNotFit(2, 1, "the disk")

    monkeypatch.setattr(quant_cache, "quantize_model", full)
    with caplog.at_level(logging.WARNING):
        assert answer(hybrid)
    assert "is not cached, so every load quantises again: the model needs" in caplog.text
    assert not list(cache.glob("*.gguf"))
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    assert entry(hybrid) is None


def test_a_disk_that_fills_up_loses_nothing(
    hybrid: Path, cache: Path, made: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the size of files breaks a write in the middle, as a disk does that another program fills."""
    kept = entry(hybrid, "Q8_0")
    expected = answer(hybrid, quant_cache=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with caplog.at_level(logging.WARNING):
            got = answer(hybrid)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert got == expected
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "my model in Q4_K_M is not cached, so every load quantises again: [Errno 27] File too large"
    ]
    assert kept is not None and sorted(p.suffix for p in cache.iterdir()) == [".gguf", ".json", ".lock", ".lock"]
    assert entry(hybrid, "Q8_0") == kept and made.count(kept) == 1


def test_an_entry_is_used_where_nothing_can_be_written(
    hybrid: Path, cache: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = entry(hybrid)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(quant_cache.os, "utime", refused)
    monkeypatch.setattr(quant_cache, "_locked", refused)
    with caplog.at_level(logging.WARNING):
        assert entry(hybrid) == path
        assert not caplog.records
        assert entry(hybrid, "Q4_0") is None
    assert [r.getMessage() for r in caplog.records] == [
        "my model in Q4_0 is not cached, so every load quantises again: [Errno 13] Permission denied"
    ]
    assert made == [path]


def test_what_a_killed_process_left_is_swept(hybrid: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    dead, living = cache / "dead-Q8_0-1.gguf.partial", cache / "living-Q8_0-2.gguf.partial"
    dead.write_bytes(b"half")
    living.write_bytes(b"half")
    with quant_cache._locked(cache / "living-Q8_0-2.lock"):
        entry(hybrid)
        assert living.exists() and not dead.exists()
    entry(hybrid, "Q4_0")
    assert not living.exists()


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.cache_folder() == tmp_path / "xdg" / "helexa"
    monkeypatch.setenv("HELEXA_CACHE", str(tmp_path / "other"))
    assert quant_cache.folder() == tmp_path / "other" / "quantized"
    monkeypatch.delenv("HELEXA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert env.cache_folder() == Path.home() / ".cache" / "helexa"


def test_the_limit_is_a_size(hybrid: Path) -> None:
    assert quant_cache.limit_bytes("1.5GiB") == 3 * 2**29
    for wrong in ("much", "-1", "GiB"):
        with pytest.raises(InvalidRequest, match="quant_cache_limit"):
            quant_cache.limit_bytes(wrong)
    with pytest.raises(InvalidRequest, match="quant_cache_limit"):
        answer(hybrid, quant_cache_limit="much")


def test_a_file_that_is_partly_quantised_is_not_cached(tmp_path: Path) -> None:
    write_preset_gguf(tmp_path / "q.gguf", "qwen3-tiny", "Q8_0")
    write_preset_gguf(tmp_path / "f.gguf", "qwen3-tiny", "F16")
    assert not quant_cache.can_hold(open_checkpoint(tmp_path / "q.gguf"))
    assert quant_cache.can_hold(open_checkpoint(tmp_path / "f.gguf"))
    made = entry(tmp_path / "f.gguf")
    assert made is not None and made == entry(tmp_path / "f.gguf")
