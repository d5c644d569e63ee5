"""moe_matmul on CUDA against its twin; a few tokens take another way than many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helexa_engine.errors import InvalidRequest
from helexa_engine.ops.moe_matmul import Experts, cuda, moe_matmul, reference
from helexa_engine.ops.quant_matmul.planes import FIELDS
from helexa_engine.ops.quant_matmul.reference import quantized_activations
from helexa_engine.quant import types
from helexa_engine.quant.types import QuantType

from .test_moe_matmul import EPS, Block, inputs, relative

FEW = cuda.FEW_TOKENS
Q4_K_M = ("Q4_K", "Q4_K", "Q6_K")
#: (gate, up, down), as in the CPU's tests: one type, the mix of Q4_K_M, two kinds of gate and up, floats of every width.
MIXES = [
    Q4_K_M,
    ("Q8_0", "Q8_0", "Q8_0"),
    ("Q6_K", "Q6_K", "IQ4_XS"),
    ("MXFP4", "MXFP4", "MXFP4"),
    ("Q4_0", "F16", "Q5_1"),
    ("BF16", "BF16", "F16"),
    ("F32", "F32", "F32"),
]


def run(block: Block, x: torch.Tensor, device: torch.device) -> torch.Tensor:
    gate = block.shared_gate.to(device) if block.shared_width else None
    out = cuda.moe_matmul(
        x.to(device, copy=True),
        cuda.pack_router(block.router.to(device), gate),
        block.packed(cuda, "experts"),
        block.packed(cuda, "shared"),
        norm_weight=block.norm.to(device),
        norm_eps=EPS,
        top_k=block.top_k,
        norm_topk_prob=block.norm_topk_prob,
    )
    return out.cpu()


def seen_as_int8(value: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    return quantized_activations(value.float()) if quant_type.is_quantised else value


def is_quantised(mix: tuple[str, str, str]) -> bool:
    return any(types.by_name(name).is_quantised for name in mix)


def assert_few_as_the_twin(block: Block, x: torch.Tensor, out: torch.Tensor) -> None:
    """To float32 rounding as the integer twin, and within the types' bound of float64."""
    exact = block.run(x, reference, compute_dtype=torch.float64) - x
    twin = block.run(x, reference, compute_dtype=torch.float64, seen=seen_as_int8) - x
    # The gated products are rounded to int8 from float32 and from float64: one in some thousand falls to the other side.
    assert relative((out - x) - twin, twin) <= (2e-4 if is_quantised(block.mix) else 2e-6)
    bound = 3 * max(types.by_name(name).matmul_nmse_bound for name in block.mix) ** 0.5
    assert relative((out - x) - exact, exact) <= bound


@pytest.mark.parametrize("shared_width", [0, 256])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_a_few_tokens(mix: tuple[str, str, str], shared_width: int, cuda_device: torch.device, poisoned: None) -> None:
    block = Block(mix, num_experts=4, shared_width=shared_width)
    x = inputs(FEW, block.hidden)
    out = run(block, x, cuda_device)
    assert_few_as_the_twin(block, x, out)
    for rows in (1, 3):  # a token is the same bit for bit whatever runs beside it
        assert torch.equal(run(block, x[:rows], cuda_device), out[:rows]), rows


