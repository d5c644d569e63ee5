"""What loading a model will do, from headers alone: how many bytes for what, which context, which kernels. No torch.

:func:`plan_model` is what ``helexa plan`` prints and what :func:`.load.load_model` follows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..cache.spec import PAGE_SIZE, AttentionCacheSpec, CacheSpec, KvDtype, StateCacheSpec
from ..config import EngineConfig
from ..errors import BackendUnavailable, InvalidRequest
from ..models.cache_specs import cache_specs
from ..models.config import ModelConfig
from ..ops import cuda
from ..ops.causal_conv1d import causal_conv1d
from ..ops.gated_delta_rule import gated_delta_rule
from ..ops.moe_matmul import moe_matmul
from ..ops.packed_bytes import packed_bytes
from ..ops.paged_attention import paged_attention
from ..ops.quant_embedding import quant_embedding
from ..ops.quant_matmul import quant_matmul
from ..ops.registry import Choice, native_core
from ..ops.sample import sample
from ..quant import mixes, types
from ..weights.checkpoint import Checkpoint
from ..weights.loader import LoadedTensor, loaded_tensors
from . import cuda_device, cuda_facts, memory, quant_cache
from .memory import MemoryPlan, available_bytes
from .workspace import rounding_bytes, workspace_bytes


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A load that was found possible.

    Attributes:
        name: what the model is called.
        path: file or folder.
        architecture: GGUF's word for it.
        device: where it runs, ``cpu`` or ``cuda``.
        why_device: why it runs there.
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
    why_device: str
    config: ModelConfig
    specs: list[CacheSpec]
    kv_dtype: KvDtype
    memory: MemoryPlan
    type_bytes: dict[str, int]
    kernels: dict[str, Choice]
    from_quant_cache: bool = False


def plan_model(
    checkpoint: Checkpoint, config: EngineConfig, *, name: str, available: int | None = None, limit: int | None = None
) -> ModelPlan:
    """Plans loading ``checkpoint``, which is left in the order of value heads that loading needs.

    Args:
        available: bytes that may be taken; default: what the device has free. With them it is a plan for any machine, and a CUDA device
            need not be here.
        limit: bytes to make do with where more are available.

    Raises:
        ModelDoesNotFit: with the bytes that are missing.
        InvalidRequest: a setting that this model or another setting excludes.
        UnsupportedCheckpoint: its shape makes no sense, or no model here has it.
        BackendUnavailable: the device, ``HELEXA_OPS`` or ``HELEXA_CPU_ISA`` asks for what cannot run.
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
    device, why_device, kernels = _device_and_kernels(model, config, is_here=available is None)
    where = "this machine" if device == "cpu" else device
    if available is None and device == "cuda":
        available, where = cuda_device.free_bytes(), cuda_device.name()
    elif available is None:
        available = available_bytes()
    kv_dtype = _kv_dtype(config, checkpoint, device)
    specs = cache_specs(model, kv_dtype, device)
    tensors = loaded_tensors(
        checkpoint,
        dtype=config.dtype,
        quant=config.quant,
        has_importance=config.imatrix is not None,
        mmap_experts=config.mmap_experts,
    )
    type_bytes: Counter[str] = Counter()
    rounding = 0
    for tensor in tensors:
        if not tensor.mapped:
            nbytes = _bytes_in_memory(tensor, model, kernels)
            type_bytes[tensor.quant_type.name] += nbytes
            rounding += rounding_bytes(nbytes) if device == "cuda" else 0
    return ModelPlan(
        name=name,
        path=checkpoint.path,
        architecture=checkpoint.architecture,
        device=device,
        why_device=why_device,
        config=model,
        specs=specs,
        kv_dtype=kv_dtype,
        memory=plan_memory(
            model,
            specs,
            config,
            type_bytes.total(),
            available if limit is None else min(available, limit),
            device=device,
            where=where,
            rounding=rounding,
            mapped_bytes=sum(tensor.nbytes for tensor in tensors if tensor.mapped),
        ),
        type_bytes=dict(type_bytes.most_common()),
        kernels=kernels,
        from_quant_cache=from_quant_cache,
    )


