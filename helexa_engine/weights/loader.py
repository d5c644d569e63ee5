"""Fills a model from a checkpoint, tensor by tensor, so that never more than one of them is in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from ..errors import InvalidRequest, UnsupportedCheckpoint
from ..quant import types
from ..quant.dequantize import dequantize
from ..quant.types import QuantType
from .checkpoint import Checkpoint, RawTensor

#: Called with (stage, share done from 0 to 1).
Progress = Callable[[str, float], None]

_IGNORED = ("rotary_emb.inv_freq", "rope_freqs.weight")


class Slot(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    def load(self, raw: Any) -> None: ...


class Loadable(Protocol):
    def parameters_wanted(self) -> Mapping[str, Slot]: ...


def load(model: Loadable, checkpoint: Checkpoint, *, dtype: str = "auto", progress: Progress | None = None) -> None:
    """Loads every parameter that ``model`` wants.

    Args:
        dtype: ``auto`` keeps what the file has; ``float32``, ``float16``, ``bfloat16`` converts unquantised matrices.
        progress: called after each tensor.

    Raises:
        UnsupportedCheckpoint: a tensor is missing, unexpected or of the wrong shape; nothing is loaded then.
    """
    wanted = model.parameters_wanted()
    _check(wanted, checkpoint)
    total = sum(checkpoint.tensor(name).nbytes for name in wanted) or 1
    done = 0
    for name, slot in wanted.items():
        raw = checkpoint.tensor(name)
        slot.load(convert(raw, dtype))
        checkpoint.release(name)
        done += raw.nbytes
        if progress is not None:
            progress("loading weights", done / total)


def _check(wanted: Mapping[str, Slot], checkpoint: Checkpoint) -> None:
    present = set(checkpoint.tensor_names())
    missing = [name for name in wanted if name not in present]
    if missing:
        raise UnsupportedCheckpoint(
            f"{len(missing)} tensors are missing: {', '.join(missing[:10])}", str(checkpoint.path)
        )
    unexpected = [name for name in present if name not in wanted and not name.endswith(_IGNORED)]
    if unexpected:
        listed = ", ".join(sorted(unexpected)[:10])
        raise UnsupportedCheckpoint(
            f"{len(unexpected)} tensors are not part of {checkpoint.architecture}: {listed}", str(checkpoint.path)
        )
    for name, slot in wanted.items():
        shape = checkpoint.tensor(name).shape
        if tuple(shape) != tuple(slot.shape):
            raise UnsupportedCheckpoint(
                f"expected shape {list(slot.shape)}, got {list(shape)}", f"{checkpoint.path}: tensor {name!r}"
            )


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
    if raw.quant_type is types.F64:
        values = raw.data.view(np.float64).astype(np.float32)
    else:
        values = np.ascontiguousarray(dequantize(raw.quant_type, raw.data, raw.shape), np.float32).reshape(-1)
    if target is types.F32:
        data = values.view(np.uint8)
    elif target is types.F16:
        data = values.astype(np.float16).view(np.uint8)
    else:
        bits = values.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        data = np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).view(np.uint8)
    return RawTensor(raw.name, target, raw.shape, data)
