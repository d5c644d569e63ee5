"""What must be free for a load is what the load then finds enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from helexa_engine.config import EngineConfig
from helexa_engine.errors import ModelDoesNotFit, ModelNotFound
from helexa_engine.runtime.memory_need import WANTED_TOKENS, memory_need
from helexa_engine.runtime.plan import plan_model
from helexa_engine.testing.checkpoints import write_qwen3_folder
from helexa_engine.weights.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_folder(tmp_path_factory.mktemp("need") / "tiny", max_position_embeddings=4 * WANTED_TOKENS)


def context(folder: Path, config: EngineConfig, available: int) -> int:
    with open_checkpoint(folder) as checkpoint:
        return plan_model(checkpoint, config, name="x", available=available).memory.max_model_len


@pytest.mark.parametrize("fraction", [0.3, 0.9, 1.0])
def test_with_what_is_wanted_the_context_is_what_agents_work_with(folder: Path, fraction: float) -> None:
    config = EngineConfig(memory_fraction=fraction)
    need = memory_need(folder, config)
    assert need.least_bytes < need.wanted_bytes
    assert context(folder, config, need.wanted_bytes) >= WANTED_TOKENS
    assert 0 < context(folder, config, need.least_bytes) < WANTED_TOKENS
    with pytest.raises(ModelDoesNotFit):
        context(folder, config, need.least_bytes - 4)


def test_a_context_that_is_asked_for_is_needed(folder: Path) -> None:
    config = EngineConfig(max_model_len=640)
    need = memory_need(folder, config)
    assert need.least_bytes == need.wanted_bytes and context(folder, config, need.least_bytes) == 640
    assert memory_need(folder, replace(config, max_model_len=1280)).least_bytes > need.least_bytes


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        memory_need(str(tmp_path / "x.gguf"), EngineConfig())
