"""What loading a model will do, from headers alone: how many bytes for what, which context, which kernels. No torch.

:func:`plan_model` is what ``helexa plan`` prints and what :func:`.load.load_model` follows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..cache.spec import PAGE_SIZE, AttentionCacheSpec, CacheSpec, KvDtype, StateCacheSpec
from ..config import EngineConfig
from ..errors import InvalidRequest
from ..models.cache_specs import cache_specs
from ..models.config import ModelConfig
from ..ops.causal_conv1d import causal_conv1d
from ..ops.gated_delta_rule import gated_delta_rule
from ..ops.moe_matmul import moe_matmul
from ..ops.packed_bytes import packed_bytes
from ..ops.paged_attention import paged_attention
from ..ops.quant_embedding import quant_embedding
from ..ops.quant_matmul import quant_matmul
from ..ops.registry import Choice, native_core
from ..quant import mixes, types
from ..weights.checkpoint import Checkpoint
from ..weights.loader import LoadedTensor, loaded_tensors
from . import memory, quant_cache
from .memory import LOGITS_ROWS, MOST_RECORDED, MemoryPlan, available_bytes

#: Tokens that ``moe_matmul`` computes together (``kSliceRows`` of csrc/cpu/moe_matmul.cpp).
SLICE_ROWS = 512


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A load that was found possible.

    Attributes:
        name: what the model is called.
        path: file or folder.
        architecture: GGUF's word for it.
        device: where it runs.
        config: its shape.
        specs: what each layer remembers.
        kv_dtype: storage type of keys and values.
        memory: bytes of everything, and what may be served with them.
        type_bytes: bytes of the weights in memory, mapped experts left out, by quant type, the largest first.
        kernels: op -> the implementation that was chosen.
        from_quant_cache: quantised weights come from a file in the cache, where they are put first if they are not there.
    """

    name: str
    path: Path
    architecture: str
    device: str
    config: ModelConfig
    specs: list[CacheSpec]
    kv_dtype: KvDtype
    memory: MemoryPlan
    type_bytes: dict[str, int]
    kernels: dict[str, Choice]
    from_quant_cache: bool = False


def plan_model(
    checkpoint: Checkpoint, config: EngineConfig, *, name: str, available: int | None = None, device: str = "cpu"
) -> ModelPlan:
    """Plans loading ``checkpoint``, which is left in the order of value heads that loading needs.

    Args:
        available: bytes that may be taken; default: what this machine has.

    Raises:
        ModelDoesNotFit: with the bytes that are missing.
        InvalidRequest: a setting that this model or another setting excludes.
        UnsupportedCheckpoint: its shape makes no sense, or no model here has it.
        BackendUnavailable: ``HELEXA_OPS`` or ``HELEXA_CPU_ISA`` asks for what cannot run.
    """
    if config.quant is not None:
        checkpoint.tile_value_heads()
    model = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
    from_quant_cache = config.quant is not None and config.quant_cache and quant_cache.can_hold(checkpoint)
    if config.imatrix is not None and not from_quant_cache:
        raise InvalidRequest(
            "imatrix",
            "expected quant beside it, quant_cache on and weights that are not quantised yet: importances count when a "
            "quantised file is written",
        )
    kv_dtype = _kv_dtype(config, checkpoint)
    specs = cache_specs(model, kv_dtype)
    kernels = _kernels(model, device)
    tensors = loaded_tensors(
        checkpoint,
        dtype=config.dtype,
        quant=config.quant,
        has_importance=config.imatrix is not None,
        mmap_experts=config.mmap_experts,
    )
    type_bytes: Counter[str] = Counter()
    for tensor in tensors:
        if not tensor.mapped:
            type_bytes[tensor.quant_type.name] += _bytes_in_memory(tensor, model, kernels)
    return ModelPlan(
        name=name,
        path=checkpoint.path,
        architecture=checkpoint.architecture,
        device=device,
        config=model,
        specs=specs,
        kv_dtype=kv_dtype,
        memory=plan_memory(
            model,
            specs,
            config,
            type_bytes.total(),
            available_bytes() if available is None else available,
            mapped_bytes=sum(tensor.nbytes for tensor in tensors if tensor.mapped),
        ),
        type_bytes=dict(type_bytes.most_common()),
        kernels=kernels,
        from_quant_cache=from_quant_cache,
    )


def _kernels(model: ModelConfig, device: str) -> dict[str, Choice]:
    """What the layers will choose, by op."""
    matmul = quant_matmul.decide(device, in_features=model.hidden_size)
    found = {
        "quant_embedding": quant_embedding.decide(device, packed_by=matmul.implementation),
        "quant_matmul": matmul,
        "paged_attention": paged_attention.decide(device, head_dim=model.head_dim),
    }
    if "linear_attention" in model.layer_types:
        found["causal_conv1d"] = causal_conv1d.decide(device, kernel_size=model.linear_conv_kernel_dim)
        found["gated_delta_rule"] = gated_delta_rule.decide(
            device, head_k_dim=model.linear_key_head_dim, head_v_dim=model.linear_value_head_dim
        )
    if model.num_experts:
        found["moe_matmul"] = moe_matmul.decide(device, hidden_size=model.hidden_size)
    return found


