"""``paged_attention`` on CUDA: the kernels against the twin on both ways through them, prompts and a few new tokens.

Errors are held against what the twin makes of bfloat16, which is what the kernels multiply in. That is coarse: the tests of exact
contexts see a key too much or too few.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

from helexa_engine.cache.spec import KvDtype
from helexa_engine.ops.paged_attention import reference
from tests.engine.ops.test_paged_attention import Case, arguments, same_bits
from tests.engine.ops.test_paged_attention import make as make_case

FEW = 8  # new tokens up to which a sequence's keys are split over blocks

Spans = list[tuple[int, int]]


class OnDevice:
    """The op on ``device``: what comes from the CPU goes there, and what was written comes back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda: Any = import_module("helexa_engine.ops.paged_attention.cuda")

    def paged_attention(self, *given: Any) -> torch.Tensor:
        moved = [value.to(self._device) if isinstance(value, torch.Tensor) else value for value in given]
        context = self._cuda.paged_attention(*moved)
        for before, after in zip(given, moved, strict=True):
            if isinstance(before, torch.Tensor) and before is not after:
                before.copy_(after)
        return context.cpu()


@pytest.fixture
def op(cuda_device: torch.device, poisoned: None) -> OnDevice:
    return OnDevice(cuda_device)


def make(lengths: list[int], *, kv_dtype: KvDtype = "bfloat16", **options: Any) -> Case:
    return make_case(lengths, kv_dtype=kv_dtype, device="cuda", **options)


def filled(case: Case, spans: Spans, which: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache that holds what lies before the spans."""
    cache = case.empty_cache()
    which = list(range(len(spans))) if which is None else which
    for i, (begin, _) in zip(which, spans, strict=True):
        if begin:
            case.run(reference, cache, [(0, begin)], [i])
    return cache


def assert_as_good_as_the_twin(op: OnDevice, case: Case, spans: Spans | None = None) -> None:
    """Error against the twin in float64 at most twice that of the twin in bfloat16; caches bit for bit the float32 twin's."""
    spans = spans or case.whole()
    truth = case.run(reference, filled(case, spans), spans, compute_dtype=torch.float64)
    yardstick = case.run(reference, filled(case, spans), spans, compute_dtype=torch.bfloat16)
    twin_cache, cache = filled(case, spans), filled(case, spans)
    case.run(reference, twin_cache, spans)
    got = case.run(op, cache, spans)
    assert not got.isnan().any()
    assert all(map(same_bits, cache, twin_cache))
    assert (got - truth).abs().max() <= 2 * (yardstick - truth).abs().max()


every_kv_dtype = pytest.mark.parametrize("kv_dtype", ["bfloat16", "q8_0"])


def decode(lengths: list[int], new_tokens: int = 1) -> Spans:
    return [(max(0, length - new_tokens), length) for length in lengths]


@every_kv_dtype
@pytest.mark.parametrize("length", [1, 7, FEW, FEW + 1, 63, 64, 65, 130])
def test_prompts_of_every_length(op: OnDevice, length: int, kv_dtype: KvDtype) -> None:
    assert_as_good_as_the_twin(op, make([length], kv_dtype=kv_dtype))


@every_kv_dtype
@pytest.mark.parametrize("new_tokens", [1, 2, 5, FEW])
def test_a_few_new_tokens_behind_every_length(op: OnDevice, new_tokens: int, kv_dtype: KvDtype) -> None:
    """Also across the border of two splits: 128 and 131."""
    lengths = [8, 63, 64, 65, 128, 129, 131, 300]
    assert_as_good_as_the_twin(op, make(lengths, kv_dtype=kv_dtype), decode(lengths, new_tokens))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (8, 1)], ids=str)
def test_every_shape(op: OnDevice, heads: tuple[int, int], head_dim: int) -> None:
    case = make([70, 140], heads=heads, head_dim=head_dim)
    assert_as_good_as_the_twin(op, case, [(0, 70), (130, 140)])
    assert_as_good_as_the_twin(op, case, decode([70, 140]))


