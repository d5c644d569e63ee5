"""The Triton kernels on a CPU. Run by ``test_triton.py`` in a process of its own with ``TRITON_INTERPRET=1``: Triton looks at
that when it is first imported, and other tests may import it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from helexa_engine.ops.gated_delta_rule import cuda, reference
from helexa_engine.ops.gated_delta_rule import triton as rule
from helexa_engine.ops.gated_delta_rule.tuning import Tile, Tuning, tuning_for
from helexa_engine.testing.cuda_core import emulated_cuda, emulation

EPS = 1e-2  # as in test_gated_delta_rule.py
CHUNK = tuning_for("interpreter", 16, 16).chunk


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an op leaves unwritten is NaN."""
    empty = torch.empty

    def poison(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poison)


def packing(lengths) -> dict[str, torch.Tensor]:
    """Sequence i has slot N + 1 - i; slots 0 and 1 are nobody's."""
    return {
        "state_slots": torch.arange(len(lengths) + 1, 1, -1, dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
    }


def rule_arguments(lengths, heads=(1, 1), dims=(16, 16), tiled=False, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    (num_k, num_v), (dk, dv), total = heads, dims, sum(lengths)
    wide = normal(total, num_v * dv + 2 * num_v)  # z, b and a are slices of wider rows
    z, b, a = torch.split(wide, [num_v * dv, num_v, num_v], dim=1)
    state = 0.5 * normal(len(lengths) + 2, num_v, dk, dv)
    state[:2] = float("nan")
    return {
        "qkv": normal(total, 2 * num_k * dk + num_v * dv), "z": z, "b": b, "a": a, "a_coefficient": -normal(num_v).exp(),
        "dt_bias": normal(num_v), "norm_weight": 1 + 0.2 * normal(dv), "eps": EPS, "recurrent_state": state,
        **packing(lengths), "num_k_heads": num_k, "num_v_heads": num_v, "tiled": tiled,
    }  # fmt: skip


def run_rule(module, arguments, dtype=torch.float32, **options) -> tuple[torch.Tensor, torch.Tensor]:
    state = arguments["recurrent_state"].to(dtype).clone()
    return module.gated_delta_rule(**dict(arguments, recurrent_state=state), **options), state


def judge(*draws, module=rule) -> None:
    """The root mean square of the errors of all draws against twice the twin's; the largest, against four times the twin's largest.

    Errors have long tails (a key of small norm, a gate that nearly cancels), so the largest of some hundred values is a matter of luck
    for either side: it was 0.8 to 2.9 times the twin's from draw to draw, where the root mean square of four draws was 0.9 to 1.4. How
    numpy adds, and so what the interpreter gives, differs from processor to processor besides.
    """
    errors: dict[str, list[torch.Tensor]] = {"out": [], "twin's out": [], "state": [], "twin's state": []}
    for arguments in draws:
        truth, exact = run_rule(reference, arguments, torch.float64, compute_dtype=torch.float64)
        twin, twin_state = run_rule(reference, arguments)
        with emulated_cuda() if module is cuda else nullcontext():
            got, state = run_rule(module, arguments)
        assert got.shape == truth.shape and not got.isnan().any() and state[:2].isnan().all()
        pairs = ((got, truth), (twin, truth), (state[2:], exact[2:]), (twin_state[2:], exact[2:]))
        for name, (ours, right) in zip(errors, pairs, strict=True):
            errors[name].append((ours - right).flatten())
    for name in ("out", "state"):
        ours, twins = torch.cat(errors[name]), torch.cat(errors[f"twin's {name}"])
        assert ours.square().mean().sqrt() <= 2 * twins.square().mean().sqrt(), name
        assert ours.abs().max() <= 4 * twins.abs().max(), name


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65])
def test_the_rule_equals_the_twin_at_every_length(length: int) -> None:
    judge(*(rule_arguments([length] * (2 if length < 10 else 1), seed=seed) for seed in range(4)))


@pytest.mark.parametrize(
    ("lengths", "heads", "dims", "tiled"),
    [([33, 3, 17], (2, 4), (32, 16), True), ([2, 18], (2, 4), (16, 32), False), ([20], (1, 3), (48, 48), False)],
    ids=str,
)
def test_the_rule_equals_the_twin_for_every_shape(lengths: list[int], heads, dims, tiled: bool) -> None:
    judge(*(rule_arguments(lengths, heads, dims, tiled, seed) for seed in range(4)))


