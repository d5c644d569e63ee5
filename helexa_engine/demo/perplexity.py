"""Prints the perplexity of the demo in every mix: ``python -m helexa_engine.demo.perplexity [CHECKPOINT TOKENIZER]``.

Each matrix is quantised by helexa into the type that the mix gives it, dequantised again, and the model is run by transformers in
float32: what is measured is what the weights lose. The text is held-out conversations, prompts and answers. Without a checkpoint
the weights are those of the shipped file, which has lost already what Q8_0 loses.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3_5ForCausalLM

from ..quant import types
from ..quant.dequantize import dequantize
from ..quant.mixes import MIXES, Mix, quant_type_for
from ..quant.quantize import quantize
from . import conversations, path, tokenizer
from .evaluate import load_gguf

REFERENCE = "BF16"
MIX_NAMES = (REFERENCE, "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q4_0", "IQ4_XS")


def held_out_tokens(encoder: Tokenizer, n: int, seed: int = 4) -> list[list[int]]:
    """``n`` held-out conversations of every skill as token ids."""
    samples = (sample for skill in conversations.SKILLS for sample in conversations.held_out(skill, n, seed))
    return [encoder.encode(tokenizer.conversation(sample)).ids for sample in samples]


def in_mix(state: dict[str, Tensor], mix: Mix, *, num_layers: int, gqa_ratio: int) -> dict[str, Tensor]:
    """The weights of a tied model after a detour through the types of a mix."""
    result = {}
    for name, tensor in state.items():
        values = tensor.float().numpy()
        kind = quant_type_for(mix, name, values.shape, num_layers=num_layers, gqa_ratio=gqa_ratio, tied=True)
        if kind is not types.F32:
            values = dequantize(kind, quantize(values, kind), values.shape)
        result[name] = torch.from_numpy(values)
    result["lm_head.weight"] = result["model.embed_tokens.weight"]
    return result


@torch.no_grad()
def perplexity(model: Qwen3_5ForCausalLM, texts: list[list[int]], batch: int = 16) -> float:
    """exp of the mean loss of all tokens but the first of each text."""
    total, count = 0.0, 0
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), batch):
        some = ordered[start : start + batch]
        width = max(map(len, some))
        # Padding on the right: nothing causal sees it.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in some])
        targets = torch.tensor([row[1:] + [-100] * (width - len(row)) for row in some])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += int((targets >= 0).sum())
    return math.exp(total / count)


def perplexities(
    model: Qwen3_5ForCausalLM, texts: list[list[int]], mixes: Iterable[str] = MIX_NAMES
) -> Iterator[tuple[str, float]]:
    """(mix, perplexity) for each mix. The model is left with the weights of the last one."""
    config = model.config
    original = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    ratio = config.num_attention_heads // config.num_key_value_heads
    for name in mixes:
        model.load_state_dict(in_mix(original, MIXES[name], num_layers=config.num_hidden_layers, gqa_ratio=ratio))
        yield name, perplexity(model, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="HuggingFace folder [the shipped file]")
    parser.add_argument("tokenizer", type=Path, nargs="?", help="its tokenizer.json")
    parser.add_argument("-n", type=int, default=50, help="conversations of each skill [50]")
    args = parser.parse_args()
    if args.checkpoint is None:
        model, encoder = load_gguf(path())
    elif args.tokenizer is None:
        parser.error("a checkpoint needs its tokenizer.json")
    else:
        model = Qwen3_5ForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
        encoder = Tokenizer.from_file(str(args.tokenizer))
    model.eval()  # type: ignore[no-untyped-call]
    texts = held_out_tokens(encoder, args.n)
    print(f"{sum(map(len, texts))} tokens\n\n| mix | perplexity | against {REFERENCE} |\n|---|---|---|", flush=True)
    reference = math.nan
    for name, value in perplexities(model, texts):
        reference = value if name == REFERENCE else reference
        print(f"| {name} | {value:.4f} | {value / reference - 1:+.3%} |", flush=True)


if __name__ == "__main__":
    main()
