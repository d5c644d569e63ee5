"""``gated_delta_rule``: the native core against its twin, the twin against transformers, and the equalities that prefill,
decode, batching and saved states rest on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch

from helexa_engine.ops.gated_delta_rule import gated_delta_rule, reference
from helexa_engine.ops.registry import native_core

_native: Any = native_core()
native: Any = None if _native is None else import_module("helexa_engine.ops.gated_delta_rule.native")
needs_core = pytest.mark.skipif(_native is None, reason="the native core is not built")
MODULES = [pytest.param(native, id="native", marks=needs_core), pytest.param(reference, id="reference")]

pytestmark = pytest.mark.usefixtures("poisoned")

# Large beside the mean square of most outputs: the division of the gated norm must not blow up the rounding errors of a few
# small rows, which would then be all that a largest error sees.
EPS = 1e-2
CHUNK = 16  # tokens: csrc/cpu/gated_delta_rule.h


class Answer(NamedTuple):
    """Outputs of whole sequences, and the states after them by slot."""

    out: torch.Tensor
    state: torch.Tensor


@dataclass
class Case:
    """Whole sequences; a run takes a span of each. Sequence i has slot ``slots[i]``; the other slots hold NaN. What the twin
    makes of it is computed once."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    tiled: bool
    rows: list[dict[str, torch.Tensor]]  # of each sequence: qkv, z, b, a
    a_coefficient: torch.Tensor
    dt_bias: torch.Tensor
    norm_weight: torch.Tensor
    initial: torch.Tensor  # [N, V, Dk, Dv]
    slots: list[int]

    def states(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        state = torch.full((len(self.rows) + 2, *self.initial.shape[1:]), float("nan"), dtype=dtype)
        state[self.slots] = self.initial.to(dtype)
        return state

    def arguments(self, state: torch.Tensor, spans, which=None) -> dict:
        which = list(range(len(self.rows))) if which is None else which
        packed = {
            name: torch.cat([self.rows[i][name][begin:end] for i, (begin, end) in zip(which, spans, strict=True)])
            for name in ("qkv", "z", "b", "a")
        }
        cu = torch.tensor([0] + [end - begin for begin, end in spans]).cumsum(0).int()
        return {
            **packed, "a_coefficient": self.a_coefficient, "dt_bias": self.dt_bias, "norm_weight": self.norm_weight,
            "eps": EPS, "recurrent_state": state,
            "state_slots": torch.tensor([self.slots[i] for i in which], dtype=torch.int32), "cu_seqlens": cu,
            "num_k_heads": self.num_k_heads, "num_v_heads": self.num_v_heads, "tiled": self.tiled,
        }  # fmt: skip

    def run(self, module, state, spans, which=None, **options) -> torch.Tensor:
        return module.gated_delta_rule(**self.arguments(state, spans, which), **options)

    def whole(self) -> list[tuple[int, int]]:
        return [(0, len(rows["z"])) for rows in self.rows]

    @cached_property
    def truth(self) -> Answer:
        state = self.states(torch.float64)
        return Answer(self.run(reference, state, self.whole(), compute_dtype=torch.float64), state)

    @cached_property
    def twin(self) -> Answer:
        state = self.states()
        return Answer(self.run(reference, state, self.whole()), state)


def make(lengths, *, heads=(2, 4), dims=(32, 48), tiled=False, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    (num_k, num_v), (dk, dv) = heads, dims
    rows = [
        {
            "qkv": normal(n, 2 * num_k * dk + num_v * dv),
            "z": normal(n, num_v * dv),
            "b": normal(n, num_v),
            "a": normal(n, num_v),
        }
        for n in lengths
    ]
    slots = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)].tolist()
    return Case(
        num_k, num_v, dk, dv, tiled, rows, -normal(num_v).exp(), normal(num_v), 1 + 0.2 * normal(dv),
        0.5 * normal(len(lengths), num_v, dk, dv), slots,
    )  # fmt: skip


made = cache(make)  # for tests that leave their case as it is


def largest_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).abs().max())