@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
def test_every_shape_of_q8_0(op: OnDevice, head_dim: int) -> None:
    case = make([70, 140], heads=(6, 2), head_dim=head_dim, kv_dtype="q8_0")
    assert_as_good_as_the_twin(op, case, [(0, 70), (130, 140)])
    assert_as_good_as_the_twin(op, case, decode([70, 140]))


@pytest.mark.parametrize("heads", [(24, 1), (5, 1), (20, 4)], ids=str)
def test_groups_that_fill_no_fragment_or_more_than_one(op: OnDevice, heads: tuple[int, int]) -> None:
    case = make([20, 140], heads=heads)
    assert_as_good_as_the_twin(op, case)
    assert_as_good_as_the_twin(op, case, decode([20, 140], 3))


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(256, 64), (64, 16), (48, 12), (64, 62)])
def test_gates_and_partial_rotary(op: OnDevice, head_dim: int, rotary_dim: int) -> None:
    case = make([70, 3, 140], heads=(6, 2), head_dim=head_dim, rotary_dim=rotary_dim, gated=True)
    assert_as_good_as_the_twin(op, case)
    assert_as_good_as_the_twin(op, case, decode([70, 3, 140]))


def test_a_gate_multiplies_the_context_of_its_own_head(op: OnDevice) -> None:
    """Gates of 0 halve the context; +-90 let everything and nothing through; the context itself is that without a gate."""
    case = make([140], gated=True)
    rows = case.qkv[0].view(140, 12, 64)
    queries, gates = rows[:, 0:8:2], rows[:, 1:8:2]
    plain = replace(case, qkv=[torch.cat([queries, rows[:, 8:]], 1).reshape(140, -1)], gated=False)
    for head, value in enumerate((0.0, 90.0, -90.0, 1e30)):
        gates[:, head] = value
    for spans in ([(0, 20)], [(19, 20)], [(139, 140)]):
        context = plain.run(op, filled(plain, spans), spans).view(-1, 4, 64)
        got = case.run(op, filled(case, spans), spans).view(-1, 4, 64)
        assert torch.equal(got[:, 0], context[:, 0] / 2)
        assert torch.equal(got[:, 1], context[:, 1]) and torch.equal(got[:, 3], context[:, 3])
        assert got[:, 2].abs().max() < 1e-35


# -- Contexts that are known exactly


@pytest.mark.parametrize("head_dim", [16, 128, 256])
@pytest.mark.parametrize(
    ("lengths", "new_tokens"),
    [([130, 9], 130), ([257, 66], 20), ([1, 63, 64, 65, 127, 128, 129, 193, 257], 1), ([66, 130, 133], FEW)],
)
def test_queries_of_zero_give_the_mean_of_the_values_seen(
    op: OnDevice, lengths: list[int], new_tokens: int, head_dim: int
) -> None:
    """A norm weight of 0 makes all scores 0; a key too much or too few, also one of another page, shows."""
    case = make(lengths, heads=(6, 2), head_dim=head_dim)
    case = replace(case, q_norm=torch.zeros(head_dim))
    spans = decode(lengths, new_tokens)
    got = case.run(op, filled(case, spans), spans)
    expected = case.run(reference, filled(case, spans), spans, compute_dtype=torch.float64)
    assert (got - expected).abs().max() <= 2e-6


