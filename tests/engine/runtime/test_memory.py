"""The memory plan: what fits is derived before loading, and what does not is refused with figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helexa_engine.errors import InvalidRequest, ModelDoesNotFit
from helexa_engine.runtime.memory import TOKENS_PER_SEAT, MemoryPlan, available_bytes, plan

MIB = 2**20


def make(**changes: Any) -> MemoryPlan:
    arguments: dict[str, Any] = {
        "weight_bytes": 600 * MIB,
        "page_bytes": MIB,
        "page_size": 64,
        "workspace_bytes": 100 * MIB,
        "model_max_len": 40960,
        "max_model_len": None,
        "max_num_seqs": 8,
        "available_bytes": 10_000 * MIB,
        "memory_fraction": 1.0,
    }
    return plan(**(arguments | changes))


def test_context_is_what_the_model_allows_when_it_fits() -> None:
    p = make()
    assert (p.max_model_len, p.num_pages) == (40960, 640)
    assert p.kv_bytes == 640 * MIB and p.total_bytes == 1340 * MIB


def test_other_seats_get_pages_of_their_own() -> None:
    p = make(max_model_len=8192)
    assert p.num_pages == 8 * TOKENS_PER_SEAT // 64
    assert make(max_model_len=1000).num_pages == 8 * 1000 // 64


def test_context_shrinks_to_what_fits() -> None:
    p = make(available_bytes=1000 * MIB)
    assert (p.num_pages, p.max_model_len) == (300, 300 * 64)
    p = make(available_bytes=1000 * MIB, memory_fraction=0.8)
    assert (p.num_pages, p.max_model_len) == (100, 6400)


def test_weights_that_do_not_fit_say_by_how_much() -> None:
    with pytest.raises(ModelDoesNotFit, match="smaller quantisation") as caught:
        make(available_bytes=700 * MIB)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (701 * MIB, 700 * MIB)


def test_a_context_that_does_not_fit_names_one_that_does() -> None:
    with pytest.raises(ModelDoesNotFit, match="max_model_len=19200 would fit"):
        make(available_bytes=1000 * MIB, max_model_len=20000)
    assert make(available_bytes=1000 * MIB, max_model_len=19200).num_pages == 300


def test_states_are_reserved_for_every_seat() -> None:
    p = make(available_bytes=1000 * MIB, state_slot_bytes=10 * MIB)
    assert (p.state_bytes, p.num_pages) == (80 * MIB, 220)
    assert p.total_bytes == 1000 * MIB and "+ states 80.0 MiB +" in str(p)
    assert "states" not in str(make())
    with pytest.raises(ModelDoesNotFit, match=r"max_num_seqs=2 would fit: each takes 50.0 MiB of state"):
        make(available_bytes=801 * MIB, state_slot_bytes=50 * MIB)


def test_snapshots_take_a_share_of_what_the_context_leaves() -> None:
    p = make(available_bytes=2000 * MIB, state_slot_bytes=10 * MIB, num_snapshots=8)
    assert (p.num_snapshots, p.snapshot_bytes, p.num_pages) == (8, 80 * MIB, 640)
    assert "+ states 80.0 MiB + 8 snapshots of them 80.0 MiB +" in str(p)
    assert p.total_bytes == (600 + 100 + 80 + 80 + 640) * MIB
    few = make(available_bytes=1000 * MIB, state_slot_bytes=10 * MIB, num_snapshots=8)
    assert (few.num_snapshots, few.num_pages, few.total_bytes) == (5, 170, 1000 * MIB)
    asked = make(available_bytes=1000 * MIB, state_slot_bytes=10 * MIB, num_snapshots=8, max_model_len=12000)
    assert (asked.num_snapshots, asked.num_pages) == (0, 220), "the context that was asked for goes first"
    assert make(num_snapshots=8).num_snapshots == 0, "nothing to take a snapshot of"


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_model_len: the model allows at most 40960 tokens"):
        make(max_model_len=40961)


def test_what_stays_in_the_file_is_said_and_not_reserved() -> None:
    p = make(mapped_bytes=20_000 * MIB)
    assert p.total_bytes == make().total_bytes
    assert str(p).endswith("of experts stay in the mapped file") and "mapped" not in str(make())


def test_available_bytes_minds_the_control_group(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    cgroup.mkdir()
    (proc / "meminfo").write_text("MemTotal: 2000000 kB\nMemAvailable: 1000000 kB\n")
    assert available_bytes(proc, cgroup) == 1_024_000_000
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("5\n")
    assert available_bytes(proc, cgroup) == 1_024_000_000
    (cgroup / "memory.max").write_text("900000\n")
    (cgroup / "memory.current").write_text("500000\n")
    (cgroup / "memory.stat").write_text("anon 300000\ninactive_file 100000\n")
    assert available_bytes(proc, cgroup) == 500_000


def test_available_bytes_of_this_machine_is_plausible() -> None:
    assert 2**26 < available_bytes() < 2**50
