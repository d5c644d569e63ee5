"""Token ids to text, one token at a time and byte-exact: :class:`Detokenizer`."""

from __future__ import annotations

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """What is needed of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for."""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of visible text."""


class Detokenizer:
    """Decodes bytes, not tokens: a character spread over several tokens comes out with its last one.

    Bytes that can no longer become a character turn into U+FFFD as soon as that is certain, so all pieces joined equal
    ``Tokenizer.decode`` of all ids. Control tokens are skipped (``skip_special_tokens``).
    """

    def __init__(self, tokenizer: TokenBytes, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that is certain after this token; may be empty."""
        if self._skip and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The end: U+FFFD for a character that was left incomplete."""
        return self._decoder.decode(b"", final=True)
