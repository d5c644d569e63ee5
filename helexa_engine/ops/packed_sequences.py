"""Checks of what several ops take: tensors by their address, sequences packed end to end, and the slot in which each keeps its
state."""

from __future__ import annotations

import torch


def check_packed_sequences(
    op: str, cu_seqlens: torch.Tensor, state_slots: torch.Tensor, num_tokens: int, num_slots: int
) -> list[tuple[int, int, int]]:
    """The sequences as ``(begin, end, slot)``: tokens ``begin:end``, which may be none.

    Args:
        op: name of the op, for the message.
        cu_seqlens: [N+1] int32, from 0 to ``num_tokens``, never falling.
        state_slots: [N] int32, ``0 <= slot < num_slots``, no two equal.

    Raises:
        ValueError: one of these does not hold; the message names the argument and its index.
    """
    if cu_seqlens.ndim != 1 or state_slots.ndim != 1 or cu_seqlens.shape[0] != state_slots.shape[0] + 1:
        raise ValueError(
            f"{op}: cu_seqlens: expected [{state_slots.numel() + 1}] for {state_slots.numel()} state_slots, "
            f"got {list(cu_seqlens.shape)}"
        )
    ends, slots = cu_seqlens.tolist(), state_slots.tolist()
    if ends[0] != 0:
        raise ValueError(f"{op}: cu_seqlens[0]: expected 0, got {ends[0]}")
    taken: set[int] = set()
    for i, slot in enumerate(slots):
        if not ends[i] <= ends[i + 1] <= num_tokens:
            raise ValueError(f"{op}: cu_seqlens[{i + 1}]: expected {ends[i]} to {num_tokens}, got {ends[i + 1]}")
        if not 0 <= slot < num_slots or slot in taken:
            raise ValueError(
                f"{op}: state_slots[{i}]: expected a slot of its own from 0 to {num_slots - 1}, got {slot}"
            )
        taken.add(slot)
    if ends[-1] != num_tokens:
        raise ValueError(f"{op}: cu_seqlens[{len(slots)}]: expected {num_tokens}, got {ends[-1]}")
    return list(zip(ends[:-1], ends[1:], slots, strict=True))


def address_of(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    beside: torch.Tensor | None = None,
) -> int:
    """The address of a contiguous tensor that is what it should be, on the device of ``beside``. Raises ValueError."""
    if beside is not None and tensor.device != beside.device:
        raise ValueError(f"{op}: {name}: expected a tensor on {beside.device}, got one on {tensor.device}")
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name}: expected contiguous {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            f"{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
    return tensor.data_ptr()


def row_stride(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, int]) -> int:
    """Floats from one row to the next of float32 activations, whose own numbers lie side by side. Raises ValueError."""
    rows, width = shape
    strides = tensor.stride()
    if tensor.dtype != torch.float32 or tensor.shape != shape or (width > 1 and strides[1] != 1):
        raise ValueError(
            f"{op}: {name}: expected float32 {list(shape)} with adjacent columns, got {tensor.dtype} {list(tensor.shape)} "
            f"with strides {list(strides)}"
        )
    return strides[0] if rows > 1 else width
