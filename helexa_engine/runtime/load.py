"""From a name to a running model: find the files, plan the memory, load, start the engine's thread."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..cache.page_pool import PagePool
from ..cache.prefix_cache import PrefixCache
from ..cache.spec import PAGE_SIZE, AttentionCacheSpec, CacheSpec, StateCacheSpec
from ..cache.state_pool import StatePool
from ..config import EngineConfig
from ..generate_request import GenerateRequest
from ..models.registry import model_class
from ..ops.cuda import torch_device
from ..ops.registry import native_core
from ..ops.upload import end_uploads
from ..text.request_processor import RequestProcessor
from ..text.structured import GrammarCompiler
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.loader import load as load_weights
from . import cuda_device, device_faults, quant_cache, saved_prefixes
from .engine import Engine, OnPromptLogits
from .engine_thread import EngineThread
from .exchange import EngineRequest
from .locate import locate_model, model_name
from .memory import MemoryPlan, graph_sizes
from .model_fingerprint import model_fingerprint
from .model_info import ModelInfo, Progress
from .model_runner import Model, ModelRunner
from .plan import plan_model
from .request_events import RequestEvents, engine_request
from .reserved_memory import ReservedMemory
from .routes import Receive, Routes
from .saved_prefixes import SavedPrefixes
from .scheduler import Scheduler
from .step_inputs import Scratch
from .text_side import request_processor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine ready to step, the text side that goes with it, and the facts."""

    engine: Engine
    processor: RequestProcessor
    info: ModelInfo


class LoadedModel:
    """A model that runs in this process: what is below :class:`helexa_engine.LLM`."""

    def __init__(self, engine: Engine, processor: RequestProcessor, info: ModelInfo) -> None:
        self.tokenizer = processor.tokenizer
        self.info = info
        self.grammars = GrammarCompiler(processor.tokenizer)
        self._processor = processor
        self._routes = Routes()
        self.thread = EngineThread(engine, self._routes.deliver, info.name)

    def prepare(self, request: GenerateRequest) -> tuple[EngineRequest, RequestEvents]:
        """The request in the engine's terms, and what turns its tokens into events. Any thread may call this.

        Raises:
            InvalidRequest, TemplateRenderFailed: see :meth:`RequestProcessor.prepare`.
        """
        prepared = self._processor.prepare(request)
        events = RequestEvents(self._processor, prepared, partial(self.abort, request.request_id))
        return engine_request(request, prepared), events

    def submit(
        self, request: EngineRequest, receive: Receive, *, on_prompt_logits: OnPromptLogits | None = None
    ) -> None:
        """Starts a request; ``receive`` gets its outputs on the engine's thread. Raises as :meth:`EngineThread.submit`, and what the
        compiler says of the constraint."""
        make_grammar = None if request.constraint is None else self.grammars.maker(request.constraint)
        self._routes.open(request.request_id, receive)
        try:
            self.thread.submit(request, make_grammar=make_grammar, on_prompt_logits=on_prompt_logits)
        except BaseException:
            self._routes.close(request.request_id)
            raise

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its answers, before the next step. Unknown ids are no error."""
        if index is None:
            self._routes.close(request_id)
        self.thread.abort(request_id, index)

    def close(self, timeout: float) -> bool:
        """Ends running requests and frees the model; False when the step under way took longer than ``timeout`` seconds."""
        return self.thread.close(timeout)


def load_model(model: str | Path | Checkpoint, config: EngineConfig, progress: Progress | None = None) -> LoadedModel:
    """Loads a model and starts its engine in this process; as :func:`load_engine`."""
    loaded = load_engine(model, config, progress)
    return LoadedModel(loaded.engine, loaded.processor, loaded.info)


@device_faults.explained("while the model was loaded", "end what else uses it, or take a smaller memory_fraction")
def load_engine(
    model: str | Path | Checkpoint,
    config: EngineConfig,
    progress: Progress | None = None,
    available: int | None = None,
) -> LoadedEngine:
    """Loads a model. Blocks; see :class:`helexa_engine.LLM` for arguments and errors. A :class:`Checkpoint` is taken as it is.

    Of ``available`` bytes, or fewer where the device has not as many, it takes its share; default: of all that the device has.
    """
    if (core := native_core()) is not None:
        core.pin_threads(config.pin_threads)
        if config.num_threads is not None:
            core.set_num_threads(config.num_threads)
    report = progress or (lambda stage, fraction: None)
    prefix_limit = saved_prefixes.limit_bytes(config.prefix_cache_limit)
    if isinstance(model, Checkpoint):
        opened, path, name = model, model.path, model.path.name
    else:
        path = locate_model(model, offline=config.offline, progress=progress)
        report("reading the checkpoint", 0.0)
        opened, name = open_checkpoint(path), model_name(model, path)
    with opened as checkpoint:
        build = model_class(checkpoint.architecture, checkpoint.where)
        plan = plan_model(checkpoint, config, name=name, limit=available)
        lies_idle = plan.device == "cpu" and config.device == "auto" and cuda_device.has_device()
        log.log(
            logging.WARNING if lies_idle else logging.INFO, "%s: on %s (%s)", path.name, plan.device, plan.why_device
        )
        log.info("%s: %s; keys and values in %s", path.name, plan.memory, plan.kv_dtype)
        report("reading the tokenizer", 0.0)
        processor = request_processor(checkpoint)
        processor.tokenizer.check_fits(plan.config.vocab_size)
        report("loading weights", 0.0)
        net = build(plan.config, plan.memory.max_model_len, plan.device)
        cached = _cached(checkpoint, config, plan.name, report) if plan.from_quant_cache else None
        try:
            load_weights(
                net,
                cached or checkpoint,
                dtype=config.dtype,
                quant=None if cached else config.quant,
                mmap_experts=config.mmap_experts,
                progress=report,
            )
        finally:
            end_uploads()
    report("reserving memory", 0.0)
    engine = build_engine(net, plan.specs, plan.memory, config, plan.config.vocab_size, plan.device)
    if config.prefix_cache_folder is not None:
        report("restoring prefixes", 0.0)
        loaded = replace(config, quant=None) if cached else config
        engine.saved = _saved_prefixes(
            saved_prefixes.file_path(config.prefix_cache_folder, plan.name, path),
            model_fingerprint(cached or checkpoint, plan.config, plan.specs, loaded, plan.device),
            prefix_limit,
            engine,
        )
    info = ModelInfo(
        name=plan.name,
        path=path,
        architecture=plan.architecture,
        vocab_size=plan.config.vocab_size,
        max_model_len=plan.memory.max_model_len,
        weight_bytes=plan.memory.weight_bytes,
        kv_bytes=plan.memory.kv_bytes,
        kv_dtype=plan.kv_dtype,
        state_bytes=plan.memory.state_bytes,
        snapshot_bytes=plan.memory.snapshot_bytes,
        workspace_bytes=plan.memory.workspace_bytes + plan.memory.position_bytes,
        device=plan.device,
        capabilities=processor.capabilities(),
    )
    report("ready", 1.0)
    return LoadedEngine(engine, processor, info)


def _cached(checkpoint: Checkpoint, config: EngineConfig, name: str, report: Progress) -> Checkpoint | None:
    """The checkpoint quantised as ``config`` says, from the disk; None where the cache cannot hold it."""
    assert config.quant is not None
    return quant_cache.open_quantized(
        checkpoint.path,
        config.quant,
        name=name,
        limit=quant_cache.limit_bytes(config.quant_cache_limit),
        importance_file=None if config.imatrix is None else Path(config.imatrix).expanduser(),
        progress=lambda share: report("quantising", share),
    )


def _saved_prefixes(path: Path, fingerprint: dict[str, str], limit: int, engine: Engine) -> SavedPrefixes | None:
    """The file of the engine's prefix cache, with what is in it restored; None without a cache."""
    prefixes = engine.scheduler.prefixes
    if prefixes is None:
        log.warning(
            "prefix_cache_folder has no effect: there is no prefix cache, or no memory for snapshots of the states"
        )
        return None
    saved = SavedPrefixes(path, fingerprint, limit, prefixes, engine.runner)
    saved.restore()
    return saved


