"""``csrc/cuda/gated_delta_rule.cu`` against the twin: the delta rule token by token, and with the convolution in front."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helexa_engine.ops.gated_delta_rule import reference
from tests.engine.ops.test_gated_delta_rule import Case, correlated, largest_error, made, make
from tests.native import test_cuda_causal_conv1d as convolution

ROWS = ("qkv", "z", "b", "a")


class Kernels:
    """The kernel as the op's other implementations are called; states are updated in place."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def gated_delta_rule(
        self, *, num_k_heads: int, num_v_heads: int, tiled: bool, eps: float, chunk: int = 0, chunk_from: int = 0,
        conv_weight: torch.Tensor | None = None, conv_state: torch.Tensor | None = None, **tensors: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        core = self.core
        # Rows lie further apart than they are long, as slices of wider ones do.
        padded = {name: np.pad(tensors[name].numpy(), ((0, 0), (0, 5)), constant_values=np.nan) for name in ROWS}
        placed = {name: core.put(padded.get(name, tensor.numpy())) for name, tensor in tensors.items()}
        at = {name: core.address(array) for name, array in placed.items()}
        strided = [value for name in ROWS for value in (at[name], padded[name].shape[1])]
        out = core.put(np.full(tensors["z"].shape, np.nan, dtype=np.float32))
        options: dict[str, int] = {}
        counters = core.put(np.zeros(len(tensors["state_slots"]) * num_k_heads, dtype=np.int32))
        if conv_weight is not None and conv_state is not None:
            placed["conv_state"] = core.put(conv_state.numpy())
            weights = core.put(conv_weight.numpy())
            options = {
                "conv_weight": core.address(weights), "taps": conv_weight.shape[1],
                "conv_state": core.address(placed["conv_state"]), "arrivals": core.address(counters),
            }  # fmt: skip
        state = tensors["recurrent_state"]
        core.kernels.gated_delta_rule(
            *strided, at["a_coefficient"], at["dt_bias"], at["norm_weight"], eps, at["recurrent_state"],
            at["state_slots"], at["cu_seqlens"], len(tensors["state_slots"]), num_k_heads, num_v_heads, *state.shape[2:],
            tiled, core.address(out), chunk, chunk_from, **options,
        )  # fmt: skip
        state.copy_(torch.from_numpy(core.get(placed["recurrent_state"])))
        if conv_state is not None:
            conv_state.copy_(torch.from_numpy(core.get(placed["conv_state"])))
        assert not core.get(counters).any()
        return torch.from_numpy(core.get(out))


@pytest.fixture
def kernels(cuda_core) -> Kernels:
    return Kernels(cuda_core)


def judge(kernels: Kernels, *draws: Case) -> None:
    """Outputs and float32 states: the largest error of all draws against the twin in float64 at most twice the float32 twin's; on
    one draw of few values the twin may be lucky. Slots of nobody keep their NaN."""
    errors = []
    for case in draws:
        (truth, exact), (twin, twin_state), state, mine = case.truth, case.twin, case.states(), case.slots
        got = case.run(kernels, state, case.whole())
        assert not got.isnan().any()
        assert state[[i for i in range(len(state)) if i not in mine]].isnan().all()
        pairs = ((got, truth), (twin, truth), (state[mine], exact[mine]), (twin_state[mine], exact[mine]))
        errors.append([largest_error(ours, right) for ours, right in pairs])
    out, twin_out, state_error, twin_state_error = np.max(errors, axis=0)
    assert state_error <= 2 * twin_state_error
    assert out <= 2 * twin_out


@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 9, 17])
def test_every_length(kernels: Kernels, length: int) -> None:
    """On both sides of the tokens that are in shared memory at once."""
    judge(kernels, *(made((length,) * 3, heads=(1, 2), dims=(32, 48), seed=seed) for seed in range(3)))


@pytest.mark.parametrize("tiled", [False, True], ids=["grouped", "tiled"])
@pytest.mark.parametrize(
    ("dims", "heads"),
    [((16, 16), (2, 2)), ((64, 48), (1, 3)), ((112, 128), (2, 4)), ((128, 64), (2, 4)), ((128, 128), (1, 2))],
    ids=str,
)
def test_every_shape(kernels: Kernels, dims: tuple[int, int], heads: tuple[int, int], tiled: bool) -> None:
    judge(kernels, *(made((20, 9), heads=heads, dims=dims, tiled=tiled, seed=seed) for seed in range(3)))


def test_packed_sequences_of_unequal_length(kernels: Kernels) -> None:
    judge(kernels, *(make([1, 0, 9, 4, 1, 20, 0], heads=(1, 2), dims=(16, 32), seed=seed) for seed in range(2)))