def judge(case: Case, module, parts=None) -> None:
    """Outputs and float32 states, over the parts of all sequences in turn: error against the twin in float64, whole, at most
    twice the float32 twin's. Slots of nobody keep their NaN."""
    (truth, exact), (twin, twin_state), state = case.truth, case.twin, case.states()
    if parts is None:
        got = case.run(module, state, case.whole())
    else:
        got = torch.cat([case.run(module, state, [span]) for span in parts])
    assert got.shape == truth.shape and not got.isnan().any()
    mine = case.slots
    assert largest_error(state[mine], exact[mine]) <= 2 * largest_error(twin_state[mine], exact[mine])
    assert largest_error(got, truth) <= 2 * largest_error(twin, truth)
    others = [i for i in range(len(state)) if i not in mine]
    assert state[others].isnan().all()


@pytest.mark.parametrize("length", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 31, 32, 33, 63, 64, 65, 80, 1000])
def test_equals_the_twin_at_every_length(isa: str, length: int) -> None:
    judge(made((length,) * (8 if length < 20 else 1), heads=(2, 4)), native)


@pytest.mark.parametrize("tiled", [False, True], ids=["grouped", "tiled"])
@pytest.mark.parametrize("dims", [(16, 16), (64, 32), (32, 80), (128, 128), (256, 64)], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (2, 6)], ids=str)
def test_equals_the_twin_for_every_shape(isa: str, heads: tuple[int, int], dims: tuple[int, int], tiled: bool) -> None:
    judge(made((70, 3, 20, 1), heads=heads, dims=dims, tiled=tiled), native)


def test_packed_sequences_of_unequal_length(isa: str) -> None:
    judge(made((1, 130, 64, 7, 65, 1, 16)), native)


@pytest.mark.parametrize("module", MODULES)
def test_tiled_and_grouped_heads_differ(module) -> None:
    """Known bad: the other assignment of value heads to key heads."""
    case = make([20], heads=(2, 4), tiled=True)
    with pytest.raises(AssertionError):
        truth = case.run(reference, case.states(), case.whole())
        wrong = replace(case, tiled=False).run(module, case.states(), case.whole())
        torch.testing.assert_close(wrong, truth)
    assert reference.key_head_of(2, 4, tiled=True).tolist() == [0, 1, 0, 1]
    assert reference.key_head_of(2, 4, tiled=False).tolist() == [0, 0, 1, 1]


@cache
def correlated(kind: str, length: int = 300, seed: int = 0) -> Case:
    """Keys that hardly differ, beta near 1, slow decay: products of the chunk form's triangle grow where it is inverted."""
    case = make([length], heads=(2, 4), dims=(128, 64), seed=seed)
    rows = case.rows[0]
    rows["b"] += 8
    rows["a"] -= 8
    if kind == "equal":
        rows["qkv"][:] = rows["qkv"][:1]
    elif kind == "nearly equal":
        rows["qkv"] = rows["qkv"][:1] + 0.01 * rows["qkv"]
    else:  # the same five tokens again and again
        rows["qkv"] = rows["qkv"][torch.arange(length) % 5].clone()
    return case


@pytest.mark.parametrize("kind", ["equal", "nearly equal", "repetitive"])
def test_strongly_correlated_keys(isa: str, kind: str) -> None:
    judge(correlated(kind), native)


def test_inverting_by_repeated_squaring_would_fail() -> None:
    """Known bad: (I + A)^-1 = (I - A)(I + A^2)(I + A^4)... in float32 on such keys; and these keys are such."""
    rows = correlated("equal").rows[0]
    k = reference.l2_norm(rows["qkv"][:64, 256:384])
    a = (torch.sigmoid(rows["b"][:64, :1]) * (k @ k.T)).tril(-1)
    inverse, power = torch.eye(64) - a, a @ a
    for _ in range(5):
        inverse = inverse + inverse @ power
        power = power @ power
    exact = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + a.double())
    assert not largest_error(inverse, exact) < 1.0
    assert float(exact.abs().max()) <= 1.001


def test_a_fast_decay_before_slow_ones(isa: str) -> None:
    """The running sum of g is near -300 when decays of 0.999 must be told apart."""
    case = make([128], dims=(64, 64))
    case.rows[0]["a"] -= 8
    case.rows[0]["a"][8] = 300 + case.rows[0]["a"][8]
    judge(case, native)


