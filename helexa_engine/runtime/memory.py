"""Does it fit? Bytes for weights, KV pages, recurrent states and workspace, planned before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidRequest, ModelDoesNotFit

#: Context a seat gets by default when every seat is taken; a single sequence may always use ``max_model_len``.
TOKENS_PER_SEAT = 4096

#: Snapshots of recurrent states may take this much of the memory that the context could have as well.
SNAPSHOT_SHARE = 0.25

#: Rows of logits computed at once where a whole prompt needs them: bounds the workspace to this many times the vocabulary.
LOGITS_ROWS = 32

#: Decode steps of up to this many sequences are replayed. Each number has activations of its own in memory, about 2 MB a sequence
#: for a small model; and the more sequences, the less does a call through Python weigh.
MOST_RECORDED = 4

#: Decode steps of up to this many sequences are replayed as CUDA graphs; beyond it a step computes longer than its launches take.
MOST_GRAPHED = 64

_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2**63 for "max"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model takes, in bytes, and what it may therefore serve.

    Attributes:
        weight_bytes: weights as they lie in memory.
        page_bytes: one KV page across all layers.
        num_pages: pages reserved.
        state_bytes: recurrent states of every sequence that may run; they do not grow with its length.
        snapshot_bytes: snapshots of such states in the prefix cache, ``num_snapshots`` of them.
        workspace_bytes: activations and logits of the largest step.
        position_bytes: tables of ``max_model_len`` positions: rotary angles, and the pages of each sequence.
        max_model_len: longest prompt plus answer, in tokens.
        available_bytes: what the device had free when this was planned.
        mapped_bytes: experts left in the mapped file; not reserved, the page cache holds as much of them as there is room for.
    """

    weight_bytes: int
    page_bytes: int
    num_pages: int
    state_bytes: int
    workspace_bytes: int
    max_model_len: int
    available_bytes: int
    mapped_bytes: int = 0
    num_snapshots: int = 0
    snapshot_bytes: int = 0
    position_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        return self.page_bytes * self.num_pages

    @property
    def total_bytes(self) -> int:
        reserved = self.kv_bytes + self.state_bytes + self.snapshot_bytes
        return self.weight_bytes + reserved + self.workspace_bytes + self.position_bytes

    def __str__(self) -> str:
        states = f" + states {_size(self.state_bytes)}" if self.state_bytes else ""
        if self.num_snapshots:
            states += f" + {self.num_snapshots} snapshots of them {_size(self.snapshot_bytes)}"
        workspace = _size(self.workspace_bytes + self.position_bytes)
        return (
            f"weights {_size(self.weight_bytes)} + KV pages {_size(self.kv_bytes)} ({self.num_pages} pages){states} + workspace "
            f"{workspace} = {_size(self.total_bytes)} of {_size(self.available_bytes)} free; context {self.max_model_len} tokens"
            + (f"; {_size(self.mapped_bytes)} of experts stay in the mapped file" if self.mapped_bytes else "")
        )


