"""The prefix cache in a file: what is restored changes no answer, and no fault of a disk loses the old file or the engine."""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine import LLM, SamplingParams
from helexa_engine.cache.prefix_cache import Node, PrefixCache
from helexa_engine.errors import InvalidRequest
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import types
from helexa_engine.runtime import model_fingerprint, saved_prefixes
from helexa_engine.runtime.engine import Engine
from helexa_engine.runtime.engine_thread import EngineThread
from helexa_engine.runtime.saved_prefixes import SavedPrefixes
from helexa_engine.testing.checkpoints import write_folder, write_gguf, write_qwen3_folder

from .test_engine_thread import Outputs
from .test_prefix_reuse import PAGE, answer, both_kinds, cached_tokens, check, make_engine, request, run, tokens

FINGERPRINT = {"weights": "toy", "kv_dtype": "float32"}
LIMIT = 1 << 30
TRUNK = tokens(70)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "toy.prefixes"


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "helexa_engine")
    return caplog


def prefixes_of(engine: Engine) -> PrefixCache:
    assert engine.scheduler.prefixes is not None
    return engine.scheduler.prefixes


def keep_in(engine: Engine, path: Path, **changes: Any) -> SavedPrefixes:
    """Lets the engine keep its cache in ``path``, and restores what is there."""
    arguments = {"fingerprint": FINGERPRINT, "limit": LIMIT} | changes
    engine.saved = SavedPrefixes(path, prefixes=prefixes_of(engine), runner=engine.runner, **arguments)
    engine.saved.restore()
    check(engine)
    return engine.saved


def talked(states: bool, **changes: Any) -> Engine:
    """An engine whose cache has a trunk with three branches and another prompt; the second branch was used last."""
    engine = make_engine(states, num_snapshots=32, **changes)
    for name in "abc":
        run(engine, request(name, TRUNK + tokens(30, ord(name)), last=70))
    run(engine, request("other", tokens(50, 9)))
    run(engine, request("b", TRUNK + tokens(30, ord("b")), last=70))
    return engine


def saved_from(engine: Engine, path: Path, **changes: Any) -> None:
    keep_in(engine, path, **changes)
    engine.close()


def contents(cache: PrefixCache) -> dict[tuple[bytes, ...], bool]:
    """The way to every node, and whether it has a snapshot."""
    found: dict[tuple[bytes, ...], bool] = {}
    nodes: list[tuple[Node, tuple[bytes, ...]]] = [(cache.root, ())]
    for node, way in nodes:
        nodes.extend((child, (*way, key)) for key, child in node.children.items())
        found[way] = node.snapshot is not None
    return found


def worth_keeping(cache: PrefixCache) -> dict[tuple[bytes, ...], bool]:
    """:func:`contents`, with states only what a sequence can resume from."""
    found = contents(cache)
    if cache.snapshots is None:
        return found
    return {way: has for way, has in found.items() if any(found[w] for w in found if w[: len(way)] == way) or not way}


PROMPTS = {name: TRUNK + tokens(30, ord(name)) for name in "abc"}
PROMPTS |= {"other": tokens(50, 9), "new": TRUNK + tokens(40, 77)}


@functools.cache
def cold_answer(states: bool, name: str) -> list[tuple[Any, Any]]:
    return answer(run(make_engine(states, cached=False), request(name, PROMPTS[name])), name)


def answers_as_cold(engine: Engine, states: bool) -> list[int]:
    """Asks for every branch, and for one that was never seen; each answer is that of an engine without a cache. The tokens cached."""
    counts = []
    for name, prompt in PROMPTS.items():
        got = run(engine, request(name, prompt, last=70))
        assert answer(got, name) == cold_answer(states, name)
        counts.append(cached_tokens(got, name))
    return counts


@functools.cache
def a_file(states: bool) -> tuple[bytes, int]:
    """What :func:`talked` leaves, and how many nodes of the tree are in it."""
    engine = talked(states)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.prefixes"
        saved_from(engine, path)
        return path.read_bytes(), len(prefixes_of(engine).by_last_use())