@pytest.mark.parametrize("kind", ["equal", "nearly equal", "repetitive"])
def test_strongly_correlated_keys(kernels: Kernels, kind: str) -> None:
    judge(kernels, correlated(kind, length=40))


@pytest.mark.parametrize("a", [-100.0, -20.0, 0.0, 5.0, 25.0, 90.0, 1000.0])
def test_gates_far_out(kernels: Kernels, a: float) -> None:
    """Both branches of softplus: the decay is right where nothing is learned (beta 0), and nothing overflows."""
    case = make([9], heads=(1, 1), dims=(16, 16))
    case.rows[0]["a"][:] = a
    case.rows[0]["b"][:] = -200.0
    case.dt_bias, case.a_coefficient = torch.zeros(1), torch.tensor([-0.01])
    state = case.states()
    out = case.run(kernels, state, case.whole())
    g = -0.01 * (a if a > 30 else float(torch.tensor(a, dtype=torch.float64).exp().log1p()))
    expected = case.initial.double() * torch.tensor(g * 9, dtype=torch.float64).exp()
    assert not out.isnan().any()
    assert largest_error(state[case.slots], expected) <= 1e-5 * float(expected.abs().max()) + 1e-30


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 9])
def test_any_split_equals_whole_bit_for_bit(kernels: Kernels, size: int) -> None:
    """A step of several tokens, as a verification of guesses is, gives what that many steps would."""
    case = make([20], heads=(1, 2), dims=(32, 16))
    whole_state, state = case.states(), case.states()
    whole = case.run(kernels, whole_state, case.whole())
    parts = [case.run(kernels, state, [(begin, min(begin + size, 20))]) for begin in range(0, 20, size)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(state[case.slots], whole_state[case.slots])


def test_a_batch_equals_each_alone_bit_for_bit(kernels: Kernels) -> None:
    case = make([9, 1, 3], heads=(1, 2), dims=(16, 16))
    state, alone_state = case.states(), case.states()
    batch = case.run(kernels, state, case.whole())
    alone = [case.run(kernels, alone_state, [span], [i]) for i, span in enumerate(case.whole())]
    assert torch.equal(batch, torch.cat(alone))
    assert torch.equal(state[case.slots], alone_state[case.slots])


@pytest.mark.parametrize(("chunk", "chunk_from"), [(8, 4), (8, 8), (16, 3)])
def test_only_what_is_behind_a_sequences_chunks(kernels: Kernels, chunk: int, chunk_from: int) -> None:
    lengths = [8, 3, 9, 12, 27, 0, 19]
    case = make(lengths, heads=(1, 2), dims=(16, 16))
    firsts = [n - (n % chunk if n % chunk < chunk_from else 0) for n in lengths]
    state, expected_state = case.states(), case.states()
    got = case.run(kernels, state, case.whole(), chunk=chunk, chunk_from=chunk_from)
    rows = torch.cat([torch.arange(n) >= first for n, first in zip(lengths, firsts, strict=True)])
    expected = case.run(kernels, expected_state, list(zip(firsts, lengths, strict=True)))
    assert torch.equal(got[rows], expected) and got[~rows].isnan().all()
    assert torch.equal(state[case.slots], expected_state[case.slots])


def test_nan_stays_in_its_sequence(kernels: Kernels) -> None:
    case = make([5, 5], heads=(1, 2), dims=(16, 16))
    case.rows[0]["qkv"][2, 0] = float("nan")  # a query: the state stays whole
    state = case.states()
    got = case.run(kernels, state, case.whole())
    assert got[2].isnan().all() and not got[:2].isnan().any() and not got[3:].isnan().any()
    assert not state[case.slots].isnan().any()
    case.rows[0]["a"][3, 0] = float("nan")
    case.run(kernels, state := case.states(), case.whole())
    assert state[case.slots[0], 0].isnan().all() and not state[case.slots[1]].isnan().any()


def convolved_case(
    lengths, heads=(1, 2), dims=(16, 32), taps=4, tiled=False
) -> tuple[Case, dict[str, torch.Tensor], torch.Tensor]:
    """A case, its rows of qkv before a convolution, and what that takes beside them."""
    case = make(lengths, heads=heads, dims=dims, tiled=tiled)
    channels = case.rows[0]["qkv"].shape[1]
    conv = convolution.make(lengths, channels=channels, taps=taps)
    state = torch.full((len(lengths) + 2, taps - 1, channels), float("nan"))
    state[case.slots] = conv["conv_state"][2:]
    conv["state_slots"] = torch.tensor(case.slots, dtype=torch.int32)
    return case, conv, state


@pytest.mark.parametrize("taps", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (1, 3)], ids=str)
def test_the_convolution_in_front_is_the_same_bit_for_bit(kernels: Kernels, heads: tuple[int, int], taps: int) -> None:
    """Also of the channels of a key head, whose state several blocks read and one writes."""
    case, conv, conv_state = convolved_case([1, 0, 9, 2, 20], heads=heads, taps=taps, tiled=taps == 4)
    state, expected_state = case.states(), case.states()
    qkv, expected_conv_state = convolution.run(kernels.core, conv, conv_state)
    expected = kernels.gated_delta_rule(**case.arguments(expected_state, case.whole()) | {"qkv": qkv})
    arguments = case.arguments(state, case.whole()) | {"qkv": conv["x"]}
    got = kernels.gated_delta_rule(**arguments, conv_weight=conv["weight"], conv_state=conv_state)
    assert torch.equal(got, expected) and torch.equal(state[case.slots], expected_state[case.slots])
    assert torch.equal(conv_state[case.slots], expected_conv_state[case.slots])
    others = [i for i in range(len(state)) if i not in case.slots]
    assert state[others].isnan().all() and conv_state[others].isnan().all()