@pytest.mark.parametrize(("head_dim", "lengths"), [(16, [1024, 1025, 1153]), (128, [1153])])
def test_splits_of_more_than_the_least_pages(op: OnDevice, lengths: list[int], head_dim: int) -> None:
    """16 key-value heads make at most 8 splits: from 1,025 keys on they are of three pages, and the new token is in the last one."""
    case = make(lengths, heads=(16, 16), head_dim=head_dim)
    case = replace(case, q_norm=torch.zeros(head_dim))
    got = case.run(op, filled(case, decode(lengths)), decode(lengths))
    expected = case.run(reference, filled(case, decode(lengths)), decode(lengths), compute_dtype=torch.float64)
    assert (got - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize(("lengths", "new_tokens"), [([70, 140], 140), ([70, 140], 1), ([140], FEW)])
def test_a_query_that_is_a_key_finds_its_value(
    op: OnDevice, lengths: list[int], new_tokens: int, head_dim: int
) -> None:
    """Without rotation, and with scores so large that the softmax picks one key: every dimension of every key is where it should be."""
    case = make(lengths, heads=(2, 2), head_dim=head_dim)
    case.cos_sin[:, : head_dim // 2], case.cos_sin[:, head_dim // 2 :] = 1.0, 0.0
    case = replace(case, q_norm=torch.full((head_dim,), 40.0), k_norm=torch.full((head_dim,), 40.0))
    generator = torch.Generator().manual_seed(1)
    spans = decode(lengths, new_tokens)
    expected = []
    for qkv, (begin, end) in zip(case.qkv, spans, strict=True):
        heads = qkv.view(len(qkv), 6, head_dim)
        wanted = [int(torch.randint(at + 1, (1,), generator=generator)) for at in range(len(qkv))]
        heads[:, :2] = heads[wanted, 2:4]
        expected.append(heads[wanted, 4:].to(torch.bfloat16).float().view(len(qkv), -1)[begin:end])
    got = case.run(op, filled(case, spans), spans)
    assert torch.equal(got, torch.cat(expected))


# -- What depends on what


@every_kv_dtype
def test_a_batch_equals_each_alone_bit_for_bit(op: OnDevice, kv_dtype: KvDtype) -> None:
    """Single tokens, a few, a chunk and a prompt in one batch; and the same token among single ones alone."""
    case = make([300, 90, 133, 1, 130, 70], heads=(4, 1), kv_dtype=kv_dtype)
    spans = [(299, 300), (89, 90), (130, 133), (0, 1), (60, 130), (0, 70)]
    cache = filled(case, spans)
    alone_cache, single_cache = [tensor.clone() for tensor in cache], [tensor.clone() for tensor in cache]
    batch = case.run(op, cache, spans)
    alone = [case.run(op, alone_cache, [span], [i]) for i, span in enumerate(spans)]
    assert torch.equal(batch, torch.cat(alone))
    assert all(map(same_bits, cache, alone_cache))
    singles = case.run(op, single_cache, [spans[0], spans[1], spans[3]], [0, 1, 3])
    assert torch.equal(singles, torch.cat([alone[0], alone[1], alone[3]]))


@pytest.mark.parametrize("chunk", [1, FEW, FEW + 1, 64])
def test_chunks_are_as_good_as_the_whole(op: OnDevice, chunk: int) -> None:
    case = make([130], heads=(6, 2))
    truth = case.run(reference, case.empty_cache(), [(0, 130)], compute_dtype=torch.float64)
    yardstick = case.run(reference, case.empty_cache(), [(0, 130)], compute_dtype=torch.bfloat16)
    whole_cache, cache = case.empty_cache(), case.empty_cache()
    case.run(op, whole_cache, [(0, 130)])
    parts = [case.run(op, cache, [(at, min(at + chunk, 130))]) for at in range(0, 130, chunk)]
    assert (torch.cat(parts) - truth).abs().max() <= 2 * (yardstick - truth).abs().max()
    assert all(map(same_bits, cache, whole_cache))


def test_a_row_that_only_fills_a_batch_up(op: OnDevice) -> None:
    """Its length is 0: a context of 0, nothing written, whatever its slot; the others' bits as without it."""
    case = make([140, 20])
    spans = decode([140, 20])
    cache, expected_cache = filled(case, spans), filled(case, spans)
    expected = case.run(op, expected_cache, spans)

    class Padded:
        def paged_attention(self, qkv, q_norm, k_norm, eps, cos_sin, positions, slots, tables, cu, lengths, *rest):
            def more(tensor: torch.Tensor) -> torch.Tensor:
                return torch.cat([tensor, torch.zeros_like(tensor[:1])])

            cu = torch.cat([cu, cu[-1:] + 1])
            return op.paged_attention(
                more(qkv), q_norm, k_norm, eps, cos_sin, more(positions), more(slots), more(tables), cu, more(lengths), *rest
            )  # fmt: skip

    got = case.run(Padded(), cache, spans)
    assert torch.equal(got[:2], expected) and not got[2].any()
    assert all(map(same_bits, cache, expected_cache))


@every_kv_dtype
def test_large_scores_do_not_overflow(op: OnDevice, kv_dtype: KvDtype) -> None:
    case = make([130, 70], kv_dtype=kv_dtype)
    case = replace(case, q_norm=case.q_norm * 60, k_norm=case.k_norm * 60)
    for spans in (case.whole(), decode([130, 70])):
        assert case.run(op, filled(case, spans), spans).isfinite().all()


@every_kv_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 4, 6], ids=["query", "key", "value"])
@pytest.mark.parametrize("length", [5, 20])
def test_what_is_not_finite_shows_in_its_own_sequence(
    op: OnDevice, length: int, part: int, value: float, kv_dtype: KvDtype
) -> None:
    case = make([length, length], kv_dtype=kv_dtype)
    case.qkv[0][2, part * 64] = value
    cache, twin_cache = case.empty_cache(), case.empty_cache()
    got = case.run(op, cache, case.whole())
    assert not got[2].isfinite().all()
    assert not got[length:].isnan().any()
    if part == 0:
        assert got[2, :64].isnan().all() and not got[[0, 1, 3, 4]].isnan().any()
    case.run(reference, twin_cache, case.whole())
    for ours, theirs in zip(cache, twin_cache, strict=True):
        if kv_dtype == "q8_0":
            assert torch.equal(ours[:, :, :64], theirs[:, :, :64])
            ours, theirs = (x[:, :, 64:].reshape(-1).view(torch.float16) for x in (ours, theirs))
        assert torch.equal(ours.nan_to_num(nan=-1), theirs.nan_to_num(nan=-1))


