"""A small byte-level BPE trained here, in the shapes in which Qwen models ship theirs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helexa_engine.text.tokenizer import PRE_TOKENIZERS, Tokenizer

#: (content, special), as Qwen3 has them.
ADDED = [
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'll say: we've 12345 reasons.\n\n\tdef f(x):\n        return x\r\n",
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}} <think>\n\n</think> <|im_start|>user',
    "世界你好，机器学习。こんにちは 한국어 Привет мир ñandú naïve café 🦙🚀👩‍👩‍👧 हिन्दी भाषा ภาษาไทย",
] * 4

#: In the manner of Qwen3's own template.
TEMPLATE = """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}{%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""


@dataclass
class Shipped:
    """One tokenizer as GGUF metadata, as a HuggingFace folder, and as transformers' own class."""

    metadata: dict[str, Any]
    folder: Path
    reference: Any


def ship(folder: Path, pre: str) -> Shipped:
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from transformers import AddedToken
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZERS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.to_str())["model"]
    reference_class = Qwen2Tokenizer if pre == "qwen2" else Qwen3_5Tokenizer
    reference = reference_class(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    reference.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in ADDED])
    reference.eos_token = "<|im_end|>"
    reference.chat_template = TEMPLATE
    reference.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": reference.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])})
    )

    size = len(reference)
    words = reference.convert_ids_to_tokens(list(range(size)))
    special = dict(ADDED)
    types = [1 if word not in special else 3 if special[word] else 4 for word in words]
    padding = 5
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": words + [f"[PAD{i}]" for i in range(padding)],
        "tokenizer.ggml.token_type": types + [5] * padding,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": reference.convert_tokens_to_ids("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": reference.convert_tokens_to_ids("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    return Shipped(metadata, folder, reference)


@pytest.fixture(scope="session", params=["qwen2", "qwen35"])
def shipped(request, tmp_path_factory) -> Shipped:
    return ship(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory) -> Shipped:
    return ship(tmp_path_factory.mktemp("qwen2_only"), "qwen2")


@pytest.fixture(scope="session")
def tokenizer(qwen2) -> Tokenizer:
    return Tokenizer.from_gguf(qwen2.metadata)
