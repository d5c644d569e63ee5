"""``quant_matmul`` and ``quant_embedding`` as a model on CUDA calls them, against their twins; under the emulation, and on a card where
there is one."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import pytest
import torch

from helexa_engine.ops.packed_bytes import packed_bytes
from helexa_engine.ops.quant_embedding import quant_embedding as embedding_op
from helexa_engine.ops.quant_embedding import reference as reference_embedding
from helexa_engine.ops.quant_matmul import quant_matmul as matmul_op
from helexa_engine.ops.quant_matmul import reference
from helexa_engine.quant import types
from helexa_engine.quant.types import QuantType
from tests.engine.ops.test_quant_matmul import activations, raw_weights
from tests.native.test_cuda_quant_matmul import truth_and_bound as rounded_truth_and_bound
from tests.native.test_cuda_quant_matvec import check, silu_bound
from tests.native.test_cuda_quant_matvec import truth_and_bound as streamed_truth_and_bound
from tests.native.test_cuda_repack import TYPES

#: Below, at and above the rows that weights stream by, and of more than one tile of activations.
ROWS = (1, 8, 9, 33)


def truth_and_bound(
    quant_type: QuantType, data: np.ndarray, rows: int, cols: int, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The truth of what is multiplied: int8 or float32 activations with up to eight rows, all in bfloat16 with more."""
    of = streamed_truth_and_bound if x.shape[0] <= 8 else rounded_truth_and_bound
    return of(quant_type, data, rows, cols, x)


@pytest.fixture
def cuda_module(cuda_device: torch.device) -> ModuleType:
    """What a layer on CUDA gets."""
    return matmul_op.choose("cuda", in_features=256)


@pytest.mark.parametrize("quant_type", TYPES, ids=str)
def test_packing_is_reversible(cuda_device, cuda_module, quant_type: QuantType) -> None:
    rows, cols = 5, 2 * quant_type.block_size
    data = np.random.default_rng(rows).integers(0, 256, rows * quant_type.row_bytes(cols), dtype=np.uint8)
    data.flags.writeable = False  # as a mapped file's
    packed = cuda_module.pack(quant_type, data, rows, cols)
    assert (packed.rows, packed.cols, packed.quant_type, packed.scale) == (rows, cols, quant_type, 1.0)
    assert packed.nbytes == packed_bytes("cuda", quant_type, (rows, cols)) == packed.planes.numel()
    assert packed.planes.device.type == cuda_device.type
    np.testing.assert_array_equal(cuda_module.unpack(packed).cpu().numpy(), data)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "BF16", "IQ3_S"])
def test_products_of_one_matrix(cuda_device, cuda_module, poisoned, name: str, rows: int) -> None:
    quant_type, n, cols = types.by_name(name), 9, 512
    data = raw_weights(quant_type, n, cols)
    x = activations(rows, cols)
    packed = cuda_module.pack(quant_type, data, n, cols)
    truth, bound = truth_and_bound(quant_type, data, n, cols, x)
    check(cuda_module.quant_matmul(x.to(cuda_device), [packed]).cpu(), truth, bound)
    out = torch.full((rows, n), float("nan"), device=cuda_device)
    assert cuda_module.quant_matmul(x.to(cuda_device), [packed], out=out) is out
    check(out.cpu(), truth, bound)
    residual = activations(rows, n, seed=9)
    added = residual.clone().to(cuda_device)
    assert cuda_module.quant_matmul(x.to(cuda_device), [packed], residual=added) is added
    expected = residual.double() + truth
    check(added.cpu(), expected, bound + 2.0**-24 * (expected.abs() + bound))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("names", [("Q4_K", "Q4_K"), ("Q4_K", "Q6_K"), ("Q8_0", "F16")])
def test_a_gate_and_an_up_of_any_types(cuda_device, cuda_module, poisoned, names: tuple[str, str], rows: int) -> None:
    n, cols, scales = 6, 256, (0.5, 0.25)
    kinds = [types.by_name(name) for name in names]
    datas = [raw_weights(t, n, cols, seed=i) for i, t in enumerate(kinds)]
    packed = [cuda_module.pack(t, d, n, cols, scale=s) for t, d, s in zip(kinds, datas, scales, strict=True)]
    x = activations(rows, cols) * 0.1
    (gate, gate_bound), (up, up_bound) = (
        (s * truth, s * bound)
        for s, (truth, bound) in zip(
            scales, (truth_and_bound(t, d, n, cols, x) for t, d in zip(kinds, datas, strict=True)), strict=True
        )
    )
    gated = cuda_module.quant_matmul(x.to(cuda_device), packed, activation="silu_mul")
    check(gated.cpu(), torch.nn.functional.silu(gate) * up, silu_bound(gate, gate_bound, up, up_bound))