@pytest.mark.parametrize("length", [CHUNK - 1, 40])
@pytest.mark.parametrize("a", [-100.0, -20.0, 0.0, 5.0, 25.0, 90.0, 1000.0])
def test_gates_far_out(isa: str, a: float, length: int) -> None:
    """Both branches of softplus: the decay is right where nothing is learned (beta 0), and nothing overflows."""
    case = make([length], heads=(1, 1), dims=(16, 16))
    case.rows[0]["a"][:] = a
    case.rows[0]["b"][:] = -200.0
    case = replace(case, dt_bias=torch.zeros(1), a_coefficient=torch.tensor([-0.01]))
    state = case.states()
    out = case.run(native, state, case.whole())
    g = -0.01 * (a if a > 30 else float(torch.tensor(a, dtype=torch.float64).exp().log1p()))
    expected = case.initial.double() * torch.tensor(g * length, dtype=torch.float64).exp()
    assert not out.isnan().any()
    assert largest_error(state[case.slots], expected) <= 1e-5 * float(expected.abs().max()) + 1e-30


@pytest.mark.parametrize("size", [1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, "random"])
def test_any_split_equals_whole(isa: str, size) -> None:
    case = made((300,))
    borders = list(range(0, 300, size)) if size != "random" else [0, *sorted({11, 12, 77, 140, 141, 204, 290})]
    judge(case, native, parts=list(zip(borders, [*borders[1:], 300], strict=True)))


@pytest.mark.parametrize("size", [1, 63, 64, "random"])
def test_any_split_of_the_twin_equals_whole(size) -> None:
    borders = list(range(0, 140, size)) if size != "random" else [0, 11, 12, 77, 139]
    judge(made((140,)), reference, parts=list(zip(borders, [*borders[1:], 140], strict=True)))


def test_a_batch_of_the_twin_equals_each_alone() -> None:
    case = make([50, 0, 1, 64], heads=(2, 6))
    state = case.states()
    alone = [case.run(reference, state, [span], [i]) for i, span in enumerate(case.whole())]
    assert largest_error(torch.cat(alone), case.twin.out.double()) <= 1e-5
    assert largest_error(state[case.slots], case.twin.state[case.slots].double()) <= 1e-5


@pytest.mark.parametrize("module", MODULES)
def test_a_split_that_drops_the_state_is_seen(module) -> None:
    """Known bad: the second part begins from the state before the first."""
    case = make([130])
    whole = case.run(module, case.states(), case.whole())
    second = case.run(module, case.states(), [(64, 130)])
    assert largest_error(second, whole[64:].double()) > 1e-2


