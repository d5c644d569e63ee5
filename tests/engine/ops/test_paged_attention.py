"""``paged_attention``: the native core against its twin, and the equalities that prefill, decode and batching rest on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import pytest
import torch

from helexa_engine.cache.spec import AttentionCacheSpec, KvDtype
from helexa_engine.ops.paged_attention import reference
from helexa_engine.ops.registry import native_core

_native: Any = native_core()
native: Any = None if _native is None else import_module("helexa_engine.ops.paged_attention.native")
needs_core = pytest.mark.skipif(_native is None, reason="the native core is not built")

PAGE_SIZE = 64
EPS = 1e-6


@dataclass
class Case:
    """Sequences of ``past + new`` tokens with their pages scattered over a cache; what lies outside of them is NaN."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: KvDtype
    qkv: list[torch.Tensor]  # per sequence [length, width], all tokens
    pages: list[list[int]]
    num_pages: int
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    cos_sin: torch.Tensor
    gated: bool = False
    device: str = "cpu"  # whose pages they are; the tensors are the CPU's

    def empty_cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        cache = AttentionCacheSpec(self.num_kv_heads, self.head_dim, self.kv_dtype, device=self.device).allocate(
            self.num_pages
        )
        for tensor in (cache.k, cache.v):
            tensor.view(torch.int8).fill_(-1)  # NaN, also as scales
        return cache.k, cache.v

    def run(self, module, cache, spans, which=None, **options) -> torch.Tensor:
        """One call over tokens ``begin:end`` of the sequences ``which`` (default: all)."""
        which = list(range(len(self.qkv))) if which is None else which
        width = max(len(self.pages[i]) for i in which) + 1
        tables = torch.zeros((len(which), width), dtype=torch.int32)
        positions, slots, rows, ends, cu = [], [], [], [], [0]
        for row, i in enumerate(which):
            begin, end = spans[row]
            pages = torch.tensor(self.pages[i])
            tables[row, : len(pages)] = pages.int()
            at = torch.arange(begin, end)
            positions.append(at)
            slots.append(pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE)
            rows.append(self.qkv[i][begin:end])
            ends.append(end)
            cu.append(cu[-1] + end - begin)
        return module.paged_attention(
            torch.cat(rows).contiguous(), self.q_norm, self.k_norm, EPS, self.cos_sin, torch.cat(positions),
            torch.cat(slots), tables, torch.tensor(cu, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32),
            *cache, self.head_dim**-0.5, self.gated, **options,
        )  # fmt: skip

    def whole(self) -> list[tuple[int, int]]:
        return [(0, len(rows)) for rows in self.qkv]


def make(
    lengths, *, heads=(4, 2), head_dim=64, rotary_dim=None, gated=False, kv_dtype="float16", device="cpu", seed=0
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    width = ((2 if gated else 1) * num_heads + 2 * num_kv_heads) * head_dim
    half = (rotary_dim or head_dim) // 2
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    shuffled = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    pages = [[shuffled.pop() for _ in range(count)] for count in counts]
    angles = torch.arange(max(lengths) + 1)[:, None] * 10000 ** (-torch.arange(half) / half)
    return Case(
        num_heads, num_kv_heads, head_dim, kv_dtype,
        [2 * torch.randn(length, width, generator=generator) for length in lengths],
        pages, sum(counts) + 3,
        1 + 0.2 * torch.randn(head_dim, generator=generator), 1 + 0.2 * torch.randn(head_dim, generator=generator),
        torch.cat([angles.cos(), angles.sin()], -1).float(), gated, device,
    )  # fmt: skip


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int8), b.view(torch.int8))


def assert_as_good_as_the_twin(case: Case, spans=None) -> None:
    """Error against the twin in float64 at most twice the float32 twin's; caches bit for bit the float32 twin's."""
    spans = spans or case.whole()
    truth = case.run(reference, case.empty_cache(), spans, compute_dtype=torch.float64)
    twin_cache, cache = case.empty_cache(), case.empty_cache()
    twin = case.run(reference, twin_cache, spans)
    got = case.run(native, cache, spans)
    assert not got.isnan().any()
    assert all(map(same_bits, cache, twin_cache))
    assert (got - truth).abs().max() <= 2 * (twin - truth).abs().max()