def test_a_norm_in_front(cuda_device, cuda_module) -> None:
    """Against the twin with float weights, whose result does not hang on the roundings of quantisation."""
    n, cols = 5, 384
    data = raw_weights(types.F32, n, cols)
    x, norm = activations(3, cols), torch.rand(cols, generator=torch.Generator().manual_seed(4)) + 0.5
    packed = cuda_module.pack(types.F32, data, n, cols)
    out = cuda_module.quant_matmul(x.to(cuda_device), [packed], norm_weight=norm.to(cuda_device), norm_eps=1e-6)
    block = reference.pack(types.F32, data, n, cols)
    arguments = {"norm_weight": norm, "norm_eps": 1e-6}
    truth = reference.quant_matmul(x, [block], compute_dtype=torch.float64, **arguments)
    yardstick = (reference.quant_matmul(x, [block], **arguments).double() - truth).abs().max()
    assert (out.cpu().double() - truth).abs().max() <= 2 * yardstick


@pytest.fixture
def few_rows_fill_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds and scratch memory of a size that the emulation gets through."""
    module = importlib.import_module("helexa_engine.ops.quant_matmul.cuda_matmul")
    monkeypatch.setattr(module, "LIBRARY_ROWS", 20)
    monkeypatch.setattr(module, "LIBRARY_ROWS_BF16", 12)
    monkeypatch.setattr(module, "SCRATCH_BYTES", 1)


@pytest.mark.parametrize("rows", [11, 12, 19, 20])
@pytest.mark.parametrize("names", [("BF16", "BF16"), ("Q4_K", "BF16"), ("IQ2_XS", "Q6_K"), ("F16", "F32")])
def test_both_sides_of_the_library(
    cuda_device, cuda_module, poisoned, few_rows_fill_the_library, names: tuple[str, str], rows: int
) -> None:
    """Parts that are decoded in several pieces, beside each other and as a gate and an up."""
    cols, heights, scales = 256, (200, 200), (0.5, 0.25)
    kinds = [types.by_name(name) for name in names]
    datas = [raw_weights(t, n, cols, seed=i) for i, (t, n) in enumerate(zip(kinds, heights, strict=True))]
    packed = [
        cuda_module.pack(t, d, n, cols, scale=s) for t, d, n, s in zip(kinds, datas, heights, scales, strict=True)
    ]
    x = activations(rows, cols) * 0.1
    both = []
    for quant_type, data, n, scale in zip(kinds, datas, heights, scales, strict=True):
        if quant_type is types.F32:
            weights = torch.from_numpy(data.view(np.float32).reshape(n, cols)).double()
            truth, bound = x.double() @ weights.T, 2.0**-14 * (x.double().abs() @ weights.abs().T)
        else:
            truth, bound = rounded_truth_and_bound(quant_type, data, n, cols, x)
        both.append((scale * truth, scale * bound))
    truth, bound = (torch.cat(side, dim=1) for side in zip(*both, strict=True))
    check(cuda_module.quant_matmul(x.to(cuda_device), packed).cpu(), truth, bound)
    residual = activations(rows, 400, seed=9)
    added = cuda_module.quant_matmul(x.to(cuda_device), packed, residual=residual.clone().to(cuda_device))
    expected = residual.double() + truth
    check(added.cpu(), expected, bound + 2.0**-24 * (expected.abs() + bound))
    if names == ("F16", "F32"):  # a gate takes as many products as its up, so F16 is no longer rounded
        weights = torch.from_numpy(datas[0].view(np.float16).reshape(200, cols)).double()
        bound = 2.0**-14 * (x.double().abs() @ weights.abs().T)
        both[0] = (scales[0] * (x.double() @ weights.T), scales[0] * bound)
    (gate, gate_bound), (up, up_bound) = both
    gated = cuda_module.quant_matmul(x.to(cuda_device), packed, activation="silu_mul")
    check(gated.cpu(), torch.nn.functional.silu(gate) * up, silu_bound(gate, gate_bound, up, up_bound))


@pytest.mark.parametrize("rows", [9, 11, 12])
@pytest.mark.parametrize("name", ["BF16", "F32"])
def test_a_norm_in_front_of_exact_products(
    cuda_device, cuda_module, few_rows_fill_the_library, name: str, rows: int
) -> None:
    """About 16 bits of mantissa, in the kernel and in the library; products that are not exact are further away."""
    n, cols, quant_type = 20, 160, types.by_name(name)
    data = raw_weights(quant_type, n, cols)
    x, norm = activations(rows, cols), torch.rand(cols, generator=torch.Generator().manual_seed(4)) + 0.5
    packed, block = cuda_module.pack(quant_type, data, n, cols), reference.pack(quant_type, data, n, cols)
    truth = reference.quant_matmul(x, [block], norm_weight=norm, norm_eps=1e-6, compute_dtype=torch.float64)
    normed = reference.rms_norm(x.double(), norm, 1e-6)
    bound = 2.0**-14 * (normed.abs() @ block.dequantized().double().abs().T)
    arguments = {"norm_weight": norm.to(cuda_device), "norm_eps": 1e-6}
    check(cuda_module.quant_matmul(x.to(cuda_device), [packed], exact=True, **arguments).cpu(), truth, bound)
    plain = cuda_module.quant_matmul(x.to(cuda_device), [packed], **arguments).cpu()
    assert ((plain.double() - truth).abs() > bound).any() == (quant_type is types.BF16)


def test_columns_that_are_no_groups_and_many_parts(cuda_device, cuda_module) -> None:
    """What the tiles do not take streams by, eight rows at a time."""
    for count, cols in ((1, 40), (9, 32)):
        datas = [raw_weights(types.F16, 3, cols, seed=i) for i in range(count)]
        packed = [cuda_module.pack(types.F16, data, 3, cols) for data in datas]
        x = activations(9, cols)
        both = [streamed_truth_and_bound(types.F16, data, 3, cols, x) for data in datas]
        out = cuda_module.quant_matmul(x.to(cuda_device), packed)
        check(out.cpu(), *(torch.cat(side, dim=1) for side in zip(*both, strict=True)))


def test_gates_and_ups_of_different_heights_are_refused(cuda_device, cuda_module) -> None:
    packed = [cuda_module.pack(types.Q8_0, raw_weights(types.Q8_0, n, 64), n, 64) for n in (4, 5, 3)]
    x = activations(9, 64).to(cuda_device)
    for parts in (packed, packed[:2]):
        with pytest.raises(ValueError, match="quant_matmul: parts: expected gates and as many ups"):
            cuda_module.quant_matmul(x, parts, activation="silu_mul")


def test_no_rows_and_bad_arguments(cuda_device, cuda_module) -> None:
    packed = cuda_module.pack(types.Q8_0, raw_weights(types.Q8_0, 4, 64), 4, 64)
    assert cuda_module.quant_matmul(torch.empty(0, 64, device=cuda_device), [packed]).shape == (0, 4)
    x = activations(2, 64).to(cuda_device)
    with pytest.raises(ValueError, match=r"quant_matmul: x: expected contiguous float32 \[T, K\]"):
        cuda_module.quant_matmul(x.double(), [packed])
    with pytest.raises(ValueError, match="quant_matmul: parts: expected matrices of 32 columns, as x has, got 64"):
        cuda_module.quant_matmul(x[:, :32].contiguous(), [packed])
    with pytest.raises(ValueError, match="quant_matmul: output: expected contiguous float32"):
        cuda_module.quant_matmul(x, [packed], out=torch.empty(2, 5, device=cuda_device))
    with pytest.raises(ValueError, match="quant_matmul: activation: expected None or 'silu_mul'"):
        cuda_module.quant_matmul(x, [packed], activation="gelu")
    with pytest.raises(ValueError, match="quant_matmul: residual: expected none with silu_mul"):
        cuda_module.quant_matmul(x, [packed, packed], activation="silu_mul", residual=x)
    with pytest.raises(ValueError, match="pack: data: expected 136 bytes"):
        cuda_module.pack(types.Q8_0, np.zeros(1, np.uint8), 4, 32)
    with pytest.raises(ValueError, match="planes_bytes: quant_type"):
        cuda_module.pack(types.F64, np.zeros(4 * 32 * 8, np.uint8), 4, 32)


@pytest.mark.parametrize("quant_type", [types.Q4_K, types.IQ2_XXS, types.BF16], ids=str)
def test_embedding_rows_are_exact(cuda_device, cuda_module, poisoned, quant_type: QuantType) -> None:
    rows, cols = 9, 256
    data = raw_weights(quant_type, rows, cols)
    module = importlib.import_module(embedding_op.decide("cuda", packed_by="cuda").module)
    packed = cuda_module.pack(quant_type, data, rows, cols, scale=0.37)
    ids = torch.tensor([8, 0, 3, 3, 5])
    out = module.quant_embedding(ids.to(cuda_device), packed)
    expected = reference_embedding.quant_embedding(ids, reference.pack(quant_type, data, rows, cols, scale=0.37))
    assert torch.equal(out.cpu(), expected)
    assert module.quant_embedding(ids[:0].to(cuda_device), packed).shape == (0, cols)
    outside = module.quant_embedding(torch.tensor([-1, 2, rows], device=cuda_device), packed).cpu()
    assert outside[[0, 2]].isnan().all() and torch.equal(outside[1], reference_row(quant_type, data, rows, cols, 2))


def reference_row(quant_type: QuantType, data: np.ndarray, rows: int, cols: int, row: int) -> torch.Tensor:
    block = reference.pack(quant_type, data, rows, cols, scale=0.37)
    return reference_embedding.quant_embedding(torch.tensor([row]), block)[0]
