"""The shipped file, read with the ``gguf`` package."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from helexa_engine import demo
from helexa_engine.demo.conversations import CLAIMED, SKILLS, held_out
from helexa_engine.demo.tokenizer import conversation

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def reader() -> Any:
    return gguf.GGUFReader(demo.path())


def value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def test_is_small_enough_for_the_wheel() -> None:
    assert demo.path().stat().st_size <= 12_000_000


def test_importing_the_package_needs_no_torch() -> None:
    code = "import sys, helexa_engine.demo as d; assert d.path().exists(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dimensions_suit_k_quants(reader: Any) -> None:
    assert value(reader, "general.architecture") == "qwen35"
    heads, head_dim = value(reader, "qwen35.attention.head_count"), value(reader, "qwen35.attention.key_length")
    for number in (
        value(reader, "qwen35.embedding_length"),
        value(reader, "qwen35.feed_forward_length"),
        value(reader, "qwen35.ssm.inner_size"),
        heads * head_dim,
    ):
        assert number % 256 == 0
    assert value(reader, "qwen35.attention.value_length") == head_dim
    assert value(reader, "qwen35.context_length") == 2048


def test_layers_alternate_as_in_the_real_models(reader: Any) -> None:
    """Three delta nets, then full attention; more value heads than key heads, so that their order in the file matters."""
    names = {t.name for t in reader.tensors}
    for i in range(value(reader, "qwen35.block_count")):
        is_full = (i + 1) % value(reader, "qwen35.full_attention_interval") == 0
        assert (f"blk.{i}.attn_q.weight" in names) == is_full
        assert (f"blk.{i}.ssm_a" in names) == (not is_full)
    assert value(reader, "qwen35.ssm.time_step_rank") == 2 * value(reader, "qwen35.ssm.group_count")


def test_tensors(reader: Any) -> None:
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 2 + 2 * 11 + 6 * 14
    assert "output.weight" not in tensors  # tied
    for tensor in tensors.values():
        is_matrix = len(tensor.shape) == 2 and "conv1d" not in tensor.name
        assert tensor.tensor_type.name == ("Q8_0" if is_matrix else "F32")
    assert list(tensors["token_embd.weight"].shape) == [256, len(value(reader, "tokenizer.ggml.tokens"))]
    assert 5e6 < sum(int(t.n_elements) for t in tensors.values()) < 1e7


def test_tokenizer_metadata(reader: Any) -> None:
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    kinds = dict(zip(tokens, types, strict=True))
    assert len(kinds) == len(tokens) == len(types)
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.pre") == "qwen35"
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    assert tokens[value(reader, "tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    assert tokens[value(reader, "tokenizer.ggml.padding_token_id")] == "<|endoftext|>"
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert kinds[token] == gguf.TokenType.CONTROL
    for token in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"):
        assert kinds[token] == gguf.TokenType.USER_DEFINED
    for merge in value(reader, "tokenizer.ggml.merges"):
        left, right = merge.split(" ")
        assert left in kinds and right in kinds and left + right in kinds


def test_template_in_the_file_is_the_one_beside_it(reader: Any) -> None:
    beside = (demo.FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    assert value(reader, "tokenizer.chat_template") == beside.rstrip("\n")


def test_transformers_reads_the_same_tokens_and_prompts() -> None:
    """The tokenizer rebuilt from metadata encodes and decodes every conversation; transformers renders the same text."""
    pytest.importorskip("transformers")
    from transformers import PreTrainedTokenizerFast

    from helexa_engine.demo import evaluate

    _, tokenizer = evaluate.load_gguf(demo.path())
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = value(gguf.GGUFReader(demo.path()), "tokenizer.chat_template")
    for skill in SKILLS:
        for sample in held_out(skill, 10):
            text = conversation(sample)
            ids = tokenizer.encode(text).ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
            rendered = fast.apply_chat_template(
                [*sample.messages, sample.answer],
                tools=sample.tools or None,
                tokenize=False,
                **sample.chat_template_kwargs,
            )
            assert rendered == text


def test_model_card_names_what_is_claimed() -> None:
    """Each skill has its row; a claimed one shows at least 90 %, by transformers and over HTTP."""
    rows = {}
    for line in (demo.FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[1].endswith("%"):
            shares = [float(cell.rstrip("%")) for cell in (cells[1], cells[3])]
            rows[cells[0]] = (min(shares), min(int(cells[2]), int(cells[4])), cells[5])
    assert set(rows) == set(SKILLS) and CLAIMED
    for skill, (percent, n, claimed) in rows.items():
        assert n >= 50
        assert claimed == ("yes" if skill in CLAIMED else "no")
        assert percent >= 90 or skill not in CLAIMED


@pytest.mark.parametrize("skill", ["tool_call", "thinking"])
def test_transformers_alone_finds_the_skills(skill: str) -> None:
    """Other held-out samples than those of the table, judged without helexa's engine; the end-to-end tests judge every claimed skill."""
    pytest.importorskip("transformers")
    from helexa_engine.demo import evaluate

    model, tokenizer = evaluate.load_gguf(demo.path())
    assert evaluate.accuracy(model, tokenizer, skill, n=100, seed=11) >= 0.9