every_kv_dtype = pytest.mark.parametrize("kv_dtype", ["float32", "float16", "q8_0"])


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_the_twin_equals_torchs_attention(heads: tuple[int, int], gated: bool) -> None:
    """On sequences that lie in one piece: torch's RMSNorm, rotary by complex numbers, torch's causal attention."""
    case = make([70, 3], heads=heads, rotary_dim=16, gated=gated, kv_dtype="float32")
    got = case.run(reference, case.empty_cache(), case.whole(), compute_dtype=torch.float64)
    expected = []
    for qkv in case.qkv:
        rows = qkv.double().view(len(qkv), -1, 64)
        q, k, v = torch.split(rows, [rows.shape[1] - 2 * heads[1], heads[1], heads[1]], dim=1)
        q, gate = (q[:, ::2], q[:, 1::2]) if gated else (q, None)
        turn = torch.complex(*case.cos_sin[: len(qkv), None].double().chunk(2, dim=-1))

        def prepared(x: torch.Tensor, norm: torch.Tensor, turn: torch.Tensor = turn) -> torch.Tensor:
            x = torch.nn.functional.rms_norm(x, (64,), norm.double(), EPS)
            turned = torch.complex(x[..., :8], x[..., 8:16]) * turn
            return torch.cat([turned.real, turned.imag, x[..., 16:]], -1).transpose(0, 1)

        context = torch.nn.functional.scaled_dot_product_attention(
            prepared(q, case.q_norm), prepared(k, case.k_norm), v.transpose(0, 1), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        expected.append((context if gate is None else context * gate.sigmoid()).reshape(len(qkv), -1))
    assert (got - torch.cat(expected)).abs().max() <= 1e-6  # keys and values pass through the float32 cache


@pytest.mark.parametrize("chunk", [1, 63, 64, 65])
def test_chunks_and_batches_of_the_twin_equal_whole_and_alone(chunk: int) -> None:
    case = make([130, 7], heads=(6, 2))
    whole_cache, cache = case.empty_cache(), case.empty_cache()
    whole = case.run(reference, whole_cache, case.whole(), compute_dtype=torch.float64)
    parts = [
        case.run(reference, cache, [(at, min(at + chunk, len(rows)))], [i], compute_dtype=torch.float64)
        for i, rows in enumerate(case.qkv)
        for at in range(0, len(rows), chunk)
    ]
    assert (torch.cat(parts) - whole).abs().max() <= 1e-12
    assert all(map(same_bits, cache, whole_cache))


@pytest.mark.parametrize(("name", "index"), [("positions", 69), ("slot_mapping", 3), ("page_tables", (0, 1))])
@pytest.mark.parametrize("value", [-1, 10**6])
def test_the_twin_checks_every_index(name: str, index, value: int) -> None:
    broken = arguments(make([70]))
    broken[name][index] = value
    with pytest.raises(ValueError, match=name):
        reference.paged_attention(**broken)


@every_kv_dtype
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 1000])
def test_equals_the_twin_at_every_length(isa: str, length: int, kv_dtype: KvDtype) -> None:
    assert_as_good_as_the_twin(make([length], kv_dtype=kv_dtype))


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (8, 1), (7, 1)], ids=str)
def test_equals_the_twin_for_every_shape(isa: str, heads: tuple[int, int], head_dim: int) -> None:
    assert_as_good_as_the_twin(make([70, 3], heads=heads, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (5, 1), (8, 1), (7, 1)], ids=str)
def test_q8_0_equals_the_twin_for_every_shape(isa: str, heads: tuple[int, int], head_dim: int) -> None:
    """Both sides of the number of rows from which on a page is converted once for all of them: prompts and single tokens."""
    case = make([70, 3, 65], heads=heads, head_dim=head_dim, kv_dtype="q8_0")
    assert_as_good_as_the_twin(case)
    cache = case.empty_cache()
    case.run(native, cache, [(0, 69), (0, 2), (0, 64)])
    twin_cache = (cache[0].clone(), cache[1].clone())
    spans = [(69, 70), (2, 3), (64, 65)]
    truth = case.run(reference, (cache[0].clone(), cache[1].clone()), spans, compute_dtype=torch.float64)
    twin, got = case.run(reference, twin_cache, spans), case.run(native, cache, spans)
    assert all(map(same_bits, cache, twin_cache))
    assert (got - truth).abs().max() <= 2 * (twin - truth).abs().max()


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(256, 64), (64, 16), (48, 12), (32, 8), (80, 40), (64, 62)])
@pytest.mark.parametrize("gated", [False, True])
def test_gates_and_partial_rotary_equal_the_twin(isa: str, head_dim: int, rotary_dim: int, gated: bool) -> None:
    assert_as_good_as_the_twin(make([70, 3, 65], heads=(6, 2), head_dim=head_dim, rotary_dim=rotary_dim, gated=gated))


