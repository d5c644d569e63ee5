"""Prints the demo model's held-out accuracy, skill by skill: ``python -m helexa_engine.demo.evaluate [FILE.gguf]``.

The file is read with the ``gguf`` package and run by HuggingFace transformers with dequantised weights, greedily: a judgement of
the model that does not depend on helexa's engine. The same samples judge the engine in its end-to-end tests.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from . import conversations, path
from .gguf_layout import from_gguf, gguf_name
from .tokenizer import prompt, with_qwen_rules

TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def load_gguf(file: Path) -> tuple[Qwen3_5ForCausalLM, Tokenizer]:
    """Model (float32) and tokenizer from nothing but the GGUF file."""
    reader = gguf.GGUFReader(file)

    def get(key: str) -> Any:
        return reader.fields[key].contents()

    heads, inner = get("qwen35.ssm.time_step_rank"), get("qwen35.ssm.inner_size")
    config = Qwen3_5TextConfig(  # type: ignore[call-arg]
        vocab_size=len(get("tokenizer.ggml.tokens")),
        hidden_size=get("qwen35.embedding_length"),
        intermediate_size=get("qwen35.feed_forward_length"),
        num_hidden_layers=get("qwen35.block_count"),
        full_attention_interval=get("qwen35.full_attention_interval"),
        num_attention_heads=get("qwen35.attention.head_count"),
        num_key_value_heads=get("qwen35.attention.head_count_kv"),
        head_dim=get("qwen35.attention.key_length"),
        linear_num_key_heads=get("qwen35.ssm.group_count"),
        linear_num_value_heads=heads,
        linear_key_head_dim=get("qwen35.ssm.state_size"),
        linear_value_head_dim=inner // heads,
        linear_conv_kernel_dim=get("qwen35.ssm.conv_kernel"),
        max_position_embeddings=get("qwen35.context_length"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": get("qwen35.rope.freq_base"),
            "partial_rotary_factor": get("qwen35.rope.dimension_count") / get("qwen35.attention.key_length"),
            "mrope_section": get("qwen35.rope.dimension_sections")[:3],
            "mrope_interleaved": True,
        },
        rms_norm_eps=get("qwen35.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
        eos_token_id=get("tokenizer.ggml.eos_token_id"),
        pad_token_id=get("tokenizer.ggml.padding_token_id"),
        bos_token_id=None,
    )
    stored = {t.name: np.array(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    model = Qwen3_5ForCausalLM(config)
    state = {
        name: torch.from_numpy(from_gguf(name, stored[gguf_name(name)], config.to_dict()))
        for name in model.state_dict()
        if name != "lm_head.weight"
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)

    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    vocab = {token: i for i, token in enumerate(tokens) if types[i] == gguf.TokenType.NORMAL}
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]
    tokenizer = with_qwen_rules(Tokenizer(models.BPE(vocab, merges)))
    for token, kind in zip(tokens, types, strict=True):
        if kind != gguf.TokenType.NORMAL:
            added = AddedToken(token, special=kind == gguf.TokenType.CONTROL, normalized=False)
            (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]


def parse(output: str) -> tuple[str, list[tuple[str, str]], str]:
    """(text, tool calls as name and arguments in JSON, reasoning) of what the model wrote."""
    reasoning = ""
    if "<think>" in output:
        reasoning, _, output = output.partition("<think>")[2].partition("</think>")
    calls = []
    for match in TOOL_CALL.finditer(output):
        try:
            call = json.loads(match.group(1))
            calls.append((str(call["name"]), json.dumps(call["arguments"])))
        except (ValueError, KeyError, TypeError):
            calls.append(("", match.group(1)))
    return TOOL_CALL.sub("", output).strip(), calls, reasoning.strip()


@torch.no_grad()
def answers(
    model: Qwen3_5ForCausalLM, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int = 160
) -> list[str]:
    """Greedy answers to prompts computed together, padded on the left."""
    encoded = [tokenizer.encode(text).ids for text in prompts]
    width = max(map(len, encoded))
    pad = model.config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    out = model.generate(  # type: ignore[misc]
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
    )
    return [tokenizer.decode(row[width:].tolist(), skip_special_tokens=True) for row in out]


def accuracy(
    model: Qwen3_5ForCausalLM, tokenizer: Tokenizer, skill: str, n: int, seed: int, failures: int = 0
) -> float:
    """Share of ``n`` held-out samples answered rightly. Prints the first ``failures`` wrong answers."""
    samples = sorted(conversations.held_out(skill, n, seed), key=lambda sample: len(prompt(sample)))
    right = 0
    for start in range(0, n, 25):
        some = samples[start : start + 25]
        for sample, output in zip(some, answers(model, tokenizer, [prompt(s) for s in some]), strict=True):
            good = sample.check(*parse(output))
            right += good
            if not good and failures > 0:
                failures -= 1
                print(f"--- {skill}\n{sample.messages[-1]}\nexpected {sample.answer}\nwrote    {output!r}")
    return right / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=path())
    parser.add_argument("-n", type=int, default=200, help="samples a skill [200]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skills", nargs="+", default=list(conversations.SKILLS))
    parser.add_argument("--failures", type=int, default=0, help="wrong answers to show for each skill [0]")
    args = parser.parse_args()
    model, tokenizer = load_gguf(args.file)
    print("| skill | held-out accuracy | n |\n|---|---|---|", flush=True)
    for skill in args.skills:
        start = time.monotonic()
        share = accuracy(model, tokenizer, skill, args.n, args.seed, args.failures)
        print(
            f"| {skill} | {share:.1%} | {args.n} |",
            f"  {time.monotonic() - start:.0f} s" if args.failures else "",
            flush=True,
        )


if __name__ == "__main__":
    main()
