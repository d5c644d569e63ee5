"""``causal_conv1d``: the native core against its twin, the twin against torch's convolution, and the equalities that prefill,
decode and saved states rest on."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from helexa_engine.ops.causal_conv1d import causal_conv1d, reference
from helexa_engine.ops.registry import native_core

_native: Any = native_core()
native: Any = None if _native is None else import_module("helexa_engine.ops.causal_conv1d.native")
needs_core = pytest.mark.skipif(_native is None, reason="the native core is not built")
MODULES = [pytest.param(native, id="native", marks=needs_core), pytest.param(reference, id="reference")]

pytestmark = pytest.mark.usefixtures("poisoned")


def make(lengths, *, channels=320, taps=4, seed=0) -> dict[str, torch.Tensor]:
    """Arguments; sequence i has slot N + 1 - i, slots 0 and 1 are nobody's and hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(len(lengths) + 2, taps - 1, channels, generator=generator)
    state[:2] = float("nan")
    return {
        "x": 2 * torch.randn(sum(lengths), channels, generator=generator),
        "weight": torch.randn(channels, taps, generator=generator),
        "conv_state": state,
        "state_slots": torch.arange(len(lengths) + 1, 1, -1, dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
    }


def run(module, arguments, state=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    state = arguments["conv_state"].clone() if state is None else state
    return module.causal_conv1d(**dict(arguments, conv_state=state), **options), state


def judge(arguments) -> None:
    """Error against the twin in float64 at most twice the float32 twin's; the state bit for bit."""
    truth, _ = run(reference, arguments, compute_dtype=torch.float64)
    twin, twin_state = run(reference, arguments)
    got, state = run(native, arguments)
    assert got.shape == twin.shape and not got.isnan().any()
    assert (got - truth).abs().max() <= 2 * (twin - truth).abs().max()
    assert torch.equal(state[2:], twin_state[2:]) and state[:2].isnan().all()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 63, 64, 65, 1000])
def test_equals_the_twin_at_every_length(isa: str, length: int) -> None:
    judge(make([length]))


@pytest.mark.parametrize("taps", [2, 3, 4, 8])
@pytest.mark.parametrize("channels", [1, 15, 16, 100, 256, 257, 600])
def test_equals_the_twin_for_every_shape(isa: str, channels: int, taps: int) -> None:
    judge(make([70, 2, 1], channels=channels, taps=taps))


def test_packed_sequences_of_unequal_length(isa: str) -> None:
    judge(make([1, 130, 64, 0, 7, 65, 1]))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 127])
def test_any_split_equals_whole_bit_for_bit(isa: str, size: int) -> None:
    arguments = make([200])
    whole, whole_state = run(native, arguments)
    state, parts = arguments["conv_state"].clone(), []
    for begin in range(0, 200, size):
        x = arguments["x"][begin : begin + size]
        part = dict(arguments, x=x, cu_seqlens=torch.tensor([0, len(x)], dtype=torch.int32))
        parts.append(run(native, part, state)[0])
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(state[2:], whole_state[2:])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63])
def test_any_split_of_the_twin_equals_whole(size: int) -> None:
    arguments = make([70])
    whole, whole_state = run(reference, arguments)
    state, parts = arguments["conv_state"].clone(), []
    for begin in range(0, 70, size):
        x = arguments["x"][begin : begin + size]
        part = dict(arguments, x=x, cu_seqlens=torch.tensor([0, len(x)], dtype=torch.int32))
        parts.append(run(reference, part, state)[0])
    assert (torch.cat(parts) - whole).abs().max() <= 1e-5
    assert torch.equal(state[2:], whole_state[2:])


@pytest.mark.parametrize("module", MODULES)
def test_a_split_that_drops_the_state_is_seen(module) -> None:
    """Known bad: the second part begins from zeros; only its first three outputs tell."""
    arguments = make([20])
    whole, _ = run(module, arguments)
    tail = dict(arguments, x=arguments["x"][10:], cu_seqlens=torch.tensor([0, 10], dtype=torch.int32))
    cut, _ = run(module, tail, torch.zeros_like(arguments["conv_state"]))
    assert ((cut - whole[10:]).abs().amax(1) > 1e-3).tolist() == [True] * 3 + [False] * 7