def _device_and_kernels(
    model: ModelConfig, config: EngineConfig, *, is_here: bool
) -> tuple[str, str, dict[str, Choice]]:
    """Where the model runs, why there, and what its layers will choose there. ``auto`` is CUDA where every op has a kernel for this model
    and nothing else is in the way.

    Raises:
        BackendUnavailable, InvalidRequest: it was to be CUDA, and cannot be.
    """
    if config.device == "cpu":
        return "cpu", "asked for", _kernels(model, "cpu")
    obstacle = None
    if is_here or cuda.is_emulated():
        obstacle = cuda_device.diagnose()
    elif config.device == "auto":  # by what can be known without torch: a server plans so
        obstacle = cuda_device.diagnose(cuda_facts.gather_without_device())
    if obstacle is not None:
        if config.device == "cuda":
            cuda_device.require_cuda()
        return "cpu", f"not cuda: {obstacle}", _kernels(model, "cpu")
    if config.mmap_experts:
        reason = "expected false on cuda: experts in the mapped file are computed on the processor"
        if config.device == "cuda":
            raise InvalidRequest("mmap_experts", reason)
        return "cpu", f"mmap_experts: {reason}", _kernels(model, "cpu")
    kernels = _kernels(model, "cuda", is_here=is_here)
    slow = "; ".join(f"{op}: {choice.why}" for op, choice in kernels.items() if choice.is_fallback)
    if slow:
        if config.device == "cuda":
            raise BackendUnavailable(f"device cuda: there are no kernels for this model: {slow}")
        return "cpu", f"cuda has no kernels for this model: {slow}", _kernels(model, "cpu")
    return "cuda", "asked for" if config.device == "cuda" else "it can be used", kernels


def _kernels(model: ModelConfig, device: str, *, is_here: bool = True) -> dict[str, Choice]:
    """What the layers will choose, by op."""
    matmul = quant_matmul.decide(device, is_here=is_here, in_features=model.hidden_size)
    found = {
        "quant_embedding": quant_embedding.decide(device, is_here=is_here, packed_by=matmul.implementation),
        "quant_matmul": matmul,
        "paged_attention": paged_attention.decide(device, is_here=is_here, head_dim=model.head_dim),
    }
    if "linear_attention" in model.layer_types:
        found["causal_conv1d"] = causal_conv1d.decide(device, is_here=is_here, kernel_size=model.linear_conv_kernel_dim)
        found["gated_delta_rule"] = gated_delta_rule.decide(
            device, is_here=is_here, head_k_dim=model.linear_key_head_dim, head_v_dim=model.linear_value_head_dim
        )
    if model.num_experts:
        found["moe_matmul"] = moe_matmul.decide(device, is_here=is_here, hidden_size=model.hidden_size)
    if device == "cuda":  # the CPU's sampler is no op
        found["sample"] = sample.decide(device, is_here=is_here)
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


def _kv_dtype(config: EngineConfig, checkpoint: Checkpoint, device: str) -> KvDtype:
    """``auto`` is bfloat16 on CUDA; on the CPU float32 where the matrices are float32, else float16."""
    if config.kv_dtype != "auto":
        return config.kv_dtype
    if device == "cuda":
        return "bfloat16"
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
    *,
    device: str = "cpu",
    where: str = "this machine",
    rounding: int = 0,
    mapped_bytes: int = 0,
) -> MemoryPlan:
    """The memory of a model of this shape with ``available`` bytes on ``device``, which messages call ``where``.

    ``rounding`` are bytes that the weights take beside their own.

    Raises:
        ModelDoesNotFit, InvalidRequest.
    """
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
    page_bytes = sum(spec.page_bytes for spec in specs if isinstance(spec, AttentionCacheSpec))
    slot_bytes = sum(spec.slot_bytes for spec in specs if isinstance(spec, StateCacheSpec))
    workspace = workspace_bytes(model_config, config, device) + rounding
    if device == "cuda" and config.cuda_graphs:
        workspace += page_bytes + slot_bytes  # for the rows that fill a graph's batch up
    return memory.plan(
        weight_bytes=weight_bytes,
        page_bytes=page_bytes,
        page_size=PAGE_SIZE,
        workspace_bytes=workspace,
        state_slot_bytes=slot_bytes,
        position_page_bytes=4 * (PAGE_SIZE * model_config.rotary_dim + config.max_num_seqs),
        model_max_len=model_config.max_position_embeddings,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        available_bytes=available,
        memory_fraction=config.memory_fraction,
        mapped_bytes=mapped_bytes,
        num_snapshots=config.state_snapshots if config.prefix_cache else 0,
        device=where,
    )
