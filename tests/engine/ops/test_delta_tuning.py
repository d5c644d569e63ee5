"""The table of the chunk form's tiles, and the search that writes it, without a card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.ops import gated_delta_tuning as search
from helexa_engine.cache.spec import PAGE_SIZE
from helexa_engine.ops.gated_delta_rule import tuning
from helexa_engine.ops.gated_delta_rule.tuning import Tile, Tuning
from helexa_engine.ops.registry import native_core


def test_every_row_of_the_table_can_be_taken() -> None:
    table = json.loads(tuning.TABLE.read_text(encoding="utf-8"))
    rows = [("default", "", table.pop("default"))]
    rows += [(architecture, dims, row) for architecture, its in table.items() for dims, row in its.items()]
    for architecture, dims, row in rows:
        assert architecture == "default" or (re.fullmatch(r"sm_\d+", architecture) and re.fullmatch(r"\d+x\d+", dims))
        assert architecture == "default" or row["measured"].keys() >= {"device", "commit", "microseconds"}
        its = tuning.from_row(row)
        assert PAGE_SIZE % its.chunk == 0  # prompt chunks and snapshots end at pages' borders
        assert tuning.from_row(tuning.to_row(its)) == its
        for number in (its.chunk, its.block_v, its.solve.block_k, its.advance.block_k):
            assert number >= 16 and number & (number - 1) == 0  # what a product of tiles takes


def test_a_card_takes_its_row_and_others_the_default(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(tuning.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    ours = Tuning(64, 16, Tile(64, 8, 2), Tile(32, 4, 1))
    search.write_row(path, "sm_90", 128, 128, ours, {"device": "a card"})
    search.write_row(path, "sm_120", 128, 128, ours, {"device": "another"})
    search.write_row(path, "sm_90", 64, 128, ours, {"device": "a card"})
    default = tuning.tuning_for("sm_80", 128, 128)
    assert tuning.tuning_for("sm_90", 128, 128, path) == tuning.tuning_for("sm_90", 64, 128, path) == ours
    assert tuning.tuning_for("sm_90", 64, 64, path) == tuning.tuning_for("interpreter", 16, 16, path) == default
    table = json.loads(path.read_text(encoding="utf-8"))
    assert list(table) == ["default", "sm_120", "sm_90"] and table["sm_90"]["128x128"]["measured"] == {
        "device": "a card"
    }


def test_the_search_takes_the_fastest_pair_with_one_chunk() -> None:
    """Kernels that are fastest with different chunks, tiles that spill, and a chunk that nothing of one kernel can take."""
    solve_tile, advance_tile = Tile(32, 8, 1), Tile(16, 4, 2)

    def time_solve(key: search.SolveKey) -> float | None:
        chunk, tile = key
        if tile.num_stages == 2:
            return None
        return (1.0 if chunk == 32 else 4.0) - 0.5 * (tile == solve_tile)

    def time_advance(key: search.AdvanceKey) -> float | None:
        chunk, block_v, tile = key
        return (9.0 if chunk == 32 else 2.0) - (block_v == 32) - 0.5 * (tile == advance_tile)

    assert search.search(128, time_solve, time_advance) == (Tuning(64, 32, solve_tile, advance_tile), 3.5 + 0.5)
    assert search.search(128, lambda key: time_solve(key) if key[0] == 32 else None, time_advance)[0].chunk == 32
    assert {block for _, block, _ in search.advance_candidates(32)} == {16, 32}
    with pytest.raises(RuntimeError, match="every candidate spills"):
        search.search(128, lambda _: None, time_advance)


def test_the_default_is_a_candidate() -> None:
    """So a search never ends with less than what was there."""
    default = tuning.tuning_for("sm_80", 128, 128)
    assert (default.chunk, default.solve) in search.solve_candidates()
    assert (default.chunk, default.block_v, default.advance) in search.advance_candidates(128)


@pytest.mark.skipif(native_core() is None, reason="benchmarks measure the native core")
def test_tuning_without_a_card_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from benchmarks.ops import gated_delta_rule

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gated_delta_rule", "--tune"])
    with pytest.raises(SystemExit):
        gated_delta_rule.main()
    assert "expected a CUDA device, there is none" in capsys.readouterr().err