def test_heads_of_every_released_model(kernels: Kernels) -> None:
    """The kernel's own form for 128 dimensions and four taps."""
    case, conv, conv_state = convolved_case([1, 3], heads=(1, 2), dims=(128, 128))
    qkv, expected_conv_state = convolution.run(kernels.core, conv, conv_state)
    case.rows = [rows | {"qkv": part} for rows, part in zip(case.rows, qkv.split([1, 3]), strict=True)]
    state = case.states()
    arguments = case.arguments(state, case.whole()) | {"qkv": conv["x"]}
    got = kernels.gated_delta_rule(**arguments, conv_weight=conv["weight"], conv_state=conv_state)
    (truth, exact), (twin, twin_state), mine = case.truth, case.twin, case.slots
    assert largest_error(state[mine], exact[mine]) <= 2 * largest_error(twin_state[mine], exact[mine])
    assert largest_error(got, truth) <= 2 * largest_error(twin, truth)
    assert torch.equal(conv_state[mine], expected_conv_state[mine])


def test_the_comparison_can_fail(kernels: Kernels) -> None:
    """A decay that is wrong by one part in ten thousand must show."""
    case = make([20], heads=(1, 2), dims=(16, 16))
    exact, twin_state, state = case.states(torch.float64), case.states(), case.states()
    case.run(reference, exact, case.whole(), compute_dtype=torch.float64)
    case.run(reference, twin_state, case.whole())
    case.a_coefficient = case.a_coefficient * 1.0001
    case.run(kernels, state, case.whole())
    allowed = 2 * largest_error(twin_state[case.slots], exact[case.slots])
    assert largest_error(state[case.slots], exact[case.slots]) > allowed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_k_dim": 144}, "head_k_dim: expected a multiple of 16 up to 128, got 144"),
        ({"head_v_dim": 24}, "head_v_dim: expected a multiple of 16 up to 128, got 24"),
        ({"num_v_heads": 3}, "num_v_heads: expected a multiple of the key heads, got 3"),
        ({"num_sequences": 65536}, "num_sequences: expected 0 to 65535, got 65536"),
        ({"conv_weight": 1, "conv_state": 1, "arrivals": 1, "taps": 9}, "taps: expected 2 to 8, got 9"),
        ({"conv_weight": 1, "conv_state": 1, "taps": 4}, "arrivals: expected the address of a tensor, got 0"),
        (
            {"conv_weight": 1, "conv_state": 1, "arrivals": 1, "taps": 4, "chunk": 32},
            "chunk: expected 0 with a convolution, got 32",
        ),
    ],
)
def test_what_cannot_be_computed(cuda_core, changes: dict[str, int], message: str) -> None:
    arguments = dict.fromkeys(("qkv", "z", "b", "a", "a_coefficient", "dt_bias", "norm_weight", "state", "out"), 1)
    arguments |= dict.fromkeys(("qkv_stride", "z_stride", "b_stride", "a_stride", "state_slots", "cu_seqlens"), 1)
    arguments |= {"num_sequences": 1, "num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 128, "head_v_dim": 128}
    with pytest.raises(ValueError, match=f"gated_delta_rule: {message}"):
        cuda_core.kernels.gated_delta_rule(**(arguments | changes), eps=1e-6, tiled=True)
