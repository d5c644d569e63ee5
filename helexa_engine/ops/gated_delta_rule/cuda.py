"""``gated_delta_rule`` on a CUDA device: ``csrc/cuda/gated_delta_rule.cu`` token by token, prompts by the chunk form of ``triton.py``.

Which form a token goes through depends on its own sequence alone, so a sequence gets the same bits whatever runs beside it: whole
chunks through the chunk form, what is left of a sequence token by token. Where Triton is not installed, and under the emulation of
``csrc/simt`` (whose tensors only Triton's interpreter could take), every token goes through the kernel: the same results, but a
prompt takes a few hundred nanoseconds a token and layer. On a card that is said once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch

from .. import cuda
from ..causal_conv1d import cuda as convolution
from ..packed_sequences import address_of, row_stride

OP = "gated_delta_rule"

#: The convolution that :func:`gated_delta_step` has built in, and gives the bits of.
CONVOLUTION = convolution

#: Tokens of a sequence that :func:`gated_delta_step` is quick with; it takes any number.
STEP_TOKENS = 8

_MOST_ARRIVALS = 1 << 16  # sequences times key heads of a step
_arrivals_on: dict[torch.device, torch.Tensor] = {}

logger = logging.getLogger("helexa.ops")


def gated_delta_rule(
    qkv: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    a_coefficient: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    recurrent_state: torch.Tensor,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool,
) -> torch.Tensor:
    """See :func:`helexa_engine.ops.gated_delta_rule.reference.gated_delta_rule`; head dims are multiples of 16 up to 128.

    Cut at multiples of the chunk (32 or 64 tokens) a sequence gets the same bits as in one piece; token by token at any cut. Slots
    and borders lie on the device and are taken on trust. Tokens behind the last border belong to no sequence: their rows hold
    anything.

    Raises:
        ValueError: a tensor of another shape, dtype or device, or heads that the kernel does not take.
    """
    arguments = (qkv, z, b, a, a_coefficient, dt_bias, norm_weight, eps, recurrent_state, state_slots, cu_seqlens)
    heads = (num_k_heads, num_v_heads, tiled)
    pointers = _pointers(*arguments, *heads)
    form = None if qkv.shape[0] == state_slots.shape[0] else _chunk_form(qkv.device)  # else no sequence has a chunk
    chunks = None
    if form is not None:
        chunks = form.chunks(*arguments, num_k_heads=num_k_heads, num_v_heads=num_v_heads, tiled=tiled)
    if chunks is None:
        out, chunk, chunk_from = torch.empty(z.shape, dtype=torch.float32, device=z.device), 0, 0
    else:
        out, chunk, chunk_from = chunks
    if qkv.shape[0]:
        cuda.require_kernels().gated_delta_rule(
            *pointers, out.data_ptr(), chunk=chunk, chunk_from=chunk_from, stream=cuda.stream(qkv)
        )
    return out


def gated_delta_step(
    qkv: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_state: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    a_coefficient: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    recurrent_state: torch.Tensor,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool,
) -> torch.Tensor:
    """``gated_delta_rule(causal_conv1d(qkv, conv_weight, conv_state, ...), z, ...)`` in one launch, token by token.

    For decode steps, and a few tokens a sequence; any number gives the bits of the two ops in turn (the delta rule's token by
    token). Arguments as in those. The first call on a device allocates a counter, so it must not be within a graph's capture.

    Raises:
        ValueError: as :func:`gated_delta_rule` and :func:`CONVOLUTION.causal_conv1d`.
        RuntimeError: the first call on a device, while a graph is captured.
    """
    heads = (num_k_heads, num_v_heads, tiled)
    pointers = _pointers(
        qkv, z, b, a, a_coefficient, dt_bias, norm_weight, eps, recurrent_state, state_slots, cu_seqlens, *heads
    )
    channels, taps = qkv.shape[1], conv_weight.shape[-1]
    arrivals = _arrivals(qkv.device)
    if state_slots.shape[0] * num_k_heads > _MOST_ARRIVALS:
        raise ValueError(
            f"{OP}: state_slots: expected at most {_MOST_ARRIVALS // num_k_heads} sequences, got {state_slots.shape[0]}"
        )
    convolution_pointers = {
        "conv_weight": address_of(OP, "conv_weight", conv_weight, torch.float32, (channels, taps), qkv),
        "conv_state": address_of(
            OP, "conv_state", conv_state, torch.float32, (conv_state.shape[0], taps - 1, channels), qkv
        ),
    }
    out = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    if qkv.shape[0]:
        cuda.require_kernels().gated_delta_rule(
            *pointers,
            out.data_ptr(),
            **convolution_pointers,
            taps=taps,
            arrivals=arrivals.data_ptr(),
            stream=cuda.stream(qkv),
        )
    return out


def _pointers(
    qkv: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    a_coefficient: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    recurrent_state: torch.Tensor,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool,
) -> tuple[float, ...]:
    """The kernel's arguments up to ``out``, checked. Raises ValueError."""
    num_tokens, num_sequences = qkv.shape[0], state_slots.shape[0]
    num_slots, _, head_k_dim, head_v_dim = recurrent_state.shape
    value_dim = num_v_heads * head_v_dim
    rows: list[int] = []
    for name, tensor, width in (
        ("qkv", qkv, 2 * num_k_heads * head_k_dim + value_dim),
        ("z", z, value_dim),
        ("b", b, num_v_heads),
        ("a", a, num_v_heads),
    ):
        rows += (tensor.data_ptr(), row_stride(OP, name, tensor, (num_tokens, width)))
    state_shape = (num_slots, num_v_heads, head_k_dim, head_v_dim)
    return (
        *rows,
        address_of(OP, "a_coefficient", a_coefficient, torch.float32, (num_v_heads,), qkv),
        address_of(OP, "dt_bias", dt_bias, torch.float32, (num_v_heads,), qkv),
        address_of(OP, "norm_weight", norm_weight, torch.float32, (head_v_dim,), qkv),
        eps,
        address_of(OP, "recurrent_state", recurrent_state, torch.float32, state_shape, qkv),
        address_of(OP, "state_slots", state_slots, torch.int32, (num_sequences,), qkv),
        address_of(OP, "cu_seqlens", cu_seqlens, torch.int32, (num_sequences + 1,), qkv),
        num_sequences,
        num_k_heads,
        num_v_heads,
        head_k_dim,
        head_v_dim,
        tiled,
    )


def _chunk_form(device: torch.device) -> ModuleType | None:
    """``triton.py`` where it can run."""
    form = _triton()
    if form is None:
        if device.type == "cuda":
            _say_that_triton_is_missing()
        return None
    return form if form.runs_on(device) else None


@functools.cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("helexa_engine.ops.gated_delta_rule.triton")


@functools.cache
def _say_that_triton_is_missing() -> None:
    logger.warning(
        "%s: the package triton is not installed: prompts go token by token, same results but slower; pip install triton",
        OP,
    )


def _arrivals(device: torch.device) -> torch.Tensor:
    """Counters of the blocks that have read a key head's part of a convolution state; 0 between launches."""
    found = _arrivals_on.get(device)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{OP}: the first step on {device} must be outside a graph's capture: run it once before"
            )
        found = _arrivals_on[device] = torch.zeros(_MOST_ARRIVALS, dtype=torch.int32, device=device)
    return found
