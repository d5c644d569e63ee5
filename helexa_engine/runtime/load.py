"""From a name to a running model: find the files, plan the memory, load, start the engine's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .. import env
from ..cache.page_pool import PagePool
from ..cache.prefix_cache import PrefixCache
from ..cache.spec import PAGE_SIZE, AttentionCacheSpec, CacheSpec, KvDtype, StateCacheSpec
from ..cache.state_pool import StatePool
from ..config import EngineConfig
from ..errors import InvalidRequest, ModelNotFound
from ..generate_request import GenerateRequest
from ..models.config import ModelConfig
from ..models.registry import model_class
from ..ops.registry import native_core
from ..quant import types
from ..text.chat_template import ChatTemplate
from ..text.request_processor import RequestProcessor
from ..text.tokenizer import Tokenizer
from ..weights import hub
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.loader import expert_names, required_bytes
from ..weights.loader import load as load_weights
from . import quant_cache
from .engine import LOGITS_ROWS, Engine, EngineRequest
from .engine_thread import EngineThread
from .memory import MemoryPlan, available_bytes, plan
from .model_runner import Model, ModelRunner
from .request_events import RequestEvents, engine_request
from .scheduler import Scheduler

log = logging.getLogger(__name__)

#: Called with (stage, share done from 0 to 1).
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a loaded model.

    Attributes:
        name: stem of the file, name of the folder, the hub id, or ``demo``.
        path: where it was loaded from.
        architecture: HuggingFace's ``model_type``.
        vocab_size: width of the logits.
        max_model_len: longest prompt plus answer, in tokens, derived from what fits.
        weight_bytes, kv_bytes, state_bytes, snapshot_bytes: memory taken by weights and reserved for KV pages, recurrent states
            and their snapshots in the prefix cache.
        capabilities: what may be asked of it, as its chat template was seen to do.
    """

    name: str
    path: Path
    architecture: str
    vocab_size: int
    max_model_len: int
    weight_bytes: int
    kv_bytes: int
    state_bytes: int
    snapshot_bytes: int = 0
    capabilities: dict[str, bool] = field(default_factory=dict)

    @property
    def limit(self) -> dict[str, int]:
        """``{context, input, output}`` in tokens: an answer needs a prompt of at least one token, and the other way round."""
        context = self.max_model_len
        return {"context": context, "input": context - 1, "output": context - 1}