@both_kinds
def test_a_restored_cache_answers_as_the_one_before_and_as_a_cold_run(states: bool, path: Path) -> None:
    before = talked(states)
    expected = worth_keeping(prefixes_of(before))
    saved_from(before, path)
    after = make_engine(states, num_snapshots=32)
    keep_in(after, path)
    assert contents(prefixes_of(after)) == expected
    assert after.scheduler.pool.num_used == 0, "restored pages are free space like all cached ones"
    assert answers_as_cold(after, states) == answers_as_cold(talked(states), states)
    assert answers_as_cold(after, states)[:4] == [96, 96, 96, 48]


@both_kinds
def test_a_cache_survives_any_number_of_restarts(states: bool, path: Path) -> None:
    saved_from(talked(states), path)
    first = path.read_bytes()
    for i in range(3):
        engine = make_engine(states, num_snapshots=32)
        keep_in(engine, path)
        if i < 2:
            run(engine, request("more", tokens(40, 200 + i)))
        engine.close()
    engine = make_engine(states, num_snapshots=32)
    keep_in(engine, path)
    assert path.read_bytes() != first
    assert [cached_tokens(run(engine, request("x", tokens(40, 200 + i))), "x") for i in range(2)] == [32, 32]
    assert answers_as_cold(engine, states)[:4] == [96, 96, 96, 48]


@both_kinds
def test_what_is_saved_again_unchanged_is_the_same_file(states: bool, path: Path) -> None:
    saved_from(talked(states), path)
    first, engine = path.read_bytes(), make_engine(states, num_snapshots=32)
    saved = keep_in(engine, path)
    saved.save(lambda: False)
    assert path.read_bytes() == first, "order, tokens, pages and snapshots"


def test_the_least_recently_used_still_goes_first_after_a_restart(path: Path) -> None:
    engine = make_engine(False)
    for seed in (1, 2, 3):
        run(engine, request("x", tokens(24, seed), max_tokens=1))
    run(engine, request("x", tokens(24, 1), max_tokens=1))
    saved_from(engine, path)
    engine = make_engine(False)
    keep_in(engine, path)
    run(engine, request("x", tokens(24, 4), max_tokens=1))
    cache = prefixes_of(engine)
    left = []
    while engine.scheduler.pool.num_idle:
        left.append({key for (key,) in (way for way in contents(cache) if len(way) == 1)})
        cache.evict(3)
    assert [len(keys) for keys in left] == [4, 3, 2, 1]
    first_pages = {seed: list(contents_of(tokens(PAGE, seed))) for seed in (1, 2, 3, 4)}
    gone = [(before - after).pop() for before, after in zip(left, [*left[1:], set()], strict=True)]
    assert gone == [first_pages[seed][0] for seed in (2, 3, 1, 4)]


