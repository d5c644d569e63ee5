"""The gated delta net's ops on ``"cuda"``: what their ``cuda.py`` add to the kernels, which ``tests/native`` proves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from helexa_engine.ops.causal_conv1d import causal_conv1d
from helexa_engine.ops.causal_conv1d import reference as conv_reference
from helexa_engine.ops.gated_delta_rule import gated_delta_rule, reference
from tests.engine.ops.test_causal_conv1d import make as make_convolution
from tests.engine.ops.test_gated_delta_rule import largest_error, make

pytestmark = pytest.mark.usefixtures("poisoned")

conv: Any = import_module("helexa_engine.ops.causal_conv1d.cuda")
rule: Any = import_module("helexa_engine.ops.gated_delta_rule.cuda")


def on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}


def without_waiting(function: Callable[..., torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
    """The call, which must read no number back from the device."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("waits for the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        return function(**arguments)


def step_arguments(lengths, device, *, heads=(2, 4), dims=(32, 48), taps=4, seed=0) -> dict[str, Any]:
    """Of ``gated_delta_step``; slots of nobody hold NaN."""
    case = make(lengths, heads=heads, dims=dims, seed=seed)
    arguments = case.arguments(case.states(), case.whole())
    convolution = make_convolution(lengths, channels=arguments["qkv"].shape[1], taps=taps, seed=seed)
    state = torch.full((len(lengths) + 2, *convolution["conv_state"].shape[1:]), float("nan"))
    state[case.slots] = convolution["conv_state"][2:]
    arguments |= {"qkv": convolution["x"], "conv_weight": convolution["weight"], "conv_state": state}
    return on(device, arguments)


def in_turn(convolution: Any, delta_rule: Any, arguments: dict[str, Any], **options: Any) -> torch.Tensor:
    """``gated_delta_step`` by its definition."""
    names = {"x": "qkv", "weight": "conv_weight"} | {n: n for n in ("conv_state", "state_slots", "cu_seqlens")}
    qkv = convolution.causal_conv1d(**{name: arguments[its] for name, its in names.items()}, **options)
    rest = {name: a for name, a in arguments.items() if name not in ("conv_weight", "conv_state")}
    return delta_rule.gated_delta_rule(**rest | {"qkv": qkv}, **options)


