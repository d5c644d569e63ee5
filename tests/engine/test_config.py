"""Configuration: one field is one knob, and the layers come in their order."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from helexa_engine.config import EngineConfig, add_flags, byte_size, read_toml, resolve
from helexa_engine.errors import InvalidRequest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "tpu"),
        ("dtype", "int3"),
        ("max_num_seqs", 0),
        ("max_num_seqs", 2.5),
        ("max_num_seqs", True),
        ("max_model_len", 0),
        ("memory_fraction", 1.5),
        ("memory_fraction", "most"),
        ("max_num_batched_tokens", 8),
        ("quant", 4),
        ("num_threads", 0),
    ],
)
def test_bad_values_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EngineConfig(**{field: value})
    assert caught.value.path == field


def test_flag_beats_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    toml = {"max_num_seqs": 3, "memory_fraction": 0.5, "seed": 1}
    monkeypatch.setenv("HELEXA_MAX_NUM_SEQS", "4")
    monkeypatch.setenv("HELEXA_SEED", "2")
    config = resolve(EngineConfig, {"max_num_seqs": "5"}, toml)
    assert (config.max_num_seqs, config.seed, config.memory_fraction, config.dtype) == (5, 2, 0.5, "auto")


def test_a_bad_value_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="--max-num-seqs: expected int, got 'many'"):
        resolve(EngineConfig, {"max_num_seqs": "many"})
    monkeypatch.setenv("HELEXA_SEED", "x")
    with pytest.raises(InvalidRequest, match="environment HELEXA_SEED"):
        resolve(EngineConfig, {})


def test_fields_have_flags_and_unset_flags_stay_out() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig)
    assert vars(parser.parse_args([])) == {}
    assert vars(parser.parse_args(["--kv-dtype", "float16", "--seed", "3"])) == {"kv_dtype": "float16", "seed": "3"}


def test_a_knob_without_a_flag_is_set_in_the_environment_or_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig)
    assert "--max-step-seconds" not in parser.format_help()
    assert resolve(EngineConfig, {}, {"max_step_seconds": 0.25}).max_step_seconds == 0.25
    monkeypatch.setenv("HELEXA_MAX_STEP_SECONDS", "2")
    assert resolve(EngineConfig, {}, {"max_step_seconds": 0.25}).max_step_seconds == 2.0


def test_unknown_toml_keys_are_named_with_their_path(tmp_path: Path) -> None:
    path = tmp_path / "helexa.toml"
    path.write_text("[engine]\nmax_seqs = 3\n")
    with pytest.raises(InvalidRequest, match=r"engine\.max_seqs: unknown key"):
        read_toml(path, {"engine": EngineConfig})
    path.write_text("[motor]\n")
    with pytest.raises(InvalidRequest, match="motor: unknown table"):
        read_toml(path, {"engine": EngineConfig})
    path.write_text("[engine\n")
    with pytest.raises(InvalidRequest, match="not valid TOML"):
        read_toml(path, {"engine": EngineConfig})
    with pytest.raises(InvalidRequest, match="no such file"):
        read_toml(tmp_path / "absent.toml", {"engine": EngineConfig})
    path.write_text("[engine]\nmax_num_seqs = 3\n")
    assert read_toml(path, {"engine": EngineConfig}) == {"engine": {"max_num_seqs": 3}}


def test_byte_sizes() -> None:
    assert [byte_size(s) for s in ("1KiB", "1.5GiB", "800MB", "12B", "7", 9)] == [
        1024,
        1610612736,
        800_000_000,
        12,
        7,
        9,
    ]
    with pytest.raises(ValueError):
        byte_size("lots")