def test_a_gate_multiplies_the_context_of_its_own_head(isa: str) -> None:
    """Gates of 0 halve the context; +-90 let everything and nothing through; the context itself is that without a gate."""
    case = make([20], gated=True)
    rows = case.qkv[0].view(20, 12, 64)
    queries, gates = rows[:, 0:8:2], rows[:, 1:8:2]
    plain = replace(case, qkv=[torch.cat([queries, rows[:, 8:]], 1).reshape(20, -1)], gated=False)
    for head, value in enumerate((0.0, 90.0, -90.0, 1e30)):
        gates[:, head] = value
    context = plain.run(native, plain.empty_cache(), plain.whole()).view(20, 4, 64)
    got = case.run(native, case.empty_cache(), case.whole()).view(20, 4, 64)
    assert torch.equal(got[:, 0], context[:, 0] / 2)
    assert torch.equal(got[:, 1], context[:, 1]) and torch.equal(got[:, 3], context[:, 3])
    assert got[:, 2].abs().max() < 1e-35


@every_kv_dtype
def test_packed_sequences_of_unequal_length(isa: str, kv_dtype: KvDtype) -> None:
    assert_as_good_as_the_twin(make([1, 130, 64, 7, 65, 1], kv_dtype=kv_dtype))


@pytest.mark.parametrize("chunk", [1, 3, 63, 64, 65])
@every_kv_dtype
def test_chunked_prefill_equals_whole_bit_for_bit(isa: str, chunk: int, kv_dtype: KvDtype) -> None:
    case = make([200], heads=(6, 2), kv_dtype=kv_dtype)
    whole_cache, cache = case.empty_cache(), case.empty_cache()
    whole = case.run(native, whole_cache, [(0, 200)])
    parts = [case.run(native, cache, [(i, min(i + chunk, 200))]) for i in range(0, 200, chunk)]
    assert torch.equal(torch.cat(parts), whole)
    assert all(map(same_bits, cache, whole_cache))


@pytest.mark.parametrize(("kv_dtype", "head_dim"), [("float16", 48), ("q8_0", 64)])
def test_a_batch_equals_each_alone_bit_for_bit(isa: str, kv_dtype: KvDtype, head_dim: int) -> None:
    """Prefill, decode and a chunk in one batch."""
    case = make([150, 90, 65, 1, 130], heads=(4, 1), head_dim=head_dim, kv_dtype=kv_dtype)
    spans = [(0, 150), (89, 90), (64, 65), (0, 1), (70, 130)]
    cache = case.empty_cache()
    for i, (begin, _) in enumerate(spans):
        if begin:
            case.run(native, cache, [(0, begin)], [i])
    alone_cache = (cache[0].clone(), cache[1].clone())
    batch = case.run(native, cache, spans)
    alone = [case.run(native, alone_cache, [span], [i]) for i, span in enumerate(spans)]
    assert torch.equal(batch, torch.cat(alone))


@needs_core
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    case = make([300, 1], heads=(4, 4))
    before = _native.num_threads()
    expected = case.run(native, case.empty_cache(), case.whole())
    try:
        _native.set_num_threads(threads)
        assert torch.equal(case.run(native, case.empty_cache(), case.whole()), expected)
    finally:
        _native.set_num_threads(before)


@every_kv_dtype
def test_levels_agree_with_generic(isa: str, kv_dtype: KvDtype) -> None:
    case = make([100, 40], heads=(4, 2), head_dim=128, kv_dtype=kv_dtype)
    got = case.run(native, case.empty_cache(), case.whole())
    _native.set_cpu_isa("generic")
    generic = case.run(native, case.empty_cache(), case.whole())
    assert (got - generic).abs().max() <= 1e-5


@every_kv_dtype
def test_large_scores_do_not_overflow(isa: str, kv_dtype: KvDtype) -> None:
    """Norm weights of 60 give scores near +-40,000: the maximum must be taken away before the exponential."""
    case = make([130], kv_dtype=kv_dtype)
    case = replace(case, q_norm=case.q_norm * 60, k_norm=case.k_norm * 60)
    assert_as_good_as_the_twin(case)