def contents_of(token_ids: list[int]) -> Iterator[bytes]:
    from helexa_engine.cache.prefix_cache import extend_keys

    keys: list[bytes] = []
    extend_keys(keys, token_ids, len(token_ids) // PAGE, PAGE)
    return iter(keys)


@both_kinds
def test_a_smaller_pool_gets_what_was_used_last(states: bool, path: Path) -> None:
    saved_from(talked(states), path)
    engine = make_engine(states, num_snapshots=32, num_pages=14)
    keep_in(engine, path)
    assert engine.scheduler.pool.num_free == 0 and engine.scheduler.pool.num_available == 14
    r = request("b", TRUNK + tokens(30, ord("b")), last=70)
    got = run(engine, r)
    assert cached_tokens(got, "b") == 96
    assert answer(got, "b") == answer(run(make_engine(states, cached=False), r), "b")


def test_fewer_slots_get_the_snapshots_that_were_used_last(path: Path) -> None:
    saved_from(talked(True), path)
    engine = make_engine(True, num_snapshots=1)
    keep_in(engine, path)
    assert engine.stats().snapshots_used == 1
    got = run(engine, request("b", TRUNK + tokens(30, ord("b")), last=70))
    assert cached_tokens(got, "b") == 96, "where it resumed the last time"


@both_kinds
def test_the_file_keeps_to_its_limit_and_to_what_was_used_last(states: bool, path: Path) -> None:
    saved_from(talked(states), path)
    whole = path.stat().st_size
    for limit in (whole, whole - 1, whole // 2, 2000, 600):
        saved_from(talked(states), path, limit=limit)
        assert path.stat().st_size <= limit
        assert (path.stat().st_size == whole) == (limit == whole)
    saved_from(talked(states), path, limit=whole // 2)
    engine = make_engine(states, num_snapshots=32)
    keep_in(engine, path)
    counts = answers_as_cold(engine, states)
    assert counts[1] == 96 and sum(counts) < 96 * 3 + 48 + 64


def test_only_what_resumes_is_saved_of_a_hybrid(path: Path) -> None:
    """Two slots: the snapshots of the first prompts are gone, and with them what their pages are good for."""
    engine = make_engine(True, num_snapshots=2)
    for name in "abc":
        run(engine, request(name, TRUNK + tokens(30, ord(name))))
    pages = engine.stats().kv_pages_cached
    saved_from(engine, path)
    engine = make_engine(True, num_snapshots=2)
    keep_in(engine, path)
    stats = engine.stats()
    assert (stats.kv_pages_cached, stats.snapshots_used) == (12, 2) and pages > 12
    got = run(engine, request("c", PROMPTS["c"]))
    assert cached_tokens(got, "c") == 96 and answer(got, "c") == cold_answer(True, "c")


# -- Files that are not what they should be


@both_kinds
@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_gives_what_is_whole(states: bool, share: float, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("cut") / "toy.prefixes"
    data, num_nodes = a_file(states)
    path.write_bytes(data[: int(share * len(data))])
    path.chmod(0o600)
    engine = make_engine(states, num_snapshots=32)
    keep_in(engine, path)
    assert engine.scheduler.pool.num_used == 0 and (engine.stats().kv_pages_cached < num_nodes or share > 0.99)
    answers_as_cold(engine, states)


@both_kinds
@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_no_wrong_answer(states: bool, share: float, bit: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("bit") / "toy.prefixes"
    whole, num_nodes = a_file(states)
    data = bytearray(whole)
    data[int(share * len(data))] ^= 1 << bit
    path.write_bytes(data)
    path.chmod(0o600)
    engine = make_engine(states, num_snapshots=32)
    keep_in(engine, path)
    assert engine.scheduler.pool.num_used == 0
    assert engine.stats().kv_pages_cached < num_nodes or share > 0.99
    answers_as_cold(engine, states)


def test_a_damaged_record_is_named_and_ends_the_reading(path: Path, logged: pytest.LogCaptureFixture) -> None:
    saved_from(talked(False), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    engine = make_engine(False)
    keep_in(engine, path)
    (message,) = [r.getMessage() for r in logged.records if r.levelno == logging.WARNING]
    restored = len(contents(prefixes_of(engine))) - 1
    assert message.startswith(
        f"restored {restored} pages of prefixes from {path} and no more: record {restored + 1} is"
    )
    assert restored > 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "it is no file of saved prefixes"),
        (b"GGUF" * 100, "it is no file of saved prefixes"),
        (saved_prefixes.MAGIC + b"\xff\xff\xff\xff" + b"x" * 100, "its header is damaged"),
        (saved_prefixes.MAGIC, "it is no file of saved prefixes"),
    ],
)
def test_another_kind_of_file_is_refused(
    text: bytes, reason: str, path: Path, logged: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(text)
    engine = make_engine(False)
    keep_in(engine, path)
    assert f"the prefixes saved in {path} are not used, the cache begins empty: {reason}" in logged.text
    assert len(contents(prefixes_of(engine))) == 1
    answers_as_cold(engine, False)
    engine.close()
    assert len(path.read_bytes()) > len(text), "replaced by what was computed since"


def test_a_file_of_another_model_or_setting_is_refused_by_its_name(
    path: Path, logged: pytest.LogCaptureFixture
) -> None:
    saved_from(talked(False), path)
    before = path.read_bytes()
    engine = make_engine(False)
    keep_in(engine, path, fingerprint=FINGERPRINT | {"kv_dtype": "float16"})
    assert "another model, version or setting: kv_dtype was float32 and is float16" in logged.text
    assert len(contents(prefixes_of(engine))) == 1
    engine.close()
    assert path.read_bytes() == before, "nothing was computed, so nothing is written over it"


def test_pages_of_another_size_are_refused(path: Path, logged: pytest.LogCaptureFixture) -> None:
    saved_from(talked(True), path)
    keep_in(make_engine(False), path)
    assert "its pages have another size" in logged.text


def test_a_file_that_others_may_write_to_is_refused(path: Path, logged: pytest.LogCaptureFixture) -> None:
    saved_from(talked(False), path)
    path.chmod(0o622)
    engine = make_engine(False)
    keep_in(engine, path)
    assert "expected a file that is ours and that nobody else may write to" in logged.text
    assert len(contents(prefixes_of(engine))) == 1


# -- Faults while saving


def test_the_files_are_readable_by_their_owner_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        saved_from(talked(False), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sorted(p.name for p in path.parent.iterdir()) == ["toy.prefixes", "toy.prefixes.lock"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fault", ["file size", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_the_engine(
    fault: str, path: Path, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    saved_from(talked(False), path)
    old, engine = path.read_bytes(), make_engine(False)
    saved = keep_in(engine, path)
    run(engine, request("new", tokens(40, 55)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if fault == "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
        else:
            patch.setattr(os, fault, full_disk)
        try:
            saved.save(lambda: False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"prefixes are not saved, and {path} stays as it was: " in logged.text
    assert path.read_bytes() == old
    assert sorted(p.name for p in path.parent.iterdir()) == ["toy.prefixes", "toy.prefixes.lock"]
    assert saved.seconds_to_save() is None, "not again before there is something new"
    answers_as_cold(engine, False)
    assert saved.seconds_to_save() is not None
    engine.close()
    engine = make_engine(False)
    keep_in(engine, path)
    assert cached_tokens(run(engine, request("new", tokens(40, 55))), "new") == 32


def test_a_folder_that_cannot_be_written_to_costs_a_warning(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    engine = make_engine(False)
    saved = keep_in(engine, tmp_path / "file" / "toy.prefixes")
    answers_as_cold(engine, False)
    assert saved.seconds_to_save() is None
    engine.close()
    assert logged.text.count("prefixes are not saved: ") == 1


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tests.engine.runtime.test_saved_prefixes import keep_in, make_engine, request, run, tokens
    engine = make_engine(False)
    saved = keep_in(engine, Path(sys.argv[1]))
    run(engine, request("new", tokens(40, 55)))
    written = []
    def kill():
        written.append(1)
        if len(written) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    saved.save(kill)
"""


def test_kill_in_the_middle_of_a_save_leaves_the_old_file(path: Path) -> None:
    saved_from(talked(False), path)
    old = path.read_bytes()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(path)],
        env=environment, cwd=Path(__file__).resolve().parents[3], timeout=120,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    partial = path.with_name("toy.prefixes.partial")
    assert partial.exists() and path.read_bytes() == old
    engine = make_engine(False)
    keep_in(engine, path)
    assert not partial.exists(), "the next one clears up"
    assert answers_as_cold(engine, False)[:4] == [96, 96, 96, 48]


def test_the_second_process_restores_and_saves_nothing(path: Path, logged: pytest.LogCaptureFixture) -> None:
    saved_from(talked(False), path)
    old, first, second = path.read_bytes(), make_engine(False), make_engine(False)
    keep_in(first, path)
    other = keep_in(second, path)
    assert f"{path} belongs to another process: this one saves no prefixes" in logged.text
    assert answers_as_cold(second, False)[:4] == [96, 96, 96, 48]
    assert other.seconds_to_save() is None
    second.close()
    assert path.read_bytes() == old
    answers_as_cold(first, False)
    first.close()
    assert path.read_bytes() != old
    keep_in(make_engine(False), path)
    assert logged.text.count("belongs to another process") == 1, "closing gives the lock back"


# -- When it is saved


class Clock:
    """Seconds that pass when the test says so, or by ``tick`` with every look."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 100.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def test_it_is_saved_after_idle_time_if_there_is_something_new_and_a_small_share_of_the_time(path: Path) -> None:
    engine, clock = make_engine(False), Clock()
    saved = keep_in(engine, path, clock=clock)
    assert engine.seconds_to_save() is None
    run(engine, request("a", tokens(40)))
    assert engine.seconds_to_save() == saved_prefixes.IDLE_SECONDS
    clock.tick = 0.5
    engine.save(lambda: False)
    clock.tick = 0.0
    assert path.exists() and engine.seconds_to_save() is None
    run(engine, request("a", tokens(40)))
    assert engine.seconds_to_save() is None, "nothing new"
    run(engine, request("b", tokens(40, 1)))
    wait = engine.seconds_to_save()
    assert wait is not None and 10 <= wait <= 30, "half a second or a little more, twenty times"
    clock.now += 100
    assert saved.seconds_to_save() == saved_prefixes.IDLE_SECONDS


def test_a_request_that_comes_stops_the_saving(path: Path) -> None:
    saved_from(talked(False), path)
    old, engine = path.read_bytes(), make_engine(False)
    saved = keep_in(engine, path)
    run(engine, request("new", tokens(40, 55)))
    asked: list[int] = []
    saved.save(lambda: asked.append(1) or len(asked) > 3)  # type: ignore[func-returns-value]
    assert len(asked) == 4 and path.read_bytes() == old
    assert sorted(p.name for p in path.parent.iterdir()) == ["toy.prefixes", "toy.prefixes.lock"]
    assert saved.seconds_to_save() is not None, "it is tried again"


def test_closing_takes_bounded_time_and_keeps_what_was_used_last(path: Path, logged: pytest.LogCaptureFixture) -> None:
    engine = talked(False)
    keep_in(engine, path, clock=Clock(tick=saved_prefixes.CLOSE_SECONDS / 15))
    engine.close()
    assert "saved 14 of 30 pages of prefixes" in logged.text
    engine = make_engine(False)
    keep_in(engine, path)
    counts = answers_as_cold(engine, False)
    assert counts[1] == 96 and counts[3] < 48


def test_a_thread_saves_while_it_is_idle_and_again_when_it_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_prefixes, "IDLE_SECONDS", 0.01)
    engine = make_engine(False)
    keep_in(engine, path)
    outputs = Outputs()
    thread = EngineThread(engine, outputs)
    for seed in (1, 2):
        size = path.stat().st_size if path.exists() else 0
        thread.submit(request(str(seed), tokens(40, seed)))
        outputs.until_end(str(seed))
        deadline = time.monotonic() + 30
        while not path.exists() or path.stat().st_size == size:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    monkeypatch.setattr(saved_prefixes, "IDLE_SECONDS", 1e6)
    thread.submit(request("last", tokens(40, 3)))
    outputs.until_end("last")
    assert thread.close(30)
    engine = make_engine(False)
    keep_in(engine, path)
    assert [cached_tokens(run(engine, request("x", tokens(40, seed))), "x") for seed in (1, 2, 3)] == [32, 32, 32]


def test_nothing_is_saved_after_a_fault(path: Path) -> None:
    engine = talked(False)
    keep_in(engine, path)
    outputs = Outputs()
    thread = EngineThread(engine, outputs)

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    engine.runner.forward = broken  # type: ignore[method-assign, assignment]
    thread.submit(request("x", tokens(40, 3)))
    outputs.until_end("x")
    thread.close(30)
    assert not path.exists()
    keep_in(make_engine(False), path).close()  # and the lock is free


# -- With models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=["safetensors", "Q8_0", "hybrid"])
def model(request: pytest.FixtureRequest, folder: Path) -> Path:
    if request.param == "safetensors":
        return folder
    if request.param == "hybrid":
        return write_folder(folder.parent / "qwen35", "qwen35")
    return write_gguf(folder, folder.parent / "tiny-Q8_0.gguf", types.Q8_0)


ANSWER = SamplingParams(temperature=1.0, seed=5, max_tokens=80, ignore_eos=True, logprobs=2)


def said(llm: LLM, prompt: list[int]) -> tuple[Any, int]:
    """Tokens with their log probabilities, and how many tokens of the prompt were cached."""
    result = llm.generate(prompt, ANSWER)
    return (result.token_ids, result.logprobs), result.usage.cached_tokens


@pytest.mark.skipif(native_core() is None, reason="the twins promise float32 rounding, not the same bits")
def test_a_restarted_model_answers_bit_for_bit_as_a_cold_one(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 2}
    prompt = [(7 * i) % 390 for i in range(600)]
    with LLM(model, prefix_cache_folder=str(tmp_path / "kept"), **settings) as llm:
        first, cached = said(llm, prompt)
        assert cached == 0
        is_hybrid = llm.model_info.state_bytes > 0
    with LLM(model, prefix_cache_folder=str(tmp_path / "kept"), num_threads=1, **settings) as llm:
        again, cached = said(llm, prompt)
        assert again == first and cached == 576
        turn = [*prompt, *first[0][:70], 3, 4, 5]
        after, cached = said(llm, turn)
        assert cached == (576 if is_hybrid else 640), "what a dense model generated is reused too"
    with LLM(model, prefix_cache=False, **settings) as llm:
        assert said(llm, prompt) == (first, 0) and said(llm, turn) == (after, 0)


def test_a_model_that_changed_on_the_disk_starts_cold(
    folder: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """Another seed gives other weights in files of the same names and sizes."""
    place, kept = tmp_path / "model", str(tmp_path / "kept")
    prompt = [(7 * i) % 390 for i in range(200)]
    for seed in (0, 1):
        write_qwen3_folder(place, seed=seed)
        with LLM(place, prefix_cache_folder=kept, max_model_len=512) as llm:
            got, cached = said(llm, prompt)
            assert cached == 0
        with LLM(place, prefix_cache=False, max_model_len=512) as llm:
            assert said(llm, prompt)[0] == got
    assert "another model, version or setting: weight files was" in logged.text
    (one,) = Path(kept).glob("*.prefixes")
    assert one.name.startswith("model-")


def test_another_setting_starts_cold_and_says_which(
    folder: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    prompt = [(7 * i) % 390 for i in range(200)]
    for kv_dtype in ("float32", "float16"):
        with LLM(folder, prefix_cache_folder=str(tmp_path), kv_dtype=kv_dtype, max_model_len=512) as llm:  # type: ignore[arg-type]
            assert said(llm, prompt)[1] == 0
    assert "kv_dtype was float32 and is float16" in logged.text


@pytest.mark.parametrize("change", ["mtime", "version", "code", "isa", "ops", "dtype", "quant", "kv", "shape"])
def test_whatever_the_bits_depend_on_is_in_the_fingerprint(
    change: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helexa_engine.cache.spec import AttentionCacheSpec, CacheSpec
    from helexa_engine.config import EngineConfig
    from helexa_engine.models.config import ModelConfig
    from helexa_engine.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    shape = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, "here")
    specs: list[CacheSpec] = [AttentionCacheSpec(2, 16, "float16")]
    settings = EngineConfig()

    def fingerprint() -> dict[str, str]:
        return model_fingerprint.model_fingerprint(checkpoint, shape, specs, settings)

    before = fingerprint()
    assert before == fingerprint()
    if change == "mtime":
        weights = next(folder.glob("*.safetensors"))
        status = weights.stat()
        weights.write_bytes(weights.read_bytes())
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a tool that keeps times would
    elif change == "version":
        monkeypatch.setattr(model_fingerprint, "__version__", "0.0.0")
    elif change == "code":
        monkeypatch.setattr(model_fingerprint, "_PACKAGE", model_fingerprint._PACKAGE / "ops")
    elif change == "isa":
        monkeypatch.setattr(model_fingerprint, "native_core", lambda: None)
    elif change == "ops":
        monkeypatch.setenv("HELEXA_OPS", "quant_matmul=reference")
    elif change == "dtype":
        settings = dataclasses.replace(settings, dtype="bfloat16")
    elif change == "quant":
        settings = dataclasses.replace(settings, quant="Q8_0")
    elif change == "kv":
        specs = [AttentionCacheSpec(2, 16, "float32")]
    else:
        shape = dataclasses.replace(shape, rope_theta=shape.rope_theta + 1)
    assert fingerprint() != before


def test_the_rotation_of_a_position_does_not_depend_on_the_context(folder: Path) -> None:
    """So the context, which depends on free memory, is not in the fingerprint."""
    from helexa_engine.layers.rotary import rotary_table

    whole = rotary_table(128, 5000, 1e6)
    for length in (1, 63, 64, 1000, 4097):
        assert rotary_table(128, length, 1e6).equal(whole[:length])


@pytest.mark.parametrize("limit", ["", "0", "-1GiB", "much"])
def test_a_bad_limit_is_refused_before_anything_is_loaded(limit: str, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="prefix_cache_limit: expected a size such as 4GiB"):
        LLM(folder, prefix_cache_limit=limit)


def test_a_folder_without_a_cache_has_no_effect_and_says_so(
    folder: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    with LLM(folder, prefix_cache=False, prefix_cache_folder=str(tmp_path / "kept"), max_model_len=256):
        pass
    assert "prefix_cache_folder has no effect" in logged.text and not (tmp_path / "kept").exists()
