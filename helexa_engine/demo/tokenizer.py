"""The demo model's own byte-level BPE vocabulary, and conversations as token ids with loss weights.

The pre-tokenizer is the one of Qwen3.5 (every digit alone, combining marks with their letters), and the special tokens are theirs
too, so that everything that reads Qwen3.5 reads this one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from . import FOLDER
from .sample import Sample
from .writer import CITIES, NAMES, SEEN, UNSEEN

VOCAB_SIZE = 2048
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACED_WORDS = 352  #: tokens that are a whole word with the space in front of it
PROMPT_WEIGHT = 0.05  #: loss weight of tokens that the model only reads


@cache
def _template() -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((FOLDER / "chat_template.jinja").read_text(encoding="utf-8"))


def render(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), **variables: Any) -> str:
    """The conversation as the model reads it."""
    return str(_template().render(messages=messages, tools=tools, **variables))


def prompt(sample: Sample) -> str:
    """What the model reads before it answers."""
    return render(sample.messages, sample.tools, add_generation_prompt=True, **sample.chat_template_kwargs)


def conversation(sample: Sample) -> str:
    """Prompt and answer."""
    return render([*sample.messages, sample.answer], sample.tools, **sample.chat_template_kwargs)


def with_qwen_rules(tokenizer: Tokenizer) -> Tokenizer:
    """Normaliser, pre-tokenizer and decoder as Qwen3.5 has them."""
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A vocabulary of :data:`VOCAB_SIZE` tokens from texts; control tokens and markers come last.

    Words are first merged without the space in front of them, and only frequent whole words get a token that includes it. So a
    name has the same tokens behind a space as behind a quotation mark, and a small model can copy it into JSON piece by piece.
    """
    splitter = with_qwen_rules(Tokenizer(models.BPE())).pre_tokenizer
    pieces: Counter[str] = Counter()
    marker = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, *MARKERS))))
    for text in texts:
        for part in marker.split(text):
            pieces.update(piece for piece, _ in splitter.pre_tokenize_str(part))
    space = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" ")[0][0]
    bare: Counter[str] = Counter()
    spaced: Counter[str] = Counter()
    for piece, count in pieces.items():
        word = piece.removeprefix(space)
        if word != piece and word.isalpha():
            bare[word] += count
            spaced[word] += count
        else:
            bare[piece] += count

    plain = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS) - len(MARKERS) - SPACED_WORDS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator((word for word, count in bare.items() for _ in range(count)), trainer)
    beginnings: Counter[str] = Counter()  # tokens that start a longer word: with the space they would break its copies
    whole: Counter[str] = Counter()
    for word, count in spaced.items():
        tokens = plain.encode(word).tokens
        (whole if len(tokens) == 1 else beginnings)[tokens[0]] += count
    # No name has a token with the space, nor has what one may begin with.
    drawn = {word for words in (NAMES, CITIES, *SEEN.values(), *UNSEEN.values()) for word in words}
    chosen = [w for w, n in whole.most_common() if w not in drawn | {"I"} and beginnings[w] <= n // 25][:SPACED_WORDS]
    if len(chosen) < SPACED_WORDS:
        raise ValueError(f"the texts have only {len(chosen)} frequent words that no longer word begins with")

    state = json.loads(plain.to_str())["model"]
    vocab: dict[str, int] = state["vocab"]
    merges = [tuple(merge) for merge in state["merges"]] + [(space, word) for word in chosen]
    vocab |= {space + word: len(vocab) + i for i, word in enumerate(chosen)}
    tokenizer = with_qwen_rules(Tokenizer(models.BPE(vocab, merges)))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    return tokenizer


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


class Encoder:
    """Turns samples into token ids and loss weights."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.opening: list[int] = tokenizer.encode("<|im_start|>assistant\n").ids
        self.no_thoughts: list[int] = tokenizer.encode("<think>\n\n</think>\n\n").ids

    def __call__(self, sample: Sample) -> tuple[list[int], list[float]]:
        """(ids, weights), both [T]: weights[i] is how much the prediction *of* token i counts.

        Answers count in full, with the token that ends them; prompts a little. Empty think blocks stand in the prompt, so they
        do not count. Where thinking is enabled, earlier answers without thoughts do not either.
        """
        ids: list[int] = self.tokenizer.encode(conversation(sample)).ids
        weights = [PROMPT_WEIGHT] * len(ids)
        thinking = bool(sample.chat_template_kwargs.get("enable_thinking"))
        i = 0
        while i < len(ids):
            if ids[i : i + len(self.opening)] != self.opening:
                i += 1
                continue
            start = i + len(self.opening)
            stop = ids.index(self.end, start) + 1  # type: ignore[arg-type]
            i = start
            if ids[start : start + len(self.no_thoughts)] == self.no_thoughts:
                i = start + len(self.no_thoughts)
                weights[start:i] = [0.0] * (i - start)
                counts = not thinking
            else:
                counts = True
            weights[i:stop] = [1.0 if counts else 0.0] * (stop - i)
            i = stop
        weights[0] = 0.0
        return ids, weights
