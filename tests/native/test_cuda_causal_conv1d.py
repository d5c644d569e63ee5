"""``csrc/cuda/causal_conv1d.cu`` against the twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helexa_engine.ops.causal_conv1d import reference
from tests.engine.ops.test_causal_conv1d import make


def run(core, arguments, state=None, *, behind: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and states; ``behind`` tokens belong to no sequence."""
    x, weight = arguments["x"], arguments["weight"]
    state = arguments["conv_state"] if state is None else state
    names = ("weight", "conv_state", "state_slots", "cu_seqlens")
    placed = {name: core.put(arguments[name].numpy()) for name in names} | {"conv_state": core.put(state.numpy())}
    source = core.put(np.pad(x.numpy(), ((0, behind), (0, 3)), constant_values=np.nan))  # rows lie further apart
    out = core.put(np.full((len(x) + behind, x.shape[1]), np.nan, dtype=np.float32))
    address = {name: core.address(array) for name, array in placed.items()}
    core.kernels.causal_conv1d(
        core.address(source), x.shape[1] + 3, address["weight"], *weight.shape, address["conv_state"],
        address["state_slots"], address["cu_seqlens"], len(arguments["state_slots"]), core.address(out), len(x) + behind,
    )  # fmt: skip
    got = torch.from_numpy(core.get(out))
    assert got[len(x) :].isnan().all()
    return got[: len(x)], torch.from_numpy(core.get(placed["conv_state"]))


def judge(core, arguments) -> None:
    """Error against the twin in float64 at most twice the float32 twin's; states bit for bit, those of nobody untouched."""
    truth = reference.causal_conv1d(
        **dict(arguments, conv_state=arguments["conv_state"].clone()), compute_dtype=torch.float64
    )
    twin_state = arguments["conv_state"].clone()
    twin = reference.causal_conv1d(**dict(arguments, conv_state=twin_state))
    got, state = run(core, arguments)
    assert not got.isnan().any()
    assert (got - truth).abs().max() <= 2 * (twin - truth).abs().max()
    assert torch.equal(state[2:], twin_state[2:]) and state[:2].isnan().all()


@pytest.mark.parametrize("taps", [2, 3, 4, 5, 8])
def test_every_number_of_taps(cuda_core, taps: int) -> None:
    judge(cuda_core, make([20, 2, 1], channels=70, taps=taps))


@pytest.mark.parametrize(
    "lengths",
    [[1], [3], [15], [16], [17], [64], [65], [0, 0, 33, 0, 1], [16, 16, 0], [1] * 9, [31, 1, 15, 47, 2, 3, 16, 1]],
    ids=str,
)
def test_every_packing(cuda_core, lengths: list[int]) -> None:
    judge(cuda_core, make(lengths, channels=10))


@pytest.mark.parametrize("channels", [1, 127, 128, 129])
def test_every_number_of_channels(cuda_core, channels: int) -> None:
    judge(cuda_core, make([5, 18], channels=channels))


@pytest.mark.parametrize("size", [1, 3, 4, 15, 17])
def test_any_split_equals_whole_bit_for_bit(cuda_core, size: int) -> None:
    arguments = make([40], channels=8)
    whole, whole_state = run(cuda_core, arguments)
    state, parts = arguments["conv_state"], []
    for begin in range(0, 40, size):
        x = arguments["x"][begin : begin + size]
        part, state = run(cuda_core, dict(arguments, x=x, cu_seqlens=torch.tensor([0, len(x)]).int()), state)
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(state[2:], whole_state[2:])


def test_tokens_behind_the_last_sequence_are_left_alone(cuda_core) -> None:
    arguments = make([2, 1], channels=9)
    got, _ = run(cuda_core, arguments, behind=20)
    assert torch.equal(got, run(cuda_core, arguments)[0])


def test_nan_stays_in_its_channel_and_sequence(cuda_core) -> None:
    """Also with an odd number of taps, where absent taps must not multiply it by 0."""
    for taps in (4, 5):
        arguments = make([10, 10], taps=taps, channels=20)
        arguments["x"][3, 17] = float("nan")
        got, _ = run(cuda_core, arguments)
        assert got.isnan().nonzero().tolist() == [[t, 17] for t in range(3, 3 + taps)]


def test_what_cannot_be_convolved(cuda_core) -> None:
    with pytest.raises(ValueError, match="causal_conv1d: taps: expected 2 to 8, got 9"):
        run(cuda_core, make([3], channels=4, taps=9))
    with pytest.raises(ValueError, match="causal_conv1d: x: expected the address of a tensor, got 0"):
        cuda_core.kernels.causal_conv1d(0, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1)
