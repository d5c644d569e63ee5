"""A checkpoint written as a GGUF file in a mix of types, one tensor in memory at a time.

From a HuggingFace folder the file gets the conventions of its architecture's GGUF files (see :mod:`.canonical`); from a GGUF file
everything is copied but the types of the matrices.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest, ModelDoesNotFit, UnsupportedCheckpoint
from ..ops.quantize import quantize
from ..quant import mixes, types
from ..quant.dequantize import dequantize
from ..quant.mixes import Mix
from ..quant.types import QuantType
from . import canonical, gguf_names
from .checkpoint import Checkpoint, FolderCheckpoint, GGUFCheckpoint
from .gguf_writer import GGUFWriter
from .imatrix import ImportanceMatrix
from .raw_tensor import RawTensor, scaled

#: Called with the share done, from 0 to 1.
Progress = Callable[[float], None]

QUANTIZATION_VERSION = 2  # of ggml's block formats
_VALUES_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the file to be: its GGUF name, where it comes from, and its type."""

    name: str
    raw: RawTensor
    target: QuantType

    @property
    def nbytes(self) -> int:
        return math.prod(self.raw.shape[:-1]) * self.target.row_bytes(self.raw.shape[-1])


def encoded_pieces(
    raw: RawTensor, target: QuantType, where: str, importance: npt.NDArray[np.float32] | None = None
) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a tensor in another type, its scales multiplied in, some rows at a time.

    Args:
        importance: [matrices, columns], the matrices being those of a stack of experts.

    Raises:
        UnsupportedCheckpoint: NaN or infinite values.
    """
    rows, cols = math.prod(raw.shape[:-1]), raw.shape[-1]
    source = raw.data.reshape(rows, -1)
    encode = quantize.choose("cpu").quantize
    one_by_one = importance is not None or len(raw.scales) > 1
    matrices = math.prod(raw.shape[:-2]) if one_by_one else 1
    step = max(1, _VALUES_AT_ONCE // cols)
    for matrix in range(matrices):
        end = rows // matrices * (matrix + 1)
        for start in range(rows // matrices * matrix, end, step):
            part = source[start : min(start + step, end)]
            values = _values(raw.quant_type, part, cols)
            if raw.scales:
                values = values * np.float32(raw.scales[matrix % len(raw.scales)])
            if not np.isfinite(values).all():
                raise UnsupportedCheckpoint(
                    "NaN or infinite weights cannot be quantised", f"{where}: tensor {raw.name!r}"
                )
            yield encode(values, target, None if importance is None else importance[matrix])


def _values(quant_type: QuantType, rows: npt.NDArray[np.uint8], cols: int) -> npt.NDArray[np.float32]:
    """float32 [rows, cols]"""
    if quant_type is types.F64:
        return np.ascontiguousarray(rows).view(np.float64).astype(np.float32)
    return np.asarray(dequantize(quant_type, rows, (len(rows), cols)), np.float32)


def plan(
    checkpoint: Checkpoint, mix: Mix, *, has_importance: bool, allow_requantize: bool, keep_mtp: bool
) -> list[PlannedTensor]:
    """The tensors of the file.

    The MTP block of a folder is one more block, and as in llama.cpp's files the mixes count it among the others.

    Raises:
        InvalidRequest: weights are quantised already and ``allow_requantize`` is false.
        UnsupportedCheckpoint: a tensor that GGUF has no name for.
    """
    config = checkpoint.config
    named = _stored(checkpoint) if isinstance(checkpoint, GGUFCheckpoint) else _converted(checkpoint, keep_mtp)
    blocks = {name.split(".")[1] for name, _, _ in named if name.startswith("blk.")}
    choose = partial(
        mixes.quant_type_for,
        mix,
        num_layers=len(blocks),
        gqa_ratio=int(config["num_attention_heads"]) // int(config["num_key_value_heads"]),
        tied=bool(config.get("tie_word_embeddings")),
        has_importance=has_importance,
    )
    scales = {raw.name.removesuffix("scale") + "weight": raw for _, _, raw in named if raw.name.endswith(".scale")}
    planned, folded = [], set()
    for name, hf_name, raw in named:
        if hf_name is None:  # not read by any model here: as it is
            planned.append(PlannedTensor(name, raw, raw.quant_type))
            continue
        target = choose(hf_name, raw.shape)
        if raw.quant_type.is_quantised and raw.quant_type is not target and not allow_requantize:
            raise InvalidRequest(
                "allow_requantize",
                f"{checkpoint.path} is quantised already (tensor {name!r} is {raw.quant_type}); quantise the original "
                "weights, or give --allow-requantize and lose accuracy twice",
            )
        if name in scales and target is not raw.quant_type:
            raw = scaled(raw, scales[name], str(checkpoint.path))
            folded |= {name.removesuffix("weight") + suffix for suffix in ("scale", "input_scale")}
        planned.append(PlannedTensor(name, raw, target))
    return [tensor for tensor in planned if tensor.name not in folded]


def _stored(checkpoint: GGUFCheckpoint) -> list[tuple[str, str | None, RawTensor]]:
    """(GGUF name, HuggingFace name or None, tensor) of a GGUF file, as it is."""
    layer_types = list(checkpoint.config.get("layer_types", ()))
    return [(raw.name, gguf_names.hf_name(raw.name, layer_types), raw) for raw in checkpoint.stored_tensors()]


def _converted(checkpoint: Checkpoint, keep_mtp: bool) -> list[tuple[str, str | None, RawTensor]]:
    """(GGUF name, HuggingFace name, tensor) of a HuggingFace folder, in GGUF's conventions."""
    assert isinstance(checkpoint, FolderCheckpoint)
    checkpoint.tile_value_heads()
    architecture, where = checkpoint.architecture, str(checkpoint.path)
    tensors = {raw.name: raw for raw in checkpoint.tensors if not raw.name.endswith("rotary_emb.inv_freq")}
    if keep_mtp:
        tensors |= checkpoint.mtp_block()
    if architecture == "qwen3next":
        for name in [name for name in tensors if name.endswith(".linear_attn.in_proj_b.weight")]:
            b, a = tensors.pop(name), tensors.pop(name.replace("in_proj_b", "in_proj_a"))
            merged = name.replace("in_proj_b", "in_proj_ba")
            tensors[merged] = canonical.merge_ba(checkpoint.config, b, a, merged, where)
    named: list[tuple[str, str | None, RawTensor]] = []
    for name, raw in tensors.items():
        theirs = gguf_names.gguf_name(name, architecture)
        if theirs is None:
            raise UnsupportedCheckpoint("GGUF has no name for it", f"{where}: tensor {name!r}")
        if name.endswith(".shared_expert_gate.weight"):
            raw = raw.presented(name, (math.prod(raw.shape),))
        named.append((theirs, name, raw))
    return sorted(named, key=_file_order)