def resolve_model(model: str | Path, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The file or folder of a model. A hub id is downloaded unless it is complete on disk.

    Raises:
        ModelNotFound, DownloadFailed.
    """
    if model == "demo":
        from .. import demo

        path = demo.path()
        if not path.is_file():
            raise ModelNotFound("demo", f"the demo model is missing from this installation ({path})")
        return path
    path = Path(model).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if not str(model):
        raise ModelNotFound("", "give a .gguf file, a HuggingFace folder, a hub id org/name, or demo")
    hub_id = hub.HubId.parse(model) if isinstance(model, str) else None
    if hub_id is None:
        raise ModelNotFound(
            str(model), "no such file or folder; give a .gguf file, a HuggingFace folder, a hub id org/name, or demo"
        )

    def report(transfer: hub.Transfer) -> None:
        if progress is not None:
            share = transfer.all_done_bytes / max(1, transfer.all_total_bytes)
            progress(f"downloading {transfer.file}", share)

    return hub.locate(hub_id, offline=offline or env.offline(), on_transfer=report)


def _name(model: str | Path, path: Path) -> str:
    """What the loaded model is called: a file's stem, a folder's name, and ``demo`` or a hub id as it was given."""
    if model == "demo" or not Path(model).expanduser().exists():
        return str(model)
    return path.stem if path.suffix == ".gguf" else path.resolve().name


class LoadedModel:
    """A model that runs: what :class:`helexa_engine.LLM` and :class:`helexa_engine.AsyncEngine` have in common."""

    def __init__(self, engine: Engine, processor: RequestProcessor, info: ModelInfo) -> None:
        self.tokenizer = processor.tokenizer
        self.info = info
        self._processor = processor
        self.thread = EngineThread(engine, info.name)

    def prepare(self, request: GenerateRequest) -> tuple[EngineRequest, RequestEvents]:
        """The request in the engine's terms, and what turns its tokens into events. Any thread may call this.

        Raises:
            InvalidRequest, TemplateRenderFailed: see :meth:`RequestProcessor.prepare`.
        """
        prepared = self._processor.prepare(request)
        return engine_request(request.request_id, prepared), RequestEvents(self._processor, prepared)

    def encode_chat(self, request: GenerateRequest) -> list[int]:
        """Token ids of the request's messages as the model would get them. Raises what :meth:`prepare` raises for them."""
        return self._processor.encode_chat(request)

    def warm_grammars(self) -> None:
        """Prepares for structured output now, so that no running answer waits for it later."""
        self._processor.grammars.warm()

    def close(self, timeout: float) -> bool:
        """Ends running requests and frees the model; False when the step under way took longer than ``timeout`` seconds."""
        return self.thread.close(timeout)


def load_model(model: str | Path, config: EngineConfig, progress: Progress | None = None) -> LoadedModel:
    """Loads a model and starts its engine. Blocks; see :class:`helexa_engine.LLM` for arguments and errors."""
    if config.num_threads is not None and (core := native_core()) is not None:
        core.set_num_threads(config.num_threads)
    report = progress or (lambda stage, fraction: None)
    path = resolve_model(model, offline=config.offline, progress=progress)
    report("reading the checkpoint", 0.0)
    with open_checkpoint(path) as checkpoint:
        if config.quant is not None:
            checkpoint.tile_value_heads()
        build = model_class(checkpoint.architecture, checkpoint.where)
        model_config = ModelConfig.from_checkpoint(checkpoint.architecture, checkpoint.config, checkpoint.where)
        specs = build.cache_specs(model_config, _kv_dtype(config, checkpoint))
        weight_bytes = required_bytes(
            checkpoint,
            dtype=config.dtype,
            quant=config.quant,
            has_importance=config.imatrix is not None,
            mmap_experts=config.mmap_experts,
        )
        mapped = expert_names(checkpoint, dtype=config.dtype, quant=config.quant) if config.mmap_experts else ()
        mapped_bytes = sum(checkpoint.tensor(name).nbytes for name in mapped)
        memory = plan_memory(model_config, specs, config, weight_bytes, mapped_bytes=mapped_bytes)
        log.info("%s: %s", path.name, memory)
        processor = _request_processor(checkpoint, model_config.vocab_size)
        net = build(model_config, memory.max_model_len)
        cached = _cached(checkpoint, config, _name(model, path), report)
        load_weights(
            net,
            cached or checkpoint,
            dtype=config.dtype,
            quant=None if cached else config.quant,
            mmap_experts=config.mmap_experts,
            progress=report,
        )
    engine = build_engine(net, specs, memory, config, model_config.vocab_size)
    info = ModelInfo(
        name=_name(model, path),
        path=path,
        architecture=checkpoint.architecture,
        vocab_size=model_config.vocab_size,
        max_model_len=memory.max_model_len,
        weight_bytes=weight_bytes,
        kv_bytes=memory.kv_bytes,
        state_bytes=memory.state_bytes,
        snapshot_bytes=memory.snapshot_bytes,
        capabilities=processor.capabilities(),
    )
    report("ready", 1.0)
    return LoadedModel(engine, processor, info)


def _cached(checkpoint: Checkpoint, config: EngineConfig, name: str, report: Progress) -> Checkpoint | None:
    """The checkpoint quantised as ``config`` says, from the disk; None where it asks for nothing of the kind."""
    if config.quant is None or not config.quant_cache or not quant_cache.can_hold(checkpoint):
        if config.imatrix is not None:
            raise InvalidRequest(
                "imatrix",
                "expected quant beside it, quant_cache on and weights that are not quantised yet: importances count when a "
                "quantised file is written",
            )
        return None
    return quant_cache.open_quantized(
        checkpoint.path,
        config.quant,
        name=name,
        limit=quant_cache.limit_bytes(config.quant_cache_limit),
        importance_file=None if config.imatrix is None else Path(config.imatrix).expanduser(),
        progress=lambda share: report("quantising", share),
    )


def _request_processor(checkpoint: Checkpoint, vocab_size: int) -> RequestProcessor:
    """The text side of the model. Raises :class:`UnsupportedCheckpoint` when its tokenizer has more tokens than the model."""
    if checkpoint.metadata is not None:
        tokenizer = Tokenizer.from_gguf(checkpoint.metadata, checkpoint.where)
    else:
        tokenizer = Tokenizer.from_folder(checkpoint.path)
    tokenizer.check_fits(vocab_size)
    template = checkpoint.chat_template
    chat_template = ChatTemplate.for_tokenizer(template, tokenizer) if template else None
    return RequestProcessor(tokenizer, chat_template, checkpoint.generation_config)


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


def build_engine(
    model: Model, specs: list[CacheSpec], memory: MemoryPlan, config: EngineConfig, vocab_size: int
) -> Engine:
    """An engine over a loaded model, with its KV pages and states reserved."""
    pages_per_seq = -(-memory.max_model_len // PAGE_SIZE)
    has_states = any(isinstance(spec, StateCacheSpec) for spec in specs)
    num_slots = config.max_num_seqs + memory.num_snapshots
    pool = PagePool(memory.num_pages)
    prefixes = None
    if config.prefix_cache and not has_states:
        prefixes = PrefixCache(pool)
    elif config.prefix_cache and memory.num_snapshots:
        prefixes = PrefixCache(pool, StatePool(memory.num_snapshots, first=config.max_num_seqs))
    runner = ModelRunner(
        model,
        [spec.allocate(memory.num_pages if isinstance(spec, AttentionCacheSpec) else num_slots) for spec in specs],
        page_size=PAGE_SIZE,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_pages_per_seq=pages_per_seq,
    )
    scheduler = Scheduler(
        pool,
        page_size=PAGE_SIZE,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        states=StatePool(config.max_num_seqs) if has_states else None,
        prefixes=prefixes,
        snapshot_interval=config.snapshot_interval,
    )
    return Engine(runner, scheduler, vocab_size=vocab_size, max_model_len=memory.max_model_len, seed=config.seed)


def plan_memory(
    model_config: ModelConfig,
    specs: list[CacheSpec],
    config: EngineConfig,
    weight_bytes: int,
    available: int | None = None,
    mapped_bytes: int = 0,
) -> MemoryPlan:
    """The plan for a model of this shape on this machine. Raises :class:`ModelDoesNotFit`, :class:`InvalidRequest`."""
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
    return plan(
        weight_bytes=weight_bytes,
        page_bytes=sum(spec.page_bytes for spec in specs if isinstance(spec, AttentionCacheSpec)),
        page_size=PAGE_SIZE,
        workspace_bytes=_workspace_bytes(model_config, config),
        state_slot_bytes=sum(spec.slot_bytes for spec in specs if isinstance(spec, StateCacheSpec)),
        model_max_len=model_config.max_position_embeddings,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        available_bytes=available_bytes() if available is None else available,
        memory_fraction=config.memory_fraction,
        mapped_bytes=mapped_bytes,
        num_snapshots=config.state_snapshots if config.prefix_cache else 0,
    )


def _workspace_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Float32 activations of the widest layer in the largest step, and the logits."""
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    gates = model.num_attention_heads if model.attn_output_gate else 0
    attention = (heads + gates + model.num_attention_heads) * model.head_dim
    values = model.linear_num_value_heads * model.linear_value_head_dim
    conv = 2 * model.linear_num_key_heads * model.linear_key_head_dim + values
    delta_net = 2 * conv + 2 * values + 2 * model.linear_num_value_heads
    # Gate, up and their product, of the dense block or of every expert that a token takes.
    expert = model.num_experts_per_tok * (model.moe_intermediate_size + model.hidden_size)
    feed_forward = 3 * max(model.intermediate_size, model.shared_expert_intermediate_size + expert)
    per_token = 2 * model.hidden_size + max(attention, delta_net, feed_forward)
    rows = max(config.max_num_seqs, LOGITS_ROWS)
    return 4 * (config.max_num_batched_tokens * per_token + rows * model.vocab_size)