@pytest.mark.parametrize("border", [CHUNK, 64, 80, 128, 256])
def test_a_split_at_a_chunk_equals_whole_bit_for_bit(isa: str, border: int) -> None:
    """What a prompt resumed from a saved state at a page's border, a multiple of 64, rests on."""
    case = make([270])
    whole_state, state = case.states(), case.states()
    whole = case.run(native, whole_state, case.whole())
    parts = [case.run(native, state, [span]) for span in ((0, border), (border, 270))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(state[case.slots], whole_state[case.slots])


def test_a_state_saved_and_restored_equals_uninterrupted_bit_for_bit(isa: str) -> None:
    case = make([200])
    state = case.states()
    case.run(native, state, [(0, 101)])
    saved = state[case.slots].clone()
    uninterrupted = [case.run(native, state, [span]) for span in ((101, 199), (199, 200))]
    state[case.slots] = float("nan")  # another sequence had the slot
    moved = replace(case, slots=[next(i for i in range(3) if i not in case.slots)])
    state[moved.slots] = saved
    resumed = [moved.run(native, state, [span]) for span in ((101, 199), (199, 200))]
    assert torch.equal(torch.cat(resumed), torch.cat(uninterrupted))


def test_a_batch_equals_each_alone_bit_for_bit(isa: str) -> None:
    """Prefill, decode, a short and a long chunk in one batch, and one sequence that rests."""
    case = make([150, 90, 65, 1, 130, 8], heads=(2, 6))
    spans = [(0, 150), (89, 90), (64, 65), (0, 1), (70, 130), (8, 8)]
    state = case.states()
    for i, (begin, _) in enumerate(spans):
        if begin:
            case.run(native, state, [(0, begin)], [i])
    alone_state = state.clone()
    batch = case.run(native, state, spans)
    alone = [case.run(native, alone_state, [span], [i]) for i, span in enumerate(spans)]
    assert torch.equal(batch, torch.cat(alone))
    assert torch.equal(state[case.slots], alone_state[case.slots])


@needs_core
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    """With few threads value heads share the work on their key head."""
    case = make([300, 1], heads=(2, 6))
    before = _native.num_threads()
    expected_state, state = case.states(), case.states()
    try:
        _native.set_num_threads(2)
        expected = case.run(native, expected_state, case.whole())
        _native.set_num_threads(threads)
        assert torch.equal(case.run(native, state, case.whole()), expected)
    finally:
        _native.set_num_threads(before)
    assert torch.equal(state[case.slots], expected_state[case.slots])


def test_levels_agree_with_generic(isa: str) -> None:
    case = make([100, 9], dims=(128, 128))
    states = [case.states(), case.states()]
    got = case.run(native, states[0], case.whole())
    _native.set_cpu_isa("generic")
    generic = case.run(native, states[1], case.whole())
    assert (got - generic).abs().max() <= 1e-5
    assert (states[0] - states[1])[case.slots].abs().max() <= 1e-5


def test_slices_of_wider_rows_equal_contiguous_ones_bit_for_bit(isa: str) -> None:
    case = make([70, 1])
    plain = case.arguments(case.states(), case.whole())
    sliced = dict(plain, recurrent_state=case.states())
    for name in ("qkv", "z", "b", "a"):
        wide = torch.full((71, plain[name].shape[1] + 9), float("nan"))
        wide[:, 5:-4] = plain[name]
        sliced[name] = wide[:, 5:-4]
    assert torch.equal(native.gated_delta_rule(**sliced), native.gated_delta_rule(**plain))
    twin = reference.gated_delta_rule(**dict(sliced, recurrent_state=case.states()))
    assert largest_error(twin, reference.gated_delta_rule(**dict(plain, recurrent_state=case.states()))) <= 1e-5


@pytest.mark.parametrize("length", [5, 70])
def test_nan_stays_in_its_sequence(isa: str, length: int) -> None:
    """A broken activation must be seen by the runtime, and only where it is."""
    case = make([length, length])
    case.rows[0]["qkv"][2, 0] = float("nan")  # a query: the state stays whole
    state = case.states()
    got = case.run(native, state, case.whole())
    assert got[2, :48].isnan().all()
    assert not got[length:].isnan().any() and not state[case.slots].isnan().any()
    case.rows[0]["a"][3, 0] = float("nan")
    state = case.states()
    case.run(native, state, case.whole())
    assert state[case.slots[0], 0].isnan().all() and not state[case.slots[1]].isnan().any()


@pytest.mark.parametrize("module", MODULES)
def test_no_tokens(module) -> None:
    case = make([0, 0])
    state = case.states()
    assert case.run(module, state, case.whole()).shape == (0, 4 * 48)
    assert torch.equal(state[case.slots], case.initial)


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (2, 6)], ids=str)
def test_the_twin_equals_transformers(heads: tuple[int, int], form: str) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    rule = getattr(modeling, f"torch_{form}_gated_delta_rule")
    case = make([130], heads=heads, dims=(32, 16))
    rows, (num_k, num_v) = case.rows[0], heads
    q, k, v = torch.split(rows["qkv"], [num_k * 32, num_k * 32, num_v * 16], dim=1)
    g = case.a_coefficient * torch.nn.functional.softplus(rows["a"] + case.dt_bias)
    out, state = rule(
        q.view(1, 130, num_k, 32), k.view(1, 130, num_k, 32), v.view(1, 130, num_v, 16), g=g[None],
        beta=rows["b"].sigmoid()[None], initial_state=case.initial.clone(), output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    norm = modeling.Qwen3NextRMSNormGated(16, eps=EPS)
    norm.weight.data = case.norm_weight
    expected = norm(out[0], rows["z"].view(130, num_v, 16)).detach().reshape(130, -1)
    ours = case.states()
    got = case.run(reference, ours, case.whole())
    assert largest_error(got, expected.double()) <= 5e-6
    assert largest_error(ours[case.slots], state.double()) <= 2e-6


def bfloat16_state(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Known bad: the state rounded to bfloat16 after each token."""
    state = case.states()
    outs = []
    for t in range(len(case.rows[0]["z"])):
        outs.append(case.run(native, state, [(t, t + 1)]))
        state = state.bfloat16().float()
    return torch.cat(outs), state


@needs_core
def test_the_comparison_can_fail() -> None:
    """A rounded state, and a decay that is wrong by one part in ten thousand, must show."""
    case = make([65])
    exact, twin_state = case.states(torch.float64), case.states()
    case.run(reference, exact, case.whole(), compute_dtype=torch.float64)
    case.run(reference, twin_state, case.whole())
    allowed = 2 * largest_error(twin_state[case.slots], exact[case.slots])
    _, rounded = bfloat16_state(case)
    assert largest_error(rounded[case.slots], exact[case.slots]) > allowed
    state = case.states()
    replace(case, a_coefficient=case.a_coefficient * 1.0001).run(native, state, case.whole())
    assert largest_error(state[case.slots], exact[case.slots]) > allowed


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state_slots", [0, 4], r"state_slots\[1\]: expected a slot of its own from 0 to 3, got 4"),
        ("state_slots", [-1, 1], r"state_slots\[0\]"),
        ("state_slots", [1, 1], r"state_slots\[1\]"),
        ("cu_seqlens", [0, 80, 73], r"cu_seqlens\[1\]: expected 0 to 73, got 80"),
        ("cu_seqlens", [0, 20, 10], r"cu_seqlens\[2\]: expected 20 to 73, got 10"),
        ("cu_seqlens", [1, 20, 73], r"cu_seqlens\[0\]: expected 0, got 1"),
        ("cu_seqlens", [0, 20, 72], r"cu_seqlens\[2\]: expected 73, got 72"),
        ("cu_seqlens", [0, 73], r"cu_seqlens: expected"),
        ("qkv", torch.zeros(73, 319), "qkv: expected"),
        ("z", torch.zeros(72, 192), "z: expected"),
        ("b", torch.zeros(73, 3), "b: expected"),
        ("a", torch.zeros(73), "a: expected"),
        ("a_coefficient", torch.zeros(5), "a_coefficient: expected"),
        ("dt_bias", torch.zeros(4, 1), "dt_bias: expected"),
        ("norm_weight", torch.zeros(32), "norm_weight: expected"),
        ("recurrent_state", torch.zeros(4, 3, 32, 48), "recurrent_state: expected"),
    ],
)
def test_every_argument_is_checked_before_anything_is_written(module, name: str, value, message: str) -> None:
    case = make([70, 3])
    state = case.states()
    before = state.clone()
    arguments = case.arguments(state, case.whole())
    arguments[name] = torch.tensor(value, dtype=torch.int32) if isinstance(value, list) else value
    with pytest.raises(ValueError, match=message):
        module.gated_delta_rule(**arguments)
    assert torch.equal(state.nan_to_num(), before.nan_to_num())


@needs_core
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qkv", torch.zeros(320, 73).T, "qkv: expected float32"),
        ("z", torch.zeros(73, 192, dtype=torch.float64), "z: expected float32"),
        ("state_slots", torch.tensor([0, 1]), "state_slots: expected contiguous torch.int32"),
        ("recurrent_state", torch.zeros(4, 4, 48, 32).transpose(2, 3), "recurrent_state: .* not contiguous"),
        ("num_v_heads", 3, "expected"),
    ],
)
def test_tensors_of_a_wrong_kind_are_named(name: str, value, message: str) -> None:
    case = make([70, 3])
    with pytest.raises(ValueError, match=message):
        native.gated_delta_rule(**dict(case.arguments(case.states(), case.whole()), **{name: value}))


@needs_core
def test_the_choice_depends_on_the_head_dims() -> None:
    assert gated_delta_rule.choose("cpu", head_k_dim=128, head_v_dim=64) is native
    assert gated_delta_rule.choose("cpu", head_k_dim=24, head_v_dim=64) is reference
    assert gated_delta_rule.choose("cpu", head_k_dim=128, head_v_dim=512) is reference