def plan(
    *,
    weight_bytes: int,
    page_bytes: int,
    page_size: int,
    workspace_bytes: int,
    state_slot_bytes: int = 0,
    position_page_bytes: int = 0,
    model_max_len: int,
    max_model_len: int | None,
    max_num_seqs: int,
    available_bytes: int,
    memory_fraction: float,
    mapped_bytes: int = 0,
    num_snapshots: int = 0,
    device: str = "this machine",
) -> MemoryPlan:
    """Shares ``memory_fraction`` of ``available_bytes`` out to weights, workspace, states and KV pages, in this order.

    ``state_slot_bytes`` are the recurrent states of one sequence across all layers; each of ``max_num_seqs`` has its own, and of
    the ``num_snapshots`` wanted there are as many as fit into :data:`SNAPSHOT_SHARE` of what the context asked for leaves.

    ``position_page_bytes`` are taken once for each page of the context, whoever uses it.

    The context is what was asked for (``max_model_len``), else what the model allows, cut to what fits. Pages beyond one sequence
    of that length are reserved for the other seats, :data:`TOKENS_PER_SEAT` tokens each, as far as they fit.

    Raises:
        ModelDoesNotFit: weights, workspace, states and the context asked for (else a single page) exceed the share.
        InvalidRequest: ``max_model_len`` is more than the model allows.
    """
    if max_model_len is not None and max_model_len > model_max_len:
        raise InvalidRequest("max_model_len", f"the model allows at most {model_max_len} tokens, got {max_model_len}")
    budget = int(available_bytes * memory_fraction)
    state_bytes = state_slot_bytes * max_num_seqs
    fixed_bytes = weight_bytes + workspace_bytes + state_bytes
    context_page_bytes = page_bytes + position_page_bytes
    required_pages = _ceil(max_model_len, page_size) if max_model_len is not None else 1
    spare_bytes = budget - fixed_bytes - required_pages * context_page_bytes
    if spare_bytes < 0:
        fitting_pages = (budget - fixed_bytes) // context_page_bytes
        if max_model_len is not None and fitting_pages >= 1:
            advice = f"max_model_len={fitting_pages * page_size} would fit"
        elif (
            fixed_bytes + context_page_bytes
            > budget
            >= fixed_bytes - state_bytes + state_slot_bytes + context_page_bytes
        ):
            seats = (budget - weight_bytes - workspace_bytes - context_page_bytes) // state_slot_bytes
            advice = f"max_num_seqs={seats} would fit: each takes {_size(state_slot_bytes)} of state"
        else:
            advice = "take a smaller model or a smaller quantisation, or free memory"
        raise ModelDoesNotFit(budget - spare_bytes, budget, device, f"{advice} (memory_fraction={memory_fraction:g})")
    num_snapshots = min(num_snapshots, int(spare_bytes * SNAPSHOT_SHARE) // state_slot_bytes) if state_slot_bytes else 0
    snapshot_bytes = num_snapshots * state_slot_bytes
    left = budget - fixed_bytes - snapshot_bytes
    context = max_model_len
    if context is None:
        context = min(model_max_len, left // context_page_bytes * page_size)
    position_bytes = _ceil(context, page_size) * position_page_bytes
    wanted_tokens = max(context, max_num_seqs * min(context, TOKENS_PER_SEAT))
    return MemoryPlan(
        weight_bytes=weight_bytes,
        page_bytes=page_bytes,
        num_pages=min((left - position_bytes) // page_bytes, _ceil(wanted_tokens, page_size)),
        state_bytes=state_bytes,
        workspace_bytes=workspace_bytes,
        max_model_len=context,
        available_bytes=available_bytes,
        mapped_bytes=mapped_bytes,
        num_snapshots=num_snapshots,
        snapshot_bytes=snapshot_bytes,
        position_bytes=position_bytes,
    )


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of sequences that have a CUDA graph each, ascending: powers of two, and the most there may be."""
    most = min(max_num_seqs, MOST_GRAPHED)
    return [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]


def _ceil(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still take: the kernel's ``MemAvailable`` or what the control group leaves, whichever is less."""
    available = _mem_available(proc)
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, usage = _read_int(cgroup / limit_file), _read_int(cgroup / usage_file)
        if limit is not None and usage is not None and limit < _NO_LIMIT:
            stat = cgroup / ("memory.stat" if limit_file == "memory.max" else "memory/memory.stat")
            available = min(available, max(0, limit - usage + _reclaimable(stat)))
    return available


def _mem_available(proc: Path) -> int:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import os  # not Linux: total physical memory is the best that the standard library knows

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reclaimable(stat: Path) -> int:
    """Page cache charged to the group: the kernel drops it when memory is asked for."""
    try:
        lines = (line.split() for line in stat.read_text().splitlines())
        return sum(int(value) for key, value in lines if key == "inactive_file")
    except (OSError, ValueError):
        return 0


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or the word "max"
        return None


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
