"""Fills a model from a checkpoint, tensor by tensor, so that never more than one of them is in memory twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..errors import InvalidRequest, UnsupportedCheckpoint
from ..quant import mixes, types
from ..quant.quantize import quantize
from ..quant.types import QuantType
from .checkpoint import Checkpoint
from .quantized_file import encoded_pieces
from .raw_tensor import RawTensor

#: Called with (stage, share done from 0 to 1).
Progress = Callable[[str, float], None]

# A constant that old checkpoints stored; a hint about the range of activations.
_IGNORED = ("rotary_emb.inv_freq", ".input_scale")


class Slot(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    def load(self, raw: Any) -> None: ...


@runtime_checkable
class MappableSlot(Slot, Protocol):
    """A slot that can also leave its weights where the file is mapped."""

    def map(self, raw: Any) -> None: ...


class Loadable(Protocol):
    def parameters_wanted(self) -> Mapping[str, Slot]: ...


def load(
    model: Loadable,
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    quant: str | None = None,
    mmap_experts: bool = False,
    progress: Progress | None = None,
) -> None:
    """Loads every parameter that ``model`` wants.

    Args:
        quant: a mix of :mod:`helexa_engine.quant.mixes` (``Q4_K_M``) to quantise unquantised matrices to, instead of ``dtype``.
        dtype: ``auto`` keeps what the file has; ``float32``, ``float16``, ``bfloat16`` converts unquantised matrices.
        mmap_experts: experts stay in the mapped file, see :func:`expert_names`.
        progress: called after each tensor.

    Raises:
        InvalidRequest: there is no such dtype or mix, or the experts cannot stay in the file.
        UnsupportedCheckpoint: a tensor is missing, unexpected or of the wrong shape; nothing is loaded then.
    """
    types_wanted = _mix_types(checkpoint, quant)
    mapped = expert_names(checkpoint, dtype=dtype, quant=quant) if mmap_experts else frozenset()
    wanted = model.parameters_wanted()
    check(wanted, checkpoint)
    total = sum(checkpoint.tensor(name).nbytes for name in wanted) or 1
    done = 0
    for name, slot in wanted.items():
        raw = checkpoint.tensor(name)
        if name in mapped:
            assert isinstance(slot, MappableSlot), name
            slot.map(raw)
        elif name in types_wanted:
            slot.load(requantize(raw, types_wanted[name], str(checkpoint.path)))
        else:
            slot.load(convert(raw, "float32" if mixes.stays_float32(name, raw.shape) else dtype))
        checkpoint.release(name)
        done += raw.nbytes
        if progress is not None:
            progress("loading weights", done / total)


def expert_names(checkpoint: Checkpoint, *, dtype: str = "auto", quant: str | None = None) -> frozenset[str]:
    """The tensors that ``mmap_experts`` leaves in the file; none in a dense model.

    Raises:
        InvalidRequest: it is no GGUF file, whose experts are stacked as they are used; or they would have to be converted.
    """
    names = frozenset(name for name in checkpoint.tensor_names() if ".mlp.experts." in name)
    if names and checkpoint.metadata is None:
        raise InvalidRequest(
            "mmap_experts",
            "expected a GGUF file; a HuggingFace folder's experts are no matrices that can stay where they are",
        )
    types_wanted = _mix_types(checkpoint, quant)
    for name in names:
        stored = checkpoint.tensor(name).quant_type
        if name in types_wanted or (stored.is_float and _FLOATS.get(dtype, stored) is not stored):
            raise InvalidRequest(
                "mmap_experts", f"the experts stay as the file has them, in {stored}; leave quant and dtype out"
            )
    return names


def check(wanted: Mapping[str, Slot], checkpoint: Checkpoint) -> None:
    """Raises :class:`UnsupportedCheckpoint` when a tensor is missing, unexpected or of the wrong shape."""
    present = set(checkpoint.tensor_names())
    missing = [name for name in wanted if name not in present]
    unexpected = sorted(name for name in present if name not in wanted and not name.endswith(_IGNORED))
    problems = [f"{len(missing)} tensors are missing: {', '.join(missing[:10])}"] if missing else []
    if unexpected:
        listed = ", ".join(unexpected[:10])
        problems.append(f"{len(unexpected)} tensors are not part of {checkpoint.architecture}: {listed}")
    if problems:
        raise UnsupportedCheckpoint("; ".join(problems), str(checkpoint.path))
    for name, slot in wanted.items():
        raw = checkpoint.tensor(name)
        if not raw.quant_type.is_float and not raw.quant_type.is_quantised:
            raise UnsupportedCheckpoint(
                f"expected weights, got numbers of type {raw.quant_type}", f"{checkpoint.path}: tensor {raw.label}"
            )
        shape = raw.shape
        if tuple(shape) != tuple(slot.shape):
            raise UnsupportedCheckpoint(
                f"expected shape {list(slot.shape)}, got {list(shape)}", f"{checkpoint.path}: tensor {raw.label}"
            )


def _mix_types(checkpoint: Checkpoint, quant: str | None, has_importance: bool = False) -> dict[str, QuantType]:
    """Names of the tensors that quantising on loading changes -> their types: matrices that the file has unquantised."""
    if quant is None:
        return {}
    mix = mixes.by_name(quant)
    if mix is None:
        raise InvalidRequest("quant", f"expected one of {', '.join(mixes.MIXES)}; got {quant!r}")
    matrices = [raw for raw in checkpoint.tensors if not mixes.stays_float32(raw.name, raw.shape)]
    if not any(raw.quant_type.is_float for raw in matrices):
        raise InvalidRequest("quant", "the weights are quantised already; load the file as it is, without quant")
    config = checkpoint.config
    changed = {}
    for raw in matrices:
        if raw.quant_type.is_float:
            target = mixes.quant_type_for(
                mix,
                raw.name,
                raw.shape,
                num_layers=int(config["num_hidden_layers"]),
                gqa_ratio=int(config["num_attention_heads"]) // int(config["num_key_value_heads"]),
                tied=bool(config.get("tie_word_embeddings")),
                has_importance=has_importance,
            )
            if target is not raw.quant_type:
                changed[raw.name] = target
    return changed


@dataclass(frozen=True, slots=True)
class LoadedTensor:
    """A tensor as loading leaves it. ``mapped``: where it is, in the file."""

    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    mapped: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in a file of this type."""
        return math.prod(self.shape) // self.quant_type.block_size * self.quant_type.block_bytes


