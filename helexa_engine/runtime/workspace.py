"""Bytes that steps need besides weights, pages and states: activations, logits, and what recorded decode steps keep. No torch."""

from __future__ import annotations

from ..config import EngineConfig
from ..models.config import ModelConfig
from .memory import LOGITS_ROWS, MOST_RECORDED, graph_sizes

#: Tokens that ``moe_matmul`` computes together on the CPU (``kSliceRows`` of csrc/cpu/moe_matmul.cpp).
SLICE_ROWS = 512

#: New tokens of a sequence up to which attention on CUDA splits its context, and the most parts (csrc/cuda/paged_attention.cuh).
FEW_TOKENS, MOST_SPLITS = 8, 64

#: Decoded weights and their products, where a step is large enough for the library's product (``SCRATCH_BYTES`` of
#: ops/quant_matmul/cuda_matmul.py, for each; ``LIBRARY_ROWS_BF16`` tokens).
LIBRARY_BYTES, LIBRARY_ROWS = 128 << 20, 128


def workspace_bytes(model: ModelConfig, config: EngineConfig, device: str) -> int:
    """Of the largest step on ``device``, ``cpu`` or ``cuda``."""
    return _on_cuda(model, config) if device == "cuda" else _on_cpu(model, config)


def rounding_bytes(nbytes: int) -> int:
    """What torch's allocator takes on a device beyond a tensor of so many bytes: from 10 MiB on it gives whole pieces of 2 MiB. Smaller
    ones share pieces of 20 MiB."""
    return -nbytes % (2 << 20) if nbytes >= 10 << 20 else 0


def _on_cpu(model: ModelConfig, config: EngineConfig) -> int:
    """Float32 activations of the largest step, the logits, and what the recorded decode steps keep.

    The step's are counted three times, and every buffer of a layer though no two blocks need theirs at one time: the system's
    allocator keeps what was freed in pieces that do not suit what is asked for next, and that was measured to be so much.
    """
    mixers = _mixer_widths(model)
    experts = min(config.max_num_batched_tokens, SLICE_ROWS) * _experts_width(model)
    step = config.max_num_batched_tokens * (model.hidden_size + max(mixers) + model.intermediate_size)
    most_recorded = min(config.max_num_seqs, MOST_RECORDED)
    sequences = most_recorded * (most_recorded + 1) // 2
    layers = sum(mixers) + len(mixers) * model.intermediate_size
    recorded = sequences * (model.hidden_size + layers + model.vocab_size)
    return 4 * (3 * step + experts + _logits(model, config) + recorded)


def _on_cuda(model: ModelConfig, config: EngineConfig) -> int:
    """Float32 activations of the largest step with their copies for products (bfloat16 or smaller), the logits (twice, for log
    probabilities are of those before penalties), and the same of the graphs, which have memory of their own: one step's
    activations for all, as they share it, and each its results.

    Half as much again for what torch's allocator keeps in pieces that do not suit what is asked for next.
    """
    feed_forward = (
        _experts_width(model) if model.num_experts else 3 * model.intermediate_size
    )  # gate | up, and their product
    token = 2 * model.hidden_size + max(*_mixer_widths(model), feed_forward)
    sizes = graph_sizes(config.max_num_seqs) if config.cuda_graphs else []
    largest = max(sizes, default=0)
    graphs = largest * token + _splits(model, largest, 1) + sum(sizes) * (model.hidden_size + model.vocab_size)
    activations = (4 + 2) * config.max_num_batched_tokens * token + 4 * _splits(model, config.max_num_seqs, FEW_TOKENS)
    library = LIBRARY_BYTES if config.max_num_batched_tokens >= LIBRARY_ROWS else 0
    return (activations + 4 * (2 * _logits(model, config) + graphs)) * 3 // 2 + library


def _splits(model: ModelConfig, num_sequences: int, new_tokens: int) -> int:
    """Floats in which attention keeps what it has of the parts of long contexts, for sequences of up to so many new tokens
    (``decode_workspace_floats`` of csrc/cuda/paged_attention_decode.cu)."""
    splits = min(max(128 // model.num_key_value_heads, 8), MOST_SPLITS)
    return num_sequences * new_tokens * model.num_attention_heads * splits * (model.head_dim + 2)


def _mixer_widths(model: ModelConfig) -> list[int]:
    """Floats a token of what each layer's attention or delta net passes on."""
    heads = model.num_attention_heads * (2 if model.attn_output_gate else 1) + 2 * model.num_key_value_heads
    attention = (heads + model.num_attention_heads) * model.head_dim  # q|k|v and the context
    values = model.linear_num_value_heads * model.linear_value_head_dim
    conv = 2 * model.linear_num_key_heads * model.linear_key_head_dim + values
    delta_net = 2 * conv + 2 * values + 2 * model.linear_num_value_heads
    return [attention if kind == "full_attention" else delta_net for kind in model.layer_types]


def _experts_width(model: ModelConfig) -> int:
    """Floats a token of its experts: inputs side by side, gated products and outputs; then the router's inputs and logits. 0 without."""
    if not model.num_experts:
        return 0
    widths = (model.num_experts_per_tok, model.moe_intermediate_size), (1, model.shared_expert_intermediate_size)
    chosen = sum(count * 2 * (width + model.hidden_size) for count, width in widths if width)
    return chosen + 2 * model.hidden_size + model.num_experts


def _logits(model: ModelConfig, config: EngineConfig) -> int:
    return max(config.max_num_seqs, LOGITS_ROWS) * (model.vocab_size + model.hidden_size)