def test_the_comparisons_can_fail(op: OnDevice) -> None:
    """A key too few in a mean, a norm weight that is wrong by a tenth."""
    case = make([65])
    truth = case.run(reference, case.empty_cache(), case.whole(), compute_dtype=torch.float64)
    yardstick = case.run(reference, case.empty_cache(), case.whole(), compute_dtype=torch.bfloat16)
    wrong = replace(case, q_norm=case.q_norm * 1.1).run(op, case.empty_cache(), case.whole())
    assert (wrong - truth).abs().max() > 2 * (yardstick - truth).abs().max()
    case = replace(case, q_norm=torch.zeros(64))
    whole = case.run(reference, case.empty_cache(), case.whole(), compute_dtype=torch.float64)
    one_less = case.run(op, case.empty_cache(), [(0, 64)])
    assert (whole[64] - one_less[63]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(70, 512, dtype=torch.float64)),
        ("qkv", torch.zeros(70, 500)),
        ("k_norm", torch.zeros(63)),
        ("positions", torch.zeros(70, dtype=torch.int32)),
        ("seq_lens", torch.zeros(2, dtype=torch.int32)),
        ("v_cache", torch.zeros(5, 2, 64, 64)),
        ("k_cache", torch.zeros(5, 2, 64, 64, dtype=torch.float16)),
        ("k_cache", torch.zeros(5, 2, 64, 64, dtype=torch.int8)),
    ],
)
def test_tensors_of_a_wrong_kind_are_named(op: OnDevice, name: str, value: torch.Tensor) -> None:
    given = arguments(make([70])) | {name: value}
    with pytest.raises(ValueError, match="k_cache|v_cache" if name == "k_cache" else name):
        op.paged_attention(*given.values())


def test_heads_that_are_not_supported(op: OnDevice) -> None:
    case = make([3], heads=(2, 2), head_dim=24)
    with pytest.raises(ValueError, match="paged_attention: head_dim: expected a multiple of 16 up to 256, got 24"):
        case.run(op, case.empty_cache(), case.whole())