def build_engine(
    model: Model,
    specs: list[CacheSpec],
    memory: MemoryPlan,
    config: EngineConfig,
    vocab_size: int,
    device: str = "cpu",
) -> Engine:
    """An engine over a loaded model, with its KV pages and states reserved."""
    pages_per_seq = -(-memory.max_model_len // PAGE_SIZE)
    has_states = any(isinstance(spec, StateCacheSpec) for spec in specs)
    num_pages, num_slots = memory.num_pages, config.max_num_seqs + memory.num_snapshots
    pool = PagePool(memory.num_pages)
    prefixes = None
    if config.prefix_cache and not has_states:
        prefixes = PrefixCache(pool)
    elif config.prefix_cache and memory.num_snapshots:
        prefixes = PrefixCache(pool, StatePool(memory.num_snapshots, first=config.max_num_seqs))
    scratch = None
    if device == "cuda" and config.cuda_graphs:
        scratch = Scratch(page=num_pages, state_slot=num_slots)
        num_pages, num_slots = num_pages + 1, num_slots + 1
    nbytes = sum(
        num_pages * spec.page_bytes if isinstance(spec, AttentionCacheSpec) else num_slots * spec.slot_bytes
        for spec in specs
    )
    reserved = ReservedMemory(nbytes, 2 * len(specs), torch_device(device))
    caches = [
        spec.allocate(num_pages if isinstance(spec, AttentionCacheSpec) else num_slots, reserved.zeros)
        for spec in specs
    ]
    runner = ModelRunner(
        model,
        caches,
        page_size=PAGE_SIZE,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_pages_per_seq=pages_per_seq,
        device=device,
        graph_sizes=graph_sizes(config.max_num_seqs) if scratch else (),
        scratch=scratch,
    )
    if scratch is not None and torch_device(device).type == "cuda":  # the emulation has nothing to prepare
        runner.warm_up()
    scheduler = Scheduler(
        pool,
        page_size=PAGE_SIZE,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_step_seconds=config.max_step_seconds,
        states=StatePool(config.max_num_seqs) if has_states else None,
        prefixes=prefixes,
        snapshot_interval=config.snapshot_interval,
    )
    return Engine(runner, scheduler, vocab_size=vocab_size, max_model_len=memory.max_model_len, seed=config.seed)