def assert_many_as_the_twin(block: Block, x: torch.Tensor, out: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a twin that rounds to bfloat16 what tensor cores multiply, up to single roundings; near float64 with it, or with F32."""
    exact = block.run(x, reference, compute_dtype=torch.float64) - x
    if block.mix == ("F32",) * 3:
        assert relative((out - x) - exact, exact) <= 2.0**-16
        return
    with monkeypatch.context() as patch:
        dequantized = reference.BlockStack.dequantized
        patch.setattr(reference.BlockStack, "dequantized", lambda *args: dequantized(*args).bfloat16().float())
        rounded = lambda value, _: value.bfloat16().double()  # noqa: E731
        twin = block.run(x, reference, compute_dtype=torch.float64, seen=rounded) - x
    assert relative((out - x) - twin, twin) <= 2e-4
    assert relative((out - x) - exact, exact) <= 1.1 * relative(twin - exact, exact) <= 1e-2


@pytest.mark.parametrize("shared_width", [0, 256])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_many_tokens(
    mix: tuple[str, str, str],
    shared_width: int,
    cuda_device: torch.device,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = Block(mix, num_experts=4, shared_width=shared_width)
    x = inputs(40, block.hidden)
    out = run(block, x, cuda_device)
    assert_many_as_the_twin(block, x, out, monkeypatch)
    assert torch.equal(run(block, x[: FEW + 1], cuda_device), out[: FEW + 1])
    few = run(block, x[:FEW], cuda_device) - x[:FEW]
    assert relative((out - x)[:FEW] - few, few) <= 2e-2


def test_tiles_of_many_tokens(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each expert 128 tokens and more, and some that fill no tile."""
    block = Block(("Q8_0", "F16", "Q8_0"), num_experts=2, top_k=1, hidden=96, width=96, shared_width=64)
    x = inputs(2 * cuda.WIDE_TILE + 5, 96)
    out = run(block, x, cuda_device)
    assert_many_as_the_twin(block, x, out, monkeypatch)
    assert torch.equal(run(block, x[:40], cuda_device), out[:40])  # in narrow tiles


def test_slices_of_a_long_prompt_are_the_same_to_the_bit(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(("Q8_0",) * 3, num_experts=4, hidden=64, width=32, shared_width=64)
    x = inputs(50, 64)
    whole = run(block, x, cuda_device)
    monkeypatch.setattr(cuda, "MOST_TOKENS", 20)
    assert torch.equal(run(block, x, cuda_device), whole)


@pytest.mark.parametrize("name", FIELDS)
def test_every_type_that_a_device_keeps(name: str, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block((name,) * 3, num_experts=2, top_k=1)
    x = inputs(FEW + 1, block.hidden)
    assert_few_as_the_twin(block, x[:1], run(block, x[:1], cuda_device))
    assert_many_as_the_twin(block, x, run(block, x, cuda_device), monkeypatch)


def test_a_shared_expert_of_other_types_and_width(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(Q4_K_M, num_experts=4)
    block.data["shared"] = Block(("Q8_0", "Q8_0", "F32"), width=64, num_experts=1, top_k=1).data["experts"]
    block.shared_width = 64
    x = inputs(FEW + 1, block.hidden)
    assert_few_as_the_twin(block, x[:3], run(block, x[:3], cuda_device))
    block.data["shared"] = Block(("Q8_0", "Q4_0", "Q8_0"), width=64, num_experts=1, top_k=1).data["experts"]
    assert_many_as_the_twin(block, x, run(block, x, cuda_device), monkeypatch)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_experts,top_k", [(4, 1), (5, 4), (16, 4), (64, 10)])
def test_routing(num_experts: int, top_k: int, norm_topk_prob: bool, cuda_device: torch.device) -> None:
    block = Block(("F32",) * 3, num_experts, top_k, 64, 32, norm_topk_prob=norm_topk_prob, shared_width=64)
    x = inputs(FEW, 64)
    truth = block.run(x, reference, compute_dtype=torch.float64) - x
    assert relative((run(block, x, cuda_device) - x) - truth, truth) <= 2e-6


def test_equal_logits_take_the_lowest_index(cuda_device: torch.device) -> None:
    block = Block(("F32",) * 3, num_experts=12, top_k=4, hidden=64, width=32)
    block.router[:] = 0  # every token gets experts 0, 1, 2, 3
    x = inputs(5, 64)
    truth = block.run(x, reference, compute_dtype=torch.float64)
    assert relative(run(block, x, cuda_device) - truth, truth) <= 2e-6


@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1, 40])
def test_an_expert_that_nobody_chose_is_not_touched(rows: int, cuda_device: torch.device) -> None:
    block = Block(("Q8_0", "Q8_0", "Q8_0"), num_experts=4, hidden=64, width=64)
    block.router[2] = -1e3 * block.router.sum(0).sign()
    block.norm[:] = 1
    x = block.router[2].sign() * -inputs(rows, 64).abs()  # expert 2 is last for each of them
    expected = run(block, x, cuda_device)
    for _, data in block.data["experts"]:
        data[2].reshape(-1, 34)[:, :2] = np.array([np.nan], np.float16).view(np.uint8)
    assert torch.equal(run(block, x, cuda_device), expected)
    block.router[2] *= -1  # now it is first
    assert run(block, x, cuda_device).isnan().all()


def test_scales_multiply_the_products_of_their_experts(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(("NVFP4",) * 3, shared_width=256, scales=tuple(0.3 + 0.2 * i for i in range(8)))
    x = inputs(FEW + 1, block.hidden)
    assert_few_as_the_twin(block, x[:3], run(block, x[:3], cuda_device))
    assert_many_as_the_twin(block, x, run(block, x, cuda_device), monkeypatch)


@pytest.mark.parametrize("mix", [("Q8_0", "Q8_0", "Q8_0"), ("F16", "F16", "F16")], ids="-".join)
@pytest.mark.parametrize("rows", [3, FEW + 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_token_is_not_hidden_and_stays_alone(
    value: float, rows: int, mix: tuple[str, str, str], cuda_device: torch.device
) -> None:
    block = Block(mix, hidden=64, width=32)
    x = inputs(rows, block.hidden)
    expected = run(block, x, cuda_device)
    x[1, 40] = value
    out = run(block, x, cuda_device)
    others = [row for row in range(rows) if row != 1]
    assert torch.equal(out[others], expected[others]) and not out[1].isfinite().any()


def test_a_fused_gate_and_up_is_two_views_of_one_stack(cuda_device: torch.device) -> None:
    block = Block(Q4_K_M, num_experts=4)
    x = inputs(2, block.hidden)
    expected = run(block, x, cuda_device)
    (quant_type, gate), (_, up), _ = block.data["experts"]
    fused = np.concatenate([gate, up], axis=1)
    half = gate.shape[1]
    block.data["experts"][0] = (quant_type, fused[:, :half])
    block.data["experts"][1] = (quant_type, fused[:, half:])
    assert torch.equal(run(block, x, cuda_device), expected)


def test_no_tokens_and_zero_tokens(cuda_device: torch.device) -> None:
    block = Block(("Q8_0",) * 3, hidden=64, width=32, shared_width=64)
    assert run(block, torch.empty(0, 64), cuda_device).shape == (0, 64)
    assert (run(block, torch.zeros(2, 64), cuda_device) == 0).all()


def test_it_is_chosen_on_cuda(cuda_device: torch.device) -> None:
    assert moe_matmul.decide("cuda", hidden_size=64).implementation == "cuda"


def test_bad_arguments_are_named(cuda_device: torch.device) -> None:
    block = Block(("Q8_0", "Q8_0", "Q8_0"), hidden=64, width=32)
    x = inputs(2, 64).to(cuda_device)
    for top_k in (0, 9):
        block.top_k = top_k
        with pytest.raises(ValueError, match=f"moe_matmul: top_k: expected 1 to 8, got {top_k}"):
            run(block, x, cuda_device)
    block.top_k = 2
    with pytest.raises(ValueError, match=r"moe_matmul: x: expected contiguous float32 \[T, 64\]"):
        run(block, x.double(), cuda_device)
    experts: Experts = block.packed(cuda, "experts")
    router = cuda.pack_router(block.router.to(cuda_device))
    with pytest.raises(ValueError, match=r"experts: expected 8 of \[64, 32\], got 8 of \[32, 64\]"):
        cuda.moe_matmul(x, router, experts._replace(down=experts.gate), top_k=2)
    with pytest.raises(ValueError, match=r"shared: expected 1 of \[32, 64\], got 8 of \[32, 64\]"):
        cuda.moe_matmul(x, router, experts, experts, top_k=2)
    with pytest.raises(ValueError, match="router: expected 8 rows, got 9"):
        cuda.moe_matmul(x, cuda.pack_router(block.router, block.shared_gate), experts, top_k=2)
    with pytest.raises(ValueError, match="experts: expected a gate, an up and a down, got None"):
        cuda.moe_matmul(x, router, experts._replace(up=None), top_k=2)
    quant_type, data = block.data["experts"][0]
    with pytest.raises(ValueError, match=r"pack_experts: data: expected uint8 \[E, 2176\]"):
        cuda.pack_experts(quant_type, data[:, :-1], 32, 64)
    with pytest.raises(ValueError, match=r"pack_experts: rows and cols: expected multiples of 32 .* got 16 x 64"):
        cuda.pack_experts(quant_type, data[:, : 16 * 68], 16, 64)
    with pytest.raises(InvalidRequest, match="mmap_experts: experts can stay in the file on the CPU only"):
        cuda.pack_experts(quant_type, data, 32, 64, mapped=True)