@every_kv_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 4, 6], ids=["query", "key", "value"])
def test_what_is_not_finite_shows_in_its_own_sequence(isa: str, part: int, value: float, kv_dtype: KvDtype) -> None:
    """A broken activation must be seen by the runtime, and only in its own sequence; a query's only in its own row."""
    case = make([5, 5], kv_dtype=kv_dtype)
    case.qkv[0][2, part * 64] = value
    cache, twin_cache = case.empty_cache(), case.empty_cache()
    got = case.run(native, cache, case.whole())
    assert not got[2].isfinite().all()
    assert not got[5:].isnan().any()
    if part == 0:
        assert got[2, :64].isnan().all() and not got[[0, 1, 3, 4]].isnan().any()
    case.run(reference, twin_cache, case.whole())
    if kv_dtype == "q8_0":  # one NaN: all that is written is equal, bit for bit
        for ours, theirs in zip(cache, twin_cache, strict=True):
            assert torch.equal(ours[..., : 64 * 64], theirs[..., : 64 * 64])
            scales = [tensor[..., 64 * 64 :].view(torch.float16) for tensor in (ours, theirs)]
            assert torch.equal(scales[0].nan_to_num(nan=-1), scales[1].nan_to_num(nan=-1))


@needs_core
def test_the_comparison_can_fail() -> None:
    """A wrong norm weight by one part in a thousand must show."""
    case = make([65])
    truth = case.run(reference, case.empty_cache(), case.whole(), compute_dtype=torch.float64)
    twin = case.run(reference, case.empty_cache(), case.whole())
    wrong = replace(case, q_norm=case.q_norm * 1.001).run(native, case.empty_cache(), case.whole())
    assert (wrong - truth).abs().max() > 2 * (twin - truth).abs().max()


def arguments(case: Case) -> dict[str, torch.Tensor]:
    length = len(case.qkv[0])
    at = torch.arange(length)
    pages = torch.tensor(case.pages[0])
    k, v = case.empty_cache()
    return {
        "qkv": case.qkv[0],
        "q_norm": case.q_norm,
        "k_norm": case.k_norm,
        "eps": EPS,
        "cos_sin": case.cos_sin,
        "positions": at,
        "slot_mapping": pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE,
        "page_tables": pages[None].int(),
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
        "seq_lens": torch.tensor([length], dtype=torch.int32),
        "k_cache": k,
        "v_cache": v,
        "scale": 0.125,
    }


@needs_core
def test_two_pages_are_accepted() -> None:
    """The good form of what the next test breaks."""
    assert native.paged_attention(**arguments(make([70]))).shape == (70, 256)


@needs_core
@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("page_tables", (0, 1), 99, r"page_tables\[0\]\[1\]"),
        ("page_tables", (0, 0), -1, r"page_tables\[0\]\[0\]"),
        ("slot_mapping", (3,), 10**6, r"slot_mapping\[3\]"),
        ("slot_mapping", (3,), -1, r"slot_mapping\[3\]"),
        ("positions", (69,), 70, r"positions\[69\]"),
        ("positions", (0,), -1, r"positions\[0\]"),
        ("seq_lens", (0,), 10**6, r"seq_lens\[0\]"),
        ("seq_lens", (0,), 3, r"seq_lens\[0\]"),
        ("cu_seqlens", (1,), 71, r"cu_seqlens\[1\]"),
        ("cu_seqlens", (1,), 69, r"seq_lens|positions|cu_seqlens"),
        ("cu_seqlens", (0,), -5, r"cu_seqlens\[0\]"),
    ],
)
def test_every_index_is_checked_before_anything_is_written(name: str, index, value: int, message: str) -> None:
    broken = arguments(make([70]))
    broken[name][index] = value
    with pytest.raises(ValueError, match=message):
        native.paged_attention(**broken)
    assert broken["k_cache"].isnan().all() and broken["v_cache"].isnan().all()


@needs_core
def test_a_position_beyond_the_rotary_table() -> None:
    broken = arguments(make([70]))
    broken["cos_sin"] = broken["cos_sin"][:69]
    with pytest.raises(ValueError, match=r"positions\[69\]: expected below 69, got 69"):
        native.paged_attention(**broken)


@needs_core
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(70, 512, dtype=torch.float64)),
        ("qkv", torch.zeros(512, 70).T),
        ("k_norm", torch.zeros(63)),
        ("positions", torch.zeros(70, dtype=torch.int32)),
        ("v_cache", torch.zeros(5, 2, 64, 64)),
        ("k_cache", torch.zeros(5, 2, 64, 64, dtype=torch.bfloat16)),
        ("k_cache", torch.zeros(5, 2, 64 * 68 + 1, dtype=torch.int8)),
    ],
)
def test_tensors_of_a_wrong_kind_are_named(name: str, value: torch.Tensor) -> None:
    broken = arguments(make([70]))
    broken[name] = value
    with pytest.raises(ValueError, match=name):
        native.paged_attention(**broken)
