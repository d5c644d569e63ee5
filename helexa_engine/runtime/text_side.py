"""The text side of a model on disk. No torch here: the server's process has it, beside a worker that has the model."""

from __future__ import annotations

from ..text.chat_template import ChatTemplate
from ..text.request_processor import RequestProcessor
from ..text.tokenizer import Tokenizer
from ..weights.checkpoint import Checkpoint


def request_processor(checkpoint: Checkpoint) -> RequestProcessor:
    """Tokenizer, template and sampling defaults of a model. Raises :class:`UnsupportedCheckpoint`."""
    if checkpoint.metadata is not None:
        tokenizer = Tokenizer.from_gguf(checkpoint.metadata, checkpoint.where)
    else:
        tokenizer = Tokenizer.from_folder(checkpoint.path)
    template = checkpoint.chat_template
    chat_template = ChatTemplate.for_tokenizer(template, tokenizer) if template else None
    return RequestProcessor(tokenizer, chat_template, checkpoint.generation_config)