def _file_order(named: tuple[str, str | None, RawTensor]) -> tuple[int, str]:
    """The embedding and what stands beside it first, then block by block."""
    name = named[0]
    return (int(name.split(".")[1]) if name.startswith("blk.") else -1, "" if name.startswith("blk.") else name)


def write(
    checkpoint: Checkpoint,
    path: Path,
    mix: Mix,
    tensors: Sequence[PlannedTensor],
    *,
    name: str,
    text_metadata: Mapping[str, Any],
    importance: ImportanceMatrix | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the file. ``path`` appears when it is complete, and replaces what stood there; a failure leaves nothing behind.

    Args:
        tensors: from :func:`plan`.
        name: what the model is called (``general.name``), and
        text_metadata: ``tokenizer.*``, both of a HuggingFace folder; of a GGUF file everything is copied.

    Raises:
        ModelDoesNotFit: the disk has too little room.
        InvalidRequest: the importance matrix does not fit.
        UnsupportedCheckpoint: NaN or infinite weights.
    """
    _check_room(path, sum(tensor.nbytes for tensor in tensors) + (64 << 20))
    where, total, done = str(checkpoint.path), sum(tensor.raw.nbytes for tensor in tensors) or 1, 0
    importances = {tensor.name: _importance(tensor, importance) for tensor in tensors}

    def pieces(tensor: PlannedTensor) -> Iterator[npt.NDArray[np.uint8]]:
        nonlocal done
        raw = tensor.raw
        if raw.quant_type is tensor.target:
            yield raw.data
        else:
            yield from encoded_pieces(raw, tensor.target, where, importances[tensor.name])
        checkpoint.release_stored(raw.stored_names)
        done += raw.nbytes
        if progress is not None:
            progress(done / total)

    own = {"general.name": name} | dict(text_metadata)
    mtp_blocks = sum(tensor.name.endswith(".nextn.eh_proj.weight") for tensor in tensors)
    with GGUFWriter(path) as writer:
        _write_metadata(writer, checkpoint, mix, own, importance, mtp_blocks)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.target, tensor.raw.shape, partial(pieces, tensor))


def _importance(tensor: PlannedTensor, importance: ImportanceMatrix | None) -> npt.NDArray[np.float32] | None:
    if importance is None or not tensor.target.is_quantised:
        return None
    shape = tensor.raw.shape
    return importance.of(tensor.name, math.prod(shape[:-2]), shape[-1])


def _check_room(path: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise InvalidRequest("destination", f"{path.parent}: {error.strerror}") from None
    if needed > free:
        raise ModelDoesNotFit(needed, free, f"the disk of {path.parent}", "free some, or write elsewhere")


def _write_metadata(
    writer: GGUFWriter,
    checkpoint: Checkpoint,
    mix: Mix,
    own: Mapping[str, Any],
    importance: ImportanceMatrix | None,
    mtp_blocks: int,
) -> None:
    if isinstance(checkpoint, GGUFCheckpoint):
        for key, stored in checkpoint.stored_metadata.items():
            if key != "general.alignment" and not key.startswith(("split.", "quantize.imatrix.")):
                writer.copy_metadata(key, stored)
    else:
        made = gguf_names.metadata_of(
            checkpoint.architecture, checkpoint.config, checkpoint.where, mtp_blocks=mtp_blocks
        )
        made |= gguf_names.sampling_metadata(checkpoint.generation_config)
        for key, value in (made | dict(own)).items():
            # Arrays of numpy keep their type: llama.cpp reads some as signed and takes nothing else.
            writer.add_metadata(key, value, value.dtype.name if isinstance(value, np.ndarray) else None)
    writer.add_metadata("general.quantization_version", QUANTIZATION_VERSION)
    writer.add_metadata("general.file_type", mix.file_type)
    if importance is not None:
        writer.add_metadata("quantize.imatrix.file", importance.path.name)
        writer.add_metadata("quantize.imatrix.entries_count", len(importance.entries), "int32")
        writer.add_metadata("quantize.imatrix.chunks_count", importance.chunks, "int32")
        if importance.datasets:
            writer.add_metadata("quantize.imatrix.dataset", importance.datasets[0])
