"""A model on disk as a quantised GGUF file: what ``helexa quantize`` and the cache of models quantised on loading do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from ..models.config import ModelConfig
from ..quant import mixes
from ..text.gguf_metadata import tokenizer_metadata
from ..weights import imatrix, loader, quantized_file
from ..weights.checkpoint import Checkpoint, FolderCheckpoint, open_checkpoint
from ..weights.quantized_file import Progress


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """What was written.

    Attributes:
        nbytes: size of the file.
        parameters: values in its tensors.
        types: bytes by type name, the largest first.
        left_out: how many tensors of the source are not in the file, by kind (``vision``, ``MTP``).
    """

    path: Path
    nbytes: int
    parameters: int
    types: dict[str, int]
    left_out: dict[str, int]

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(self.types.values()) / self.parameters


def quantize_model(
    source: Path,
    destination: Path,
    quant: str,
    *,
    name: str,
    importance_file: Path | None = None,
    allow_requantize: bool = False,
    keep_mtp: bool = True,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Writes ``source`` (a HuggingFace folder or a GGUF file) as a GGUF file in the mix ``quant``.

    Of a GGUF file everything is kept; of a folder the text model and, where it is whole, the block that predicts a further token.
    The vision encoder is left out: llama.cpp keeps it in a file of its own.

    Args:
        destination: appears when it is complete; a file of that name is replaced.
        name: what the model is called in the file.
        importance_file: llama.cpp's importance matrix, in either of its forms.
        allow_requantize: take weights that are quantised already.
        keep_mtp: write a folder's block that predicts a further token. Without it the file is what quantising on loading gives.

    Raises:
        InvalidRequest: no such mix; an importance matrix of another model; quantised weights that were not allowed.
        ModelNotFound, UnsupportedCheckpoint: of the source.
        ModelDoesNotFit: the disk has too little room.
    """
    mix = mixes.by_name(quant)
    if mix is None:
        raise InvalidRequest("type", f"expected one of {', '.join(mixes.MIXES)}; got {quant!r}")
    importance = None if importance_file is None else imatrix.read(importance_file)
    with open_checkpoint(source) as checkpoint:
        _check(checkpoint)
        tensors = quantized_file.plan(
            checkpoint,
            mix,
            has_importance=importance is not None,
            allow_requantize=allow_requantize,
            keep_mtp=keep_mtp,
        )
        text: dict[str, Any] = {}
        if isinstance(checkpoint, FolderCheckpoint):
            text = tokenizer_metadata(source, int(checkpoint.config["vocab_size"]), checkpoint.chat_template)
        quantized_file.write(
            checkpoint,
            destination,
            mix,
            tensors,
            name=name,
            text_metadata=text,
            importance=importance,
            progress=progress,
        )
    kept = {stored for tensor in tensors for stored in tensor.raw.stored_names}
    unused = checkpoint.unused if isinstance(checkpoint, FolderCheckpoint) else {}
    left_out = {kind: sum(raw.name not in kept for raw in raws) for kind, raws in unused.items()}
    by_type: dict[str, int] = {}
    for tensor in tensors:
        by_type[tensor.target.name] = by_type.get(tensor.target.name, 0) + tensor.nbytes
    return QuantizedModel(
        destination,
        destination.stat().st_size,
        sum(math.prod(tensor.raw.shape) for tensor in tensors),
        dict(sorted(by_type.items(), key=lambda item: -item[1])),
        {kind: count for kind, count in left_out.items() if count},
    )


def _check(checkpoint: Checkpoint) -> None:
    """Raises :class:`UnsupportedCheckpoint` unless it holds a whole model that helexa runs."""
    from ..models.registry import model_class  # brings torch, which planning does without

    build = model_class(checkpoint.architecture, checkpoint.where)
    config = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
    loader.check(build(config, 1).parameters_wanted(), checkpoint)