def instruction_set() -> tuple[str, int] | None:
    """The level that native kernels run at and their number of threads; None without the native core."""
    core = native_core()
    return None if core is None else (core.cpu_isa(), core.num_threads())


def _bytes_in_memory(tensor: LoadedTensor, model: ModelConfig, kernels: dict[str, Choice]) -> int:
    """Bytes that a layer holds of a tensor."""
    name, shape = tensor.name, tensor.shape
    if len(shape) < 2 or 0 in shape:
        return tensor.nbytes  # a vector, or a matrix that loading refuses with what it should be
    if ".mlp.shared_expert_gate." in name:
        return 0  # a row of the router
    if name.endswith(".mlp.gate.weight"):
        rows = shape[0] + (1 if model.shared_expert_intermediate_size else 0)
        return packed_bytes(kernels["moe_matmul"].implementation, types.F32, (rows, shape[1]))
    if mixes.stays_float32(name, shape):
        return tensor.nbytes
    op = "moe_matmul" if ".experts." in name or ".shared_expert." in name else "quant_matmul"
    return packed_bytes(kernels[op].implementation, tensor.quant_type, shape)


def _kv_dtype(config: EngineConfig, checkpoint: Checkpoint) -> KvDtype:
    """``auto`` is float32 where the matrices are float32, else float16."""
    if config.kv_dtype != "auto":
        return config.kv_dtype
    if config.quant is not None:
        return "float16"
    if config.dtype != "auto":
        return "float32" if config.dtype == "float32" else "float16"
    matrices = [tensor for tensor in checkpoint.tensors if len(tensor.shape) > 1]
    return "float32" if all(t.quant_type is types.F32 for t in matrices) else "float16"


def plan_memory(
    model_config: ModelConfig,
    specs: list[CacheSpec],
    config: EngineConfig,
    weight_bytes: int,
    available: int,
    mapped_bytes: int = 0,
) -> MemoryPlan:
    """The memory of a model of this shape with ``available`` bytes. Raises :class:`ModelDoesNotFit`, :class:`InvalidRequest`."""
    needed = PAGE_SIZE + config.max_num_seqs - 1
    if config.max_num_batched_tokens < needed:
        raise InvalidRequest(
            "max_num_batched_tokens",
            f"expected at least {needed}: a chunk of {PAGE_SIZE} tokens and a token of each other sequence "
            f"(max_num_seqs={config.max_num_seqs}) share a step; got {config.max_num_batched_tokens}",
        )
    if config.snapshot_interval % PAGE_SIZE:
        raise InvalidRequest(
            "snapshot_interval", f"expected a multiple of {PAGE_SIZE} tokens, got {config.snapshot_interval}"
        )
    return memory.plan(
        weight_bytes=weight_bytes,
        page_bytes=sum(spec.page_bytes for spec in specs if isinstance(spec, AttentionCacheSpec)),
        page_size=PAGE_SIZE,
        workspace_bytes=_workspace_bytes(model_config, config),
        state_slot_bytes=sum(spec.slot_bytes for spec in specs if isinstance(spec, StateCacheSpec)),
        position_page_bytes=4 * (PAGE_SIZE * model_config.rotary_dim + config.max_num_seqs),
        model_max_len=model_config.max_position_embeddings,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        available_bytes=available,
        memory_fraction=config.memory_fraction,
        mapped_bytes=mapped_bytes,
        num_snapshots=config.state_snapshots if config.prefix_cache else 0,
    )


def _workspace_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Float32 activations of the largest step, the logits, and what the recorded decode steps keep.

    The step's are counted three times, and every buffer of a layer though no two blocks need theirs at one time: the system's
    allocator keeps what was freed in pieces that do not suit what is asked for next, and that was measured to be so much.
    """
    heads = model.num_attention_heads * (2 if model.attn_output_gate else 1) + 2 * model.num_key_value_heads
    attention = (heads + model.num_attention_heads) * model.head_dim  # q|k|v and the context
    values = model.linear_num_value_heads * model.linear_value_head_dim
    conv = 2 * model.linear_num_key_heads * model.linear_key_head_dim + values
    delta_net = 2 * conv + 2 * values + 2 * model.linear_num_value_heads
    mixers = [attention if kind == "full_attention" else delta_net for kind in model.layer_types]
    experts = 0
    if model.num_experts:
        # The chosen experts of a slice's tokens: inputs side by side, gated products and outputs. Then the router's inputs and logits.
        widths = (model.num_experts_per_tok, model.moe_intermediate_size), (1, model.shared_expert_intermediate_size)
        chosen = sum(count * 2 * (width + model.hidden_size) for count, width in widths if width)
        experts = min(config.max_num_batched_tokens, SLICE_ROWS) * (chosen + 2 * model.hidden_size + model.num_experts)
    step = config.max_num_batched_tokens * (model.hidden_size + max(mixers) + model.intermediate_size)
    logits = max(config.max_num_seqs, LOGITS_ROWS) * (model.vocab_size + model.hidden_size)
    most_recorded = min(config.max_num_seqs, MOST_RECORDED)
    sequences = most_recorded * (most_recorded + 1) // 2
    layers = sum(mixers) + len(mixers) * model.intermediate_size
    recorded = sequences * (model.hidden_size + layers + model.vocab_size)
    return 4 * (3 * step + experts + logits + recorded)
