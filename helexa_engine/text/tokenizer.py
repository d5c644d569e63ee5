"""Byte-level BPE as the Qwen family uses it: :class:`Tokenizer`, from GGUF metadata or from a HuggingFace folder.

The merges run in the ``tokenizers`` library. The added tokens (``<|im_end|>``, ``<think>`` ...) do not: they are matched
here, because whether ``<|im_end|>`` in a string is the token or ten characters of text depends on who wrote it, and the
library cannot be told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    import tokenizers

#: Pre-tokenizer of each ``tokenizer.ggml.pre`` name. Source: PRETOKENIZE_REGEX of Qwen2Tokenizer and Qwen3_5Tokenizer in
#: HuggingFace transformers; the second counts combining marks as letters.
PRE_TOKENIZERS: dict[str, str] = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

#: Control tokens that end a turn in every Qwen model, whatever the file lists (GGUF has room for one only).
END_OF_TURN = ("<|im_end|>", "<|endoftext|>")

# tokenizer.ggml.token_type
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def _byte_characters() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet (GPT-2's): printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_OF_CHARACTER = _byte_characters()


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched as a whole before the merges run. ``special`` ones (type 3) are left out of visible text."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def pattern(self) -> str:
        """The regular expression that finds the token in text."""
        pattern = re.escape(self.content)
        if self.single_word:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        return ("\\s*" if self.lstrip else "") + pattern + ("\\s*" if self.rstrip else "")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are in [0, vocab_size); ids of padding entries and holes decode to nothing.
        eos_token_ids: all end-of-turn tokens, the model's own first.
        bos_token_id: start token, or None; ``add_bos`` says whether a prompt must begin with it (never so in Qwen).
        added_tokens: id -> :class:`AddedToken`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        tokens: Sequence[str | None],
        added_tokens: Mapping[int, AddedToken],
        *,
        eos_token_ids: Iterable[int],
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
        add_bos: bool = False,
        where: str = "tokenizer",
    ) -> None:
        """``backend`` has no added tokens; ``tokens[id]`` is the byte-level spelling of a normal token, None otherwise."""
        self._backend = backend
        self._tokens = tokens
        self._where = where
        self.added_tokens = dict(added_tokens)
        self.vocab_size = len(tokens)
        self.bos_token_id = bos_token_id
        self.pad_token_id = pad_token_id
        self.add_bos = add_bos
        self._id_of_added = {token.content: token_id for token_id, token in self.added_tokens.items()}
        by_name = (self._id_of_added.get(name) for name in END_OF_TURN)
        ids = [*eos_token_ids, *(token_id for token_id in by_name if token_id is not None)]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ids))
        for token_id in (*self.eos_token_ids, bos_token_id, pad_token_id):
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise UnsupportedCheckpoint(
                    f"tokenizer names the special token {token_id}, but has {self.vocab_size} tokens", where
                )
        # Longest first, so that of two tokens starting at one place the longer wins, as in the tokenizers library.
        added = sorted(self.added_tokens.items(), key=lambda item: -len(item[1].content))
        self._added_ids = [token_id for token_id, _ in added]
        self._added_pattern = re.compile("|".join(f"({token.pattern()})" for _, token in added)) if added else None

    # -- construction --------------------------------------------------------------------------------------------------

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str = "GGUF metadata") -> Tokenizer:
        """From the ``tokenizer.ggml.*`` keys of a GGUF file. Raises :class:`UnsupportedCheckpoint`."""

        def read(key: str, kind: type, default: Any = None) -> Any:
            value = metadata.get(f"tokenizer.ggml.{key}", default)
            if value is None and default is None:
                raise UnsupportedCheckpoint(f"tokenizer.ggml.{key} is missing", where)
            if value is not None and not isinstance(value, kind):
                raise UnsupportedCheckpoint(f"tokenizer.ggml.{key}: expected {kind.__name__}, got {value!r:.60}", where)
            return value

        def integers(key: str, values: Iterable[Any]) -> list[int]:
            try:
                return [int(value) for value in values]  # the reader may give numpy's
            except (TypeError, ValueError):
                raise UnsupportedCheckpoint(f"tokenizer.ggml.{key}: expected integers", where) from None

        def listed(key: str) -> list[Any]:
            value = metadata.get(f"tokenizer.ggml.{key}", ())
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise UnsupportedCheckpoint(f"tokenizer.ggml.{key}: expected a list, got {value!r:.60}", where)
            return list(value)

        def token_id(key: str) -> int | None:
            value = metadata.get(f"tokenizer.ggml.{key}")
            return None if value is None else integers(key, [value])[0]

        if (model := read("model", str)) != "gpt2":
            raise UnsupportedCheckpoint(f"tokenizer model {model!r}; helexa reads gpt2 (byte-level BPE)", where)
        pre = read("pre", str)
        if pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise UnsupportedCheckpoint(f"tokenizer pre-tokenizer {pre!r}; helexa knows {known}", where)
        words, merges = listed("tokens"), listed("merges")
        types = integers("token_type", listed("token_type")) or [1] * len(words)
        if not words or not all(map(str.__instancecheck__, words)):
            raise UnsupportedCheckpoint("tokenizer.ggml.tokens: expected a list of strings", where)
        if len(types) != len(words):
            raise UnsupportedCheckpoint(
                f"tokenizer.ggml.token_type has {len(types)} entries for {len(words)} tokens", where
            )
        added: dict[int, AddedToken] = {}
        tokens: list[str | None] = words
        for i, kind in enumerate(types):
            if kind in (CONTROL, USER_DEFINED) and words[i]:
                added[i] = AddedToken(words[i], special=kind == CONTROL)
            if kind in (CONTROL, USER_DEFINED, UNUSED):
                tokens[i] = None
        vocab = {word: i for i, word in enumerate(tokens) if word is not None}
        backend = _build(vocab, merges, _qwen_pre_tokenizer(pre), _nfc(), where)
        ends = (token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
        return cls(
            backend,
            tokens,
            added,
            eos_token_ids=[end for end in ends if end is not None],
            bos_token_id=token_id("bos_token_id"),
            pad_token_id=token_id("padding_token_id"),
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
            where=where,
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """From ``tokenizer.json`` (with ``tokenizer_config.json``, ``generation_config.json`` and ``config.json`` where they
        stand beside it). Raises :class:`UnsupportedCheckpoint`.
        """
        folder = Path(folder)
        where = str(folder / "tokenizer.json")
        spec = read_json(folder / "tokenizer.json")
        if spec is None:
            raise UnsupportedCheckpoint("tokenizer.json is missing", str(folder))
        try:
            return cls._from_spec(spec, folder, where)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UnsupportedCheckpoint(f"tokenizer is malformed: {type(error).__name__}: {error}", where) from error

    @classmethod
    def _from_spec(cls, spec: dict[str, Any], folder: Path, where: str) -> Tokenizer:
        model = spec["model"]
        if (
            model.get("type", "BPE") != "BPE"
            or model.get("byte_fallback")
            or "ByteLevel" not in json.dumps(spec.get("pre_tokenizer"))
        ):
            raise UnsupportedCheckpoint(f"tokenizer model {model.get('type')!r}; helexa reads byte-level BPE", where)
        config = read_json(folder / "tokenizer_config.json") or {}
        rows = {row["id"]: row for row in spec.get("added_tokens") or ()}
        rows.update({int(token_id): row for token_id, row in (config.get("added_tokens_decoder") or {}).items()})
        flags = ("lstrip", "rstrip", "single_word")
        added = {
            token_id: AddedToken(
                row["content"], bool(row.get("special")), **{flag: bool(row.get(flag)) for flag in flags}
            )
            for token_id, row in rows.items()
        }
        vocab = {word: token_id for word, token_id in model["vocab"].items() if token_id not in added}
        highest = max(max(vocab.values(), default=-1), max(added, default=-1))
        if min(min(vocab.values(), default=0), min(added, default=0)) < 0 or highest > 2 * len(vocab) + 2**20:
            raise UnsupportedCheckpoint(f"tokenizer ids are out of range (highest {highest})", where)
        tokens: list[str | None] = [None] * (highest + 1)
        for word, token_id in vocab.items():
            tokens[token_id] = word
        normalizer, pre_tokenizer = _components(spec, where)
        ignore_merges = bool(model.get("ignore_merges"))
        backend = _build(vocab, model["merges"], pre_tokenizer, normalizer, where, ignore_merges=ignore_merges)
        id_of_added = {token.content: token_id for token_id, token in added.items()}

        def named(key: str) -> int | None:
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            return id_of_added.get(value, vocab.get(value)) if isinstance(value, str) else None

        ends: list[int | None] = [named("eos_token")]
        for file in ("generation_config.json", "config.json"):
            value = (read_json(folder / file) or {}).get("eos_token_id")
            ends.extend(value if isinstance(value, list) else [value])
        return cls(
            backend,
            tokens,
            added,
            eos_token_ids=[int(end) for end in ends if end is not None],
            bos_token_id=named("bos_token"),
            pad_token_id=named("pad_token"),
            add_bos=bool(config.get("add_bos_token", False)),
            where=where,
        )

    def check_fits(self, vocab_size: int) -> None:
        """Raises :class:`UnsupportedCheckpoint` when the model, with ``vocab_size`` logits, lacks rows for some tokens."""
        if self.vocab_size > vocab_size:
            raise UnsupportedCheckpoint(
                f"tokenizer has {self.vocab_size} tokens but the model's vocabulary only {vocab_size}; "
                "the tokenizer belongs to another model",
                self._where,
            )

    # -- text to ids ---------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """``tokenizer.json`` as the tokenizers library reads it, for programs that count tokens themselves.

        Raises:
            UnsupportedCheckpoint: added tokens that do not stand behind all others, which that library's interface cannot place.
        """
        from tokenizers import AddedToken as Added

        whole = self._backend.from_str(self._backend.to_str())
        for token_id, token in sorted(self.added_tokens.items()):
            kind = {"special": token.special, "lstrip": token.lstrip, "rstrip": token.rstrip}
            whole.add_tokens([Added(token.content, normalized=False, single_word=token.single_word, **kind)])
            if whole.token_to_id(token.content) != token_id:
                raise UnsupportedCheckpoint(f"the added token {token.content!r} stands amid the others", self._where)
        return str(whole.to_str())

    def encode(self, text: str, *, allow_special: bool = False, marks: TextMarks | None = None) -> list[int]:
        """Token ids of ``text``.

        By default every character is text: ``<|im_end|>`` in it gives the ids of its ten characters' text. With
        ``allow_special`` the added tokens are recognised, for text that a template wrote; ``marks`` then says which
        occurrences came from outside and stay text all the same.

        The seam: the string is cut at the recognised tokens only, and each piece between two of them is normalised,
        pre-tokenised and merged as one. That is where HuggingFace cuts too, so for outside text that contains no added token
        the ids are those of ``apply_chat_template(tokenize=True)``. Cutting around user content instead would be simpler and
        wrong: in ``user\\n`` + content the newline may belong to the same pre-token as the content's first characters.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # lone surrogates, which JSON can spell and UTF-8 cannot
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if not allow_special or self._added_pattern is None:
            return self._encode_text(text)
        ids: list[int] = []
        start = place = 0
        while match := self._added_pattern.search(text, place):
            if marks is not None and marks.forbid(match.start(), match.end()):
                place = match.start() + 1
                continue
            ids += self._encode_text(text[start : match.start()])
            ids.append(self._added_ids[match.lastindex - 1] if match.lastindex else 0)
            start = place = match.end()
        return ids + self._encode_text(text[start:])

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        # The batch call is the one that skips computing offsets.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    # -- ids to text ---------------------------------------------------------------------------------------------------

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for padding entries and ids outside the vocabulary."""
        if (added := self.added_tokens.get(token_id)) is not None:
            return added.content.encode()
        word = self._tokens[token_id] if 0 <= token_id < self.vocab_size else None
        if word is None:
            return b""
        try:
            return bytes([BYTE_OF_CHARACTER[c] for c in word])
        except KeyError:  # not in the byte-level alphabet: such an entry stands for itself
            return word.encode()

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ``token_ids``; bytes that are not UTF-8 become U+FFFD. Skips control tokens if asked (not ``<think>``)."""
        special = self.is_special if skip_special_tokens else lambda _: False
        return b"".join(self.token_bytes(i) for i in token_ids if not special(i)).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the token controls the conversation and is no part of the text (``<|im_end|>``; not ``<think>``)."""
        added = self.added_tokens.get(token_id)
        return added is not None and added.special

    def token_id(self, content: str) -> int | None:
        """Id of the added token spelled ``content``, or None."""
        return self._id_of_added.get(content)


class TextMarks:
    """Which places of a rendered template came from outside: offsets at which a suspicious piece of text begins or ends.

    :meth:`forbid` says whether a token found at [start, end) was written, in whole or in part, by the outside.
    """

    def __init__(self, begins: Iterable[int], ends: Iterable[int]) -> None:
        self._begins = frozenset(begins)
        self._ends = frozenset(ends)

    def forbid(self, start: int, end: int) -> bool:
        if start in self._begins or end in self._ends:
            return True
        return any(place in self._begins or place in self._ends for place in range(start + 1, end))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from ``path``; None when there is no such file. Raises :class:`UnsupportedCheckpoint`."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(f"not readable as JSON: {error}", str(path)) from None
    if not isinstance(value, dict):
        raise UnsupportedCheckpoint("expected a JSON object", str(path))
    return value


def _nfc() -> Any:
    from tokenizers import normalizers

    return normalizers.NFC()


def _qwen_pre_tokenizer(pre: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[pre]), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _components(spec: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    """Normaliser and pre-tokenizer that a ``tokenizer.json`` describes (taken from a copy of it with an empty model)."""
    import tokenizers

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    shell: dict[str, Any] = {"version": "1.0", "model": empty, "added_tokens": []}
    shell |= {key: spec.get(key) for key in ("normalizer", "pre_tokenizer")}
    try:
        built = tokenizers.Tokenizer.from_str(json.dumps(shell))
    except Exception as error:  # the library raises plain Exception
        raise UnsupportedCheckpoint(f"tokenizer parts not understood: {error}", where) from None
    return built.normalizer, built.pre_tokenizer


def _build(
    vocab: dict[str, int],
    merges: Sequence[Any],
    pre_tokenizer: Any,
    normalizer: Any,
    where: str,
    *,
    ignore_merges: bool = False,
) -> tokenizers.Tokenizer:
    """The merging machine. Building it from Python objects is the fastest of the library's routes: 0.25 s for Qwen's 151 k
    tokens, where parsing an equivalent ``tokenizer.json`` takes 0.4 s.
    """
    import tokenizers
    from tokenizers import models

    try:
        pairs: Any = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges))
    except Exception as error:  # the library raises plain Exception
        raise UnsupportedCheckpoint(f"tokenizer merges do not fit its tokens: {error}", where) from None
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    return backend