def test_a_batch_equals_each_alone_bit_for_bit(isa: str) -> None:
    arguments = make([50, 1, 3, 64])
    batch, state = run(native, arguments)
    ends = arguments["cu_seqlens"].tolist()
    for i in range(4):
        x = arguments["x"][ends[i] : ends[i + 1]]
        alone = dict(
            arguments, x=x, state_slots=arguments["state_slots"][i : i + 1],
            cu_seqlens=torch.tensor([0, len(x)], dtype=torch.int32),
        )  # fmt: skip
        got, alone_state = run(native, alone)
        slot = int(arguments["state_slots"][i])
        assert torch.equal(got, batch[ends[i] : ends[i + 1]])
        assert torch.equal(alone_state[slot], state[slot])


@pytest.mark.parametrize("module", MODULES)
def test_slices_of_wider_rows_equal_contiguous_ones(module) -> None:
    arguments = make([30, 1])
    wide = torch.full((31, 400), float("nan"))
    wide[:, 40:360] = arguments["x"]
    expected, _ = run(module, arguments)
    got, _ = run(module, dict(arguments, x=wide[:, 40:360]))
    assert torch.equal(got, expected)


def test_silu_everywhere(isa: str) -> None:
    """The last tap alone: relative error at most 4 units in the last place from -80 to any large x, nothing below."""
    x = torch.cat([torch.linspace(-80, 80, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, 1e30])])
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    arguments = dict(make([len(x)], channels=1), x=x[:, None], weight=weight, conv_state=torch.zeros(3, 3, 1))
    got, _ = run(native, arguments)
    exact = x.double() * torch.sigmoid(x.double())
    assert ((got[:, 0] - exact).abs() <= 4 * 2**-24 * exact.abs()).all()
    extreme = torch.tensor([-87.0, -100.0, -1e4, -1e30])
    arguments.update(x=extreme[:, None], cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
    got, _ = run(native, arguments)
    assert ((got <= 0) & (got > -1e-7)).all()


def test_nan_stays_in_its_channel_and_sequence(isa: str) -> None:
    arguments = make([10, 10])
    arguments["x"][5, 17] = float("nan")
    got, _ = run(native, arguments)
    assert torch.equal(got.isnan().nonzero(), torch.tensor([[t, 17] for t in range(5, 9)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin_equals_torchs_convolution(dtype: torch.dtype) -> None:
    arguments = make([40], channels=24)
    got, _ = run(reference, arguments, compute_dtype=dtype)
    inputs = torch.cat([arguments["conv_state"][2], arguments["x"]]).to(dtype)
    plain = torch.nn.functional.conv1d(inputs.T[None], arguments["weight"].to(dtype)[:, None], groups=24)[0].T
    expected = torch.nn.functional.silu(plain)
    assert (got - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state_slots", [3, 4], r"state_slots\[1\]: expected a slot of its own from 0 to 3, got 4"),
        ("state_slots", [3, 3], r"state_slots\[1\]"),
        ("state_slots", [-1, 3], r"state_slots\[0\]"),
        ("cu_seqlens", [0, 99, 12], r"cu_seqlens\[1\]: expected 0 to 12, got 99"),
        ("cu_seqlens", [2, 10, 12], r"cu_seqlens\[0\]: expected 0, got 2"),
        ("cu_seqlens", [0, 10, 11], r"cu_seqlens\[2\]: expected 12, got 11"),
        ("cu_seqlens", [0, 12], r"cu_seqlens: expected"),
        ("weight", torch.zeros(319, 4), "weight: expected"),
        ("conv_state", torch.zeros(4, 4, 320), "conv_state: expected"),
    ],
)
def test_every_argument_is_checked_before_anything_is_written(module, name: str, value, message: str) -> None:
    arguments = make([10, 2])
    before = arguments["conv_state"].clone()
    broken = dict(arguments)
    broken[name] = torch.tensor(value, dtype=torch.int32) if isinstance(value, list) else value
    with pytest.raises(ValueError, match=message):
        module.causal_conv1d(**broken)
    assert torch.equal(arguments["conv_state"].nan_to_num(), before.nan_to_num())


@needs_core
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(320, 12).T),
        ("x", torch.zeros(12, 320, dtype=torch.float16)),
        ("weight", torch.zeros(4, 320).T),
        ("state_slots", torch.tensor([2, 3])),
    ],
)
def test_tensors_of_a_wrong_kind_are_named(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=name):
        native.causal_conv1d(**dict(make([10, 2]), **{name: value}))


@needs_core
def test_the_choice_depends_on_the_taps() -> None:
    assert causal_conv1d.choose("cpu") is native
    assert causal_conv1d.choose("cpu", kernel_size=9) is reference