def test_the_rule_on_strongly_correlated_keys() -> None:
    draws = [rule_arguments([64], seed=seed) for seed in range(4)]
    for arguments in draws:
        arguments["qkv"] = arguments["qkv"][torch.arange(64) % 3].clone()
        arguments["b"] = arguments["b"] + 8
        arguments["a"] = arguments["a"] - 8
    judge(*draws)


def test_the_rules_gates_far_out() -> None:
    """Both branches of softplus, and small decays behind a large one."""
    draws = [rule_arguments([64], seed=seed) for seed in range(4)]
    for arguments in draws:
        arguments["a"] = arguments["a"] - 8
        arguments["a"][8] += 300
        arguments["a"][9] -= 100
    judge(*draws)


def test_a_batch_equals_each_alone_and_parts_equal_the_whole_bit_for_bit() -> None:
    arguments = rule_arguments([50, 1, 20])
    batch, batch_state = run_rule(rule, arguments)
    ends, state = arguments["cu_seqlens"].tolist(), arguments["recurrent_state"].clone()
    for i, slot in enumerate(arguments["state_slots"]):
        parts = []
        for begin in range(ends[i], ends[i + 1], CHUNK):
            end = min(begin + CHUNK, ends[i + 1])
            rows = {name: arguments[name][begin:end] for name in ("qkv", "z", "b", "a")}
            one = {"state_slots": slot[None], "cu_seqlens": torch.tensor([0, end - begin], dtype=torch.int32)}
            parts.append(rule.gated_delta_rule(**dict(arguments, **rows, **one, recurrent_state=state)))
        assert torch.equal(torch.cat(parts), batch[ends[i] : ends[i + 1]])
    assert torch.equal(state[2:], batch_state[2:])


@pytest.mark.parametrize("lengths", [[70], [15, 130, 0, 1, 80]], ids=str)
def test_the_rule_by_chunks_of_64(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_tuning", lambda _: Tuning(64, 16, Tile(16, 4, 1), Tile(16, 4, 1)))
    judge(*(rule_arguments(lengths, seed=seed) for seed in range(4)))


def test_no_sequence_waits_for_its_chunks_in_vain() -> None:
    """Every chunk of every sequence has a tile of the grid, which is made without their lengths; also where most have none."""
    lengths = [0, 0, 33, 1, 31, 0, 64, 32, 16, 15, 0]
    judge(rule_arguments(lengths, seed=1), rule_arguments(lengths[::-1], seed=2))


@pytest.mark.skipif(emulation() is None, reason="the emulation is not built: scripts/build_native does")
def test_on_cuda_chunks_go_through_triton_and_the_rest_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence gets the same bits whatever runs beside it: a decode step beside a prompt, and alone."""
    arguments = rule_arguments([50, 1, 0, 32, 3, 20])
    with emulated_cuda():
        out, state = run_rule(cuda, arguments)
        for i, slot in enumerate(arguments["state_slots"]):
            begin, end = arguments["cu_seqlens"][i : i + 2].tolist()
            rows = {name: arguments[name][begin:end] for name in ("qkv", "z", "b", "a")}
            one = {"state_slots": slot[None], "cu_seqlens": torch.tensor([0, end - begin], dtype=torch.int32)}
            alone, alone_state = run_rule(cuda, arguments | rows | one)
            assert torch.equal(alone, out[begin:end]) and torch.equal(alone_state[slot], state[slot])
        triton_out, _ = run_rule(rule, arguments)
        assert torch.equal(out[:32], triton_out[:32])  # of the same kernels
        with monkeypatch.context() as patch:
            patch.setattr(rule, "runs_on", lambda _: False)
            by_token, _ = run_rule(cuda, arguments)
        assert torch.equal(out[50:51], by_token[50:51]) and not torch.equal(out[:32], by_token[:32])
    judge(arguments, *(rule_arguments([50, 1, 0, 32, 3, 20], seed=seed) for seed in range(1, 4)), module=cuda)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rule.gated_delta_rule

    def wrong(**arguments):
        return right(**dict(arguments, a_coefficient=arguments["a_coefficient"] * 1.0001))

    monkeypatch.setattr(rule, "gated_delta_rule", wrong)
    with pytest.raises(AssertionError, match="out|state"):
        judge(*(rule_arguments([65], seed=seed) for seed in range(4)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(9, 47)),
        ("b", torch.zeros(1, 9).expand(3, 9).T[:, ::2]),
        ("recurrent_state", torch.zeros(4, 3, 16, 16)),
        ("cu_seqlens", torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_tensors_of_a_wrong_kind_are_named(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=name):
        rule.gated_delta_rule(**dict(rule_arguments([5, 4]), **{name: value}))
