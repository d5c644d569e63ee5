"""Model configs from outside: what is read, and that everything else is an error that names the file and the key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine.errors import UnsupportedCheckpoint
from helexa_engine.models.config import ModelConfig
from helexa_engine.models.registry import model_class

GOOD: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_checkpoint("qwen3", GOOD | changes, "model.gguf")


def test_a_released_config() -> None:
    config = read()
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (1024, 128, 8)
    assert config.rope_theta == 1e6 and config.rope_scaling is None and config.tie_word_embeddings


def test_head_dim_is_its_own_number_and_hidden_over_heads_only_when_absent() -> None:
    assert read(head_dim=64).head_dim == 64
    without = {key: value for key, value in GOOD.items() if key != "head_dim"}
    assert ModelConfig.from_checkpoint("qwen3", without, "x").head_dim == 1024 // 16


def test_rope_parameters_of_transformers_5() -> None:
    nested = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 5e5}
    config = read(rope_theta=None, rope_parameters=nested)
    assert config.rope_theta == 5e5 and config.rope_scaling == nested


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "1024"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_key_value_heads": 5}, "num_attention_heads"),
        ({"head_dim": 100}, "head_dim"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": {"type": "llama3"}}, "llama3"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "original_max_position_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
    ids=str,
)
def test_what_helexa_cannot_run_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=f"model.gguf: .*{message}"):
        read(**changes)


numbers = st.floats() | st.integers() | st.text(max_size=3)
yarn_keys = ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"]
scaling = st.builds(
    lambda kind, values: {"rope_type": kind} | values,
    st.sampled_from(["yarn", "linear", "default", 3]),
    st.fixed_dictionaries({}, optional=dict.fromkeys(yarn_keys, numbers)),
)
junk = st.none() | st.booleans() | numbers | st.lists(st.integers(), max_size=2) | scaling


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "rope_scaling", "rope_parameters", "hidden_act"]), junk, max_size=3))
def test_junk_is_never_another_error(changes: dict[str, Any]) -> None:
    try:
        read(**changes)
    except UnsupportedCheckpoint as error:
        assert "model.gguf" in str(error)


def test_an_unknown_architecture_says_what_there_is() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="'llama' is not supported; helexa runs .*qwen3"):
        model_class("llama", "model.gguf")
