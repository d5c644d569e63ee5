"""moe_matmul in the native core against its twin and against quant_matmul, expert by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from helexa_engine.ops.moe_matmul import Experts, native, reference
from helexa_engine.ops.quant_matmul import native as matmul
from helexa_engine.ops.quant_matmul.reference import quantized_activations, rms_norm
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import types
from helexa_engine.quant.types import QuantType

from .levels import MATMUL_LEVELS, levels_here
from .test_quant_matmul import CODES, raw_weights

_native = native_core()
pytestmark = pytest.mark.skipif(_native is None, reason="the native core is not built")

EPS = 1e-6
#: (gate, up, down): one type, the mix of Q4_K_M, two kinds of gate and up, floats of every width, a type without a kernel.
MIXES = [
    ("Q8_0", "Q8_0", "Q8_0"),
    ("Q4_K", "Q4_K", "Q6_K"),
    ("Q4_0", "F16", "Q5_1"),
    ("F32", "F32", "F32"),
    ("BF16", "BF16", "F16"),
    ("IQ2_XS", "IQ2_XS", "Q8_0"),
]


ISAS = levels_here(MATMUL_LEVELS)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    best = _native.cpu_isa()
    yield
    _native.set_cpu_isa(best)
    _native.set_num_threads(0)


@dataclass
class Block:
    """A random sparse block: the bytes of its experts, and everything packed both ways."""

    mix: tuple[str, str, str]
    num_experts: int = 8
    top_k: int = 2
    hidden: int = 256
    width: int = 256
    shared_width: int = 0
    norm_topk_prob: bool = True
    seed: int = 0
    scales: tuple[float, ...] = ()  # one an expert, the same for gate, up and down
    router: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.router = torch.randn(self.num_experts, self.hidden, generator=generator) / self.hidden**0.5
        self.norm = torch.rand(self.hidden, generator=generator) + 0.5
        self.shared_gate = torch.randn(self.hidden, generator=generator) / self.hidden**0.5
        self.data = {"experts": self._draw(self.num_experts, self.width, 0)}
        if self.shared_width:
            self.data["shared"] = self._draw(1, self.shared_width, 10)

    def _shape(self, i: int, width: int) -> tuple[int, int]:
        return (self.hidden, width) if i == 2 else (width, self.hidden)

    def _draw(self, count: int, width: int, seed: int) -> list[tuple[QuantType, np.ndarray]]:
        drawn = []
        for i, name in enumerate(self.mix):
            quant_type = types.by_name(name)
            rows, cols = self._shape(i, width)
            data = raw_weights(quant_type, count * rows, cols, seed=seed + i).reshape(count, -1)
            drawn.append((quant_type, data))
        return drawn

    def packed(self, module: Any, key: str, mapped: bool = False) -> Experts | None:
        if key not in self.data:
            return None
        width = self.width if key == "experts" else self.shared_width
        stacks = [
            module.pack_experts(
                quant_type, data, *self._shape(i, width), scales=self.scales[: len(data)], mapped=mapped
            )
            for i, (quant_type, data) in enumerate(self.data[key])
        ]
        return Experts(*stacks)

    def run(self, x: torch.Tensor, module: Any = native, *, mapped: bool = False, **keywords: Any) -> torch.Tensor:
        gate = self.shared_gate if self.shared_width else None
        return module.moe_matmul(
            x.clone(),
            module.pack_router(self.router, gate),
            self.packed(module, "experts", mapped),
            self.packed(module, "shared", mapped),
            norm_weight=self.norm,
            norm_eps=EPS,
            top_k=self.top_k,
            norm_topk_prob=self.norm_topk_prob,
            **keywords,
        )

    def by_quant_matmul(self, x: torch.Tensor) -> torch.Tensor:
        """The same block by one quant_matmul a token and expert; those are tested for themselves, down to the bit."""
        rows = self.router if not self.shared_width else torch.cat([self.router, self.shared_gate[None]])
        keywords = {"norm_weight": self.norm, "norm_eps": EPS}
        packed = matmul.pack(types.F32, rows.numpy().view(np.uint8).reshape(-1), *rows.shape)
        logits = matmul.quant_matmul(x, [packed], **keywords)
        chosen, weights = reference.route(logits[:, : self.num_experts], self.top_k, self.norm_topk_prob)
        cache: dict[tuple[str, int], list[Any]] = {}

        def product(key: str, member: int, token: int, width: int) -> torch.Tensor:
            if (key, member) not in cache:
                cache[key, member] = [
                    matmul.pack(
                        quant_type,
                        data[member],
                        *self._shape(i, width),
                        scale=self.scales[member] if self.scales else 1.0,
                    )
                    for i, (quant_type, data) in enumerate(self.data[key])
                ]
            gate, up, down = cache[key, member]
            hidden = matmul.quant_matmul(x[token : token + 1], [gate, up], activation="silu_mul", **keywords)
            return matmul.quant_matmul(hidden, [down])[0]

        out = x.clone()
        for token in range(len(x)):
            total = torch.zeros(self.hidden)
            for rank in range(self.top_k):
                total += weights[token, rank] * product("experts", int(chosen[token, rank]), token, self.width)
            if self.shared_width:
                total += torch.sigmoid(logits[token, self.num_experts]) * product("shared", 0, token, self.shared_width)
            out[token] += total
        return out


def inputs(rows: int, hidden: int, seed: int = 1) -> torch.Tensor:
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed))
    x[:, hidden // 3] *= 6  # an outlier
    return x


def seen_by_kernels(value: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    return quantized_activations(value.float()) if quant_type.name in CODES else value


def relative(error: torch.Tensor, truth: torch.Tensor) -> float:
    return float(error.norm() / truth.norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_matches_the_integer_twin_and_float64(mix: tuple[str, str, str], isa: str) -> None:
    _native.set_cpu_isa(isa)
    block = Block(mix, shared_width=256 if mix[0] != "F32" else 0)
    lengths = (1, 2, 8, 9, 64, 65, 300) if isa != "generic" else (1, 9)
    x = inputs(max(lengths), block.hidden)
    out = block.run(x)
    exact = block.run(x, reference, compute_dtype=torch.float64) - x
    twin = block.run(x, reference, compute_dtype=torch.float64, seen=seen_by_kernels) - x
    # The inner activations are rounded to int8 from float32 and from float64: one in some thousand falls to the other side.
    integer = any(name in CODES for name in mix)
    assert relative((out - x) - twin, twin) <= (2e-4 if integer else 2e-6)
    bound = 3 * max(types.by_name(name).matmul_nmse_bound for name in mix) ** 0.5
    assert relative((out - x) - exact, exact) <= bound
    for rows in lengths:  # a token is the same bit for bit whatever runs beside it
        assert torch.equal(block.run(x[:rows]), out[:rows]), rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shared_width", [0, 256])
@pytest.mark.parametrize("mix", [("Q4_K", "Q5_K", "Q6_K"), ("Q8_0", "F16", "IQ4_XS")], ids="-".join)
def test_equals_quant_matmul_expert_by_expert(mix: tuple[str, str, str], shared_width: int, isa: str) -> None:
    _native.set_cpu_isa(isa)
    block = Block(mix, num_experts=12, top_k=3, shared_width=shared_width)
    x = inputs(17 if isa != "generic" else 3, block.hidden)
    expected = block.by_quant_matmul(x)
    np.testing.assert_allclose(block.run(x).numpy(), expected.numpy(), rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_experts,top_k", [(8, 1), (8, 8), (9, 4), (128, 8), (200, 10)])
def test_routing(num_experts: int, top_k: int, norm_topk_prob: bool) -> None:
    hidden = 64
    block = Block(("F32",) * 3, num_experts, top_k, hidden, 32, norm_topk_prob=norm_topk_prob, shared_width=48)
    x = inputs(70, hidden)
    truth = block.run(x, reference, compute_dtype=torch.float64) - x
    assert relative((block.run(x) - x) - truth, truth) <= 2e-6


def test_equal_logits_take_the_lowest_index() -> None:
    block = Block(("F32",) * 3, num_experts=40, top_k=4, hidden=64, width=32)
    block.router[:] = 0  # every token gets experts 0, 1, 2, 3
    x = inputs(5, 64)
    truth = block.run(x, reference, compute_dtype=torch.float64)
    assert relative(block.run(x) - truth, truth) <= 2e-6
    experts = block.packed(reference, "experts")
    y = rms_norm(x.double(), block.norm, EPS)
    by_hand = sum(reference._expert(experts, e, y, lambda value, _: value) for e in range(4)) / 4
    np.testing.assert_allclose((x + by_hand).numpy(), truth.numpy(), atol=1e-9)
    block.router[[7, 30], 0] = 1.0  # larger or smaller than all others by the sign of x: 7, 30, 0, 1 or 0, 1, 2, 3
    assert len(set((x[:, 0] > 0).tolist())) == 2
    truth = block.run(x, reference, compute_dtype=torch.float64)
    assert relative(block.run(x) - truth, truth) <= 2e-6


@pytest.mark.parametrize("rows", [1, 8, 9, 300])
def test_all_tokens_to_one_expert(rows: int) -> None:
    block = Block(("Q4_K", "Q4_K", "Q6_K"), num_experts=8, top_k=1)
    block.norm[:] = 1
    block.router[:] = 0
    block.router[5, 0] = 4.0
    x = inputs(rows, block.hidden)
    x[:, 0] = x[:, 0].abs() + 1
    twin = block.run(x, reference, compute_dtype=torch.float64, seen=seen_by_kernels) - x
    out = block.run(x)
    assert relative((out - x) - twin, twin) <= 2e-4
    assert torch.equal(block.run(x[:1]), out[:1])


def test_slices_of_a_long_prompt_are_the_same_to_the_bit() -> None:
    block = Block(("Q8_0", "Q8_0", "Q8_0"), hidden=64, width=32, shared_width=64)
    x = inputs(1100, 64)
    whole = block.run(x)
    assert torch.equal(whole, torch.cat([block.run(part) for part in x.split(100)]))


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0"])
def test_widths_that_are_no_multiple_of_sixteen(name: str) -> None:
    width, hidden = (40, 72) if name != "Q8_0" else (32, 96)
    block = Block((name, "F32", name), hidden=hidden, width=width, shared_width=width + 32)
    x = inputs(21, hidden)
    twin = block.run(x, reference, compute_dtype=torch.float64, seen=seen_by_kernels) - x
    assert relative((block.run(x) - x) - twin, twin) <= 2e-4


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_mapped_experts_give_the_same_bits(mix: tuple[str, str, str]) -> None:
    block = Block(mix, shared_width=256)
    assert block.packed(native, "experts", mapped=True).gate.nbytes == 0
    for rows in (1, 3, 40):
        x = inputs(rows, block.hidden)
        assert torch.equal(block.run(x, mapped=True), block.run(x))


@pytest.mark.parametrize("mapped", [False, True])
def test_a_fused_gate_and_up_is_two_views_of_one_stack(mapped: bool) -> None:
    block = Block(("Q4_K", "Q4_K", "Q6_K"))
    x = inputs(5, block.hidden)
    expected = block.run(x)
    (quant_type, gate), (_, up), _ = block.data["experts"]
    fused = np.concatenate([gate, up], axis=1)
    half = gate.shape[1]
    block.data["experts"][0] = (quant_type, fused[:, :half])
    block.data["experts"][1] = (quant_type, fused[:, half:])
    assert torch.equal(block.run(x, mapped=mapped), expected)


def test_threads_do_not_change_results() -> None:
    block = Block(("Q4_K", "Q4_K", "Q6_K"), shared_width=256)
    x = inputs(30, block.hidden)
    expected = block.run(x)
    for threads in (1, 2, 5):
        _native.set_num_threads(threads)
        assert torch.equal(block.run(x), expected)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_token_is_not_hidden_and_stays_alone(value: float, norm_topk_prob: bool) -> None:
    block = Block(("Q8_0", "Q8_0", "Q8_0"), norm_topk_prob=norm_topk_prob)
    x = inputs(3, block.hidden)
    x[1, 40] = value
    out = block.run(x)
    assert out[[0, 2]].isfinite().all() and not out[1].isfinite().any()


def test_no_tokens_and_zero_tokens() -> None:
    block = Block(("Q4_K", "Q4_K", "Q6_K"), shared_width=256)
    assert block.run(torch.empty(0, block.hidden)).shape == (0, block.hidden)
    assert (block.run(torch.zeros(2, block.hidden)) == 0).all()


def test_bad_arguments_are_named() -> None:
    block = Block(("Q8_0", "Q8_0", "Q8_0"), hidden=64, width=32)
    x = inputs(2, 64)
    for top_k in (0, 9):
        block.top_k = top_k
        with pytest.raises(ValueError, match=f"moe_matmul: top_k: expected 1 to 8, got {top_k}"):
            block.run(x)
        with pytest.raises(ValueError, match=f"moe_matmul: top_k: expected 1 to 8, got {top_k}"):
            block.run(x, reference)
    block.top_k = 2
    with pytest.raises(ValueError, match=r"moe_matmul: x: expected contiguous float32 \[T, 64\]"):
        block.run(x.double())
    experts = block.packed(native, "experts")
    router = native.pack_router(block.router)
    with pytest.raises(ValueError, match=r"experts: expected 8 of \[64, 32\], got 8 of \[32, 64\]"):
        native.moe_matmul(x, router, experts._replace(down=experts.gate), top_k=2)
    with pytest.raises(ValueError, match=r"shared: expected 1 of \[32, 64\], got 8 of \[32, 64\]"):
        native.moe_matmul(x, router, experts, experts, top_k=2)
    with pytest.raises(ValueError, match="router: expected 8 rows, got 9"):
        native.moe_matmul(x, native.pack_router(block.router, block.shared_gate), experts, top_k=2)
    with pytest.raises(ValueError, match="experts: expected a gate, an up and a down, got None"):
        native.moe_matmul(x, router, experts._replace(up=None), top_k=2)
    quant_type, data = block.data["experts"][0]
    for module in (native, reference):
        with pytest.raises(ValueError, match=r"pack_experts: data: expected uint8 \[E, 2176\]"):
            module.pack_experts(quant_type, data[:, :-1], 32, 64)


@pytest.mark.parametrize("mix", [("NVFP4",) * 3, ("Q4_K", "Q4_K", "Q6_K")], ids="-".join)
def test_scales_multiply_the_products_of_their_experts(mix: tuple[str, str, str]) -> None:
    block = Block(mix, shared_width=256, scales=tuple(0.3 + 0.2 * i for i in range(8)))
    x = inputs(40, block.hidden)
    out = block.run(x)
    expected = block.by_quant_matmul(x)
    np.testing.assert_allclose(out.numpy(), expected.numpy(), rtol=0, atol=2e-6 * float(expected.abs().max()))
    twin = block.run(x, reference, compute_dtype=torch.float64, seen=seen_by_kernels) - x
    assert relative((out - x) - twin, twin) <= 2e-4
    assert torch.equal(block.run(x, mapped=True), out)