def fresh(arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The same with states of its own."""
    return arguments | {name: arguments[name].to(dtype, copy=True) for name in ("recurrent_state", "conv_state")}


def test_the_step_equals_the_twins(cuda_device: torch.device) -> None:
    """Outputs and both states, over draws: error against the twins in float64 at most twice that of the float32 twins."""
    errors = []
    for seed in range(3):
        arguments = step_arguments([1] * 4, cuda_device, seed=seed)
        exact, twin, got = fresh(arguments, torch.float64), fresh(arguments), fresh(arguments)
        truth = in_turn(conv_reference, reference, exact, compute_dtype=torch.float64)
        twin_out = in_turn(conv_reference, reference, twin)
        out = without_waiting(rule.gated_delta_step, got)
        mine = arguments["state_slots"].long()
        states = [a["recurrent_state"][mine] for a in (got, exact, twin)]
        assert torch.equal(got["conv_state"][mine], twin["conv_state"][mine])
        assert torch.equal(got["recurrent_state"].isnan(), twin["recurrent_state"].isnan())
        assert torch.equal(got["conv_state"].isnan(), twin["conv_state"].isnan())
        errors.append(
            [largest_error(out, truth), largest_error(twin_out, truth)]
            + [largest_error(states[0], states[1]), largest_error(states[2], states[1])]
        )
    ours, allowed, our_state, allowed_state = torch.tensor(errors).amax(0)
    assert ours <= 2 * allowed and our_state <= 2 * allowed_state


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 8], [4, 7, 0], [9]], ids=str)
def test_the_step_equals_the_ops_in_turn_bit_for_bit(cuda_device: torch.device, lengths: list[int]) -> None:
    """What lets a sequence go through either, from call to call."""
    arguments = step_arguments(lengths, cuda_device)
    ours, others = fresh(arguments), fresh(arguments)
    out = rule.gated_delta_step(**ours)
    assert torch.equal(out, in_turn(conv, rule, others))
    for name in ("recurrent_state", "conv_state"):
        assert torch.equal(ours[name].nan_to_num(), others[name].nan_to_num())


def test_both_ops_take_slices_of_wider_rows_and_wait_for_nothing(cuda_device: torch.device) -> None:
    case = make([20, 1, 3])
    plain = on(cuda_device, case.arguments(case.states(), case.whole()))
    sliced = dict(plain, recurrent_state=plain["recurrent_state"].clone())
    for name in ("qkv", "z", "b", "a"):
        wide = torch.full((24, plain[name].shape[1] + 9), float("nan"), device=cuda_device)
        wide[:, 5:-4] = plain[name]
        sliced[name] = wide[:, 5:-4]
    assert torch.equal(without_waiting(rule.gated_delta_rule, sliced), rule.gated_delta_rule(**plain))
    plain = on(cuda_device, make_convolution([20, 1, 3]))
    wide = torch.full((24, 400), float("nan"), device=cuda_device)
    wide[:, 40:360] = plain["x"]
    sliced = dict(plain, x=wide[:, 40:360], conv_state=plain["conv_state"].clone())
    assert torch.equal(without_waiting(conv.causal_conv1d, sliced), conv.causal_conv1d(**plain))


def test_tokens_behind_the_last_border_belong_to_nobody(cuda_device: torch.device) -> None:
    """A step that is padded to a size that was recorded."""
    arguments = step_arguments([1, 1, 1, 1], cuda_device)
    slots = arguments["state_slots"]
    padded = fresh(arguments) | {"cu_seqlens": torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32, device=cuda_device)}
    out, whole = rule.gated_delta_step(**padded), rule.gated_delta_step(**(ours := fresh(arguments)))
    assert torch.equal(out[:2], whole[:2])
    for name in ("recurrent_state", "conv_state"):
        assert torch.equal(padded[name][slots[:2].long()], ours[name][slots[:2].long()])
        assert torch.equal(padded[name][slots[2:].long()], arguments[name][slots[2:].long()])


def test_no_tokens_and_no_sequences(cuda_device: torch.device) -> None:
    arguments = step_arguments([0, 0], cuda_device)
    before = arguments["recurrent_state"].clone()
    assert rule.gated_delta_step(**arguments).shape == in_turn(conv, rule, arguments).shape == (0, 4 * 48)
    assert torch.equal(arguments["recurrent_state"].nan_to_num(), before.nan_to_num())


def test_a_missing_triton_is_said_once(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the kernel does all tokens then."""
    monkeypatch.setattr(rule, "_triton", lambda: None)
    rule._say_that_triton_is_missing.cache_clear()
    with caplog.at_level(logging.WARNING, "helexa.ops"):
        for _ in range(2):
            assert rule._chunk_form(torch.device("cuda")) is None
    assert [record.message.split(":")[0] for record in caplog.records] == ["gated_delta_rule"]
    assert "pip install triton" in caplog.text
    case = make([70, 3])
    arguments = on(cuda_device, case.arguments(case.states(), case.whole()))
    out, state, mine = rule.gated_delta_rule(**arguments), arguments["recurrent_state"].cpu(), case.slots
    assert largest_error(out.cpu(), case.truth.out) <= 2 * largest_error(case.twin.out, case.truth.out)
    allowed = 2 * largest_error(case.twin.state[mine], case.truth.state[mine])
    assert largest_error(state[mine], case.truth.state[mine]) <= allowed


def test_the_choice(cuda_device: torch.device) -> None:
    assert causal_conv1d.choose("cuda", kernel_size=4) is conv
    assert causal_conv1d.decide("cuda", kernel_size=9).implementation != "cuda"
    assert gated_delta_rule.choose("cuda", head_k_dim=128, head_v_dim=64) is rule
    assert gated_delta_rule.decide("cuda", head_k_dim=256, head_v_dim=64).implementation != "cuda"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qkv", torch.zeros(6, 319), "qkv: expected float32"),
        ("z", torch.zeros(6, 192, dtype=torch.float64), "z: expected float32"),
        ("a_coefficient", torch.zeros(5), "a_coefficient: expected contiguous"),
        ("state_slots", torch.tensor([0, 1]), "state_slots: expected contiguous torch.int32"),
        ("recurrent_state", torch.zeros(4, 4, 48, 32).transpose(2, 3), "recurrent_state: .* not contiguous"),
        ("conv_weight", torch.zeros(320, 4).T, "conv_weight: expected"),
        ("conv_state", torch.zeros(4, 4, 320), "conv_state: expected"),
        ("norm_weight", torch.zeros(48, device="meta"), "norm_weight: expected a tensor on .*, got one on meta"),
        ("num_k_heads", 3, "expected"),
    ],
)
def test_tensors_of_a_wrong_kind_are_named(cuda_device: torch.device, name: str, value: Any, message: str) -> None:
    arguments = step_arguments([4, 2], cuda_device)
    before = arguments["recurrent_state"].clone()
    if isinstance(value, torch.Tensor) and value.device.type != "meta":
        value = value.to(cuda_device)
    with pytest.raises(ValueError, match=message):
        rule.gated_delta_step(**arguments | {name: value})
    if name not in ("conv_weight", "conv_state"):
        rest = {key: a for key, a in arguments.items() if key not in ("conv_weight", "conv_state")}
        with pytest.raises(ValueError, match=message):
            rule.gated_delta_rule(**rest | {name: value})
    assert torch.equal(arguments["recurrent_state"].nan_to_num(), before.nan_to_num())


def test_the_counter_is_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="outside a graph's capture"):
        rule._arrivals(torch.device("cuda", 17))