def loaded_tensors(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    quant: str | None = None,
    has_importance: bool = False,
    mmap_experts: bool = False,
) -> list[LoadedTensor]:
    """What :func:`load` with these arguments makes of each tensor, from the headers alone; vectors and the like are float32 whatever
    the file has.

    With ``has_importance`` as if quantised with an importance matrix. Raises as :func:`load` does.
    """
    types_wanted = _mix_types(checkpoint, quant, has_importance)
    mapped = expert_names(checkpoint, dtype=dtype, quant=quant) if mmap_experts else frozenset()
    found = []
    for raw in checkpoint.tensors:
        target = types_wanted.get(raw.name, raw.quant_type)
        if mixes.stays_float32(raw.name, raw.shape) or target is types.F64:
            target = types.F32
        elif target.is_float and raw.name not in types_wanted:
            target = _FLOATS.get(dtype, target)
        found.append(LoadedTensor(raw.name, target, raw.shape, raw.name in mapped))
    return found


def requantize(raw: RawTensor, target: QuantType, where: str) -> RawTensor:
    """A matrix, or one an expert, in another type, a few rows in float32 at a time. Raises UnsupportedCheckpoint on NaN or infinity."""
    out, at = np.empty(math.prod(raw.shape[:-1]) * target.row_bytes(raw.shape[-1]), np.uint8), 0
    for piece in encoded_pieces(raw, target, where):
        out[at : at + piece.size] = piece.reshape(-1)
        at += piece.size
    return RawTensor(raw.name, target, raw.shape, out)


def convert(raw: RawTensor, dtype: str) -> RawTensor:
    """``raw`` with unquantised values in ``dtype``; quantised tensors and ``auto`` pass through."""
    target = _FLOATS.get(dtype)
    if dtype != "auto" and target is None:
        raise InvalidRequest("dtype", f"expected auto, {', '.join(_FLOATS)}; got {dtype!r}")
    if not raw.quant_type.is_float or target in (None, raw.quant_type):
        return raw if raw.quant_type is not types.F64 else _cast(raw, types.F32)
    assert target is not None
    return _cast(raw, target)


_FLOATS: dict[str, QuantType] = {"float32": types.F32, "float16": types.F16, "bfloat16": types.BF16}


def _cast(raw: RawTensor, target: QuantType) -> RawTensor:
    return RawTensor(raw.name, target, raw.shape, quantize(raw.values(), target).reshape(-1), scales=raw.scales)
