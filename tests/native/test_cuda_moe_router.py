"""``csrc/cuda/moe_router.cu``: the choice of experts against the twin's ``route``, and the tokens grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from helexa_engine.ops.moe_matmul.reference import route
from helexa_engine.ops.quant_matmul.reference import quantized_activations, rms_norm

EPS = 1e-6


@dataclass
class Routed:
    logits: np.ndarray
    normed: np.ndarray
    bf16: np.ndarray
    remainder: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray
    ticket: np.ndarray


def run(
    core,
    x: np.ndarray,
    weight: np.ndarray,
    top_k: int,
    *,
    norm: np.ndarray | None = None,
    shared: bool = False,
    norm_topk_prob: bool = True,
) -> Routed:
    rows, cols = x.shape
    width = len(weight)
    placed = [core.put(x), core.put(weight)] + ([core.put(norm)] if norm is not None else [])
    nans = lambda *shape: core.put(np.full(shape, np.nan, np.float32))  # noqa: E731
    ticket, logits, normed = core.put(np.zeros(1, np.uint32)), nans(rows, width), nans(rows, cols)
    bf16, remainder = (core.put(np.full((rows, cols), 0xFFFF, np.uint16)) for _ in range(2))
    codes, scales = core.put(np.full((rows, cols), -128, np.int8)), nans(rows, cols // 16, 2)
    chosen, weights = core.put(np.full((rows, top_k), -1, np.int32)), nans(rows, top_k + shared)
    core.kernels.moe_router(
        core.address(placed[0]),
        rows,
        cols,
        core.address(placed[2]) if norm is not None else 0,
        EPS,
        core.address(placed[1]),
        width - shared,
        shared,
        top_k,
        norm_topk_prob,
        *(core.address(a) for a in (ticket, logits, normed, bf16, remainder, codes, scales, chosen, weights)),
    )
    return Routed(*map(core.get, (logits, normed, bf16, remainder, codes, scales, chosen, weights, ticket)))


def separated(rows: int, experts: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Activations and a router whose logits lie apart by far more than float32 rounding: a permutation of small steps for each row."""
    rng = np.random.default_rng([seed, rows, experts])
    x = rng.standard_normal((rows, cols))
    wanted = np.stack([rng.permutation(experts) for _ in range(rows)]) * 0.25 - experts / 16
    if rows <= cols // 2:
        weight = np.linalg.lstsq(x, wanted, rcond=None)[0].T
    else:
        weight = rng.standard_normal((experts, cols)) / cols**0.5
    return x.astype(np.float32), weight.astype(np.float32)


def check(
    routed: Routed,
    x: np.ndarray,
    weight: np.ndarray,
    norm: np.ndarray | None,
    top_k: int,
    shared: bool,
    normalised: bool,
) -> None:
    """Against the twin in float64. Where two logits are nearer than rounding the choice may differ: there are no such here."""
    value = torch.from_numpy(x).double()
    if norm is not None:
        value = rms_norm(value, torch.from_numpy(norm).double(), EPS)
    np.testing.assert_allclose(routed.normed, value.numpy(), rtol=4e-7, atol=1e-12)
    expected_bf16 = torch.from_numpy(routed.normed).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(routed.bf16, expected_bf16)
    together = sum(
        (half.astype(np.uint32) << 16).view(np.float32).astype(float) for half in (routed.bf16, routed.remainder)
    )
    np.testing.assert_allclose(together, routed.normed, rtol=2.0**-16)
    dequantised = routed.codes.reshape(*routed.scales.shape[:2], 16) * routed.scales[:, :, :1].astype(np.float64)
    expected = quantized_activations(torch.from_numpy(routed.normed)).numpy()
    np.testing.assert_array_equal(dequantised.reshape(expected.shape), expected)
    np.testing.assert_allclose(routed.scales[:, :, 1], dequantised.sum(-1), rtol=1e-6, atol=1e-12)
    logits = value @ torch.from_numpy(weight).double().T
    np.testing.assert_allclose(routed.logits, logits.numpy(), rtol=0, atol=2e-6 * float(logits.abs().max() + 1))
    experts = len(weight) - shared
    ordered = logits[:, :experts].sort(-1).values
    assert experts == 1 or float(ordered.diff(dim=-1)[:, -top_k:].min()) > 1e-5, "a test of separated logits"
    chosen, weights = route(logits[:, :experts], top_k, normalised)
    chosen, by_index = chosen.sort(-1)
    np.testing.assert_array_equal(routed.chosen, chosen.numpy())
    np.testing.assert_allclose(routed.weights[:, :top_k], weights.gather(-1, by_index).numpy(), rtol=2e-5)
    if shared:
        np.testing.assert_allclose(routed.weights[:, top_k], torch.sigmoid(logits[:, experts]).numpy(), rtol=2e-5)
    assert routed.ticket[0] == 0


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("experts,top_k", [(1, 1), (4, 1), (16, 4), (64, 10)])
def test_separated_logits(cuda_core, experts: int, top_k: int, rows: int, normalised: bool) -> None:
    cols, shared = 1056 if rows == 3 else 160, rows != 1
    x, weight = separated(rows, experts + shared, cols)
    norm = None
    if rows != 3:
        norm = np.random.default_rng(1).uniform(0.5, 1.5, cols).astype(np.float32)
        weight /= norm
    routed = run(cuda_core, x, weight, top_k, norm=norm, shared=shared, norm_topk_prob=normalised)
    check(routed, x, weight, norm, top_k, shared, normalised)


@pytest.mark.parametrize("rows,experts,top_k", [(129, 17, 3), (130, 5, 2), (1, 512, 16), (9, 512, 16)])
def test_many_rows_and_many_experts(cuda_core, rows: int, experts: int, top_k: int) -> None:
    x, weight = separated(rows, experts, 64)
    if experts == 512:
        x, weight = x[:, :32].copy(), weight[:, :32].copy()
    routed = run(cuda_core, x, weight, top_k)
    np.testing.assert_allclose(routed.logits, x.astype(np.float64) @ weight.T, rtol=0, atol=1e-4)
    chosen, weights = route(torch.from_numpy(routed.logits), top_k, True)
    chosen, by_index = chosen.sort(-1)
    np.testing.assert_array_equal(routed.chosen, chosen.numpy())
    np.testing.assert_allclose(routed.weights, weights.gather(-1, by_index).numpy(), rtol=2e-6)


def test_a_row_has_the_same_bits_however_many_stand_beside_it(cuda_core) -> None:
    """On both sides of every threshold: 8 rows in one launch, 128 by small tiles."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((n, 160)).astype(np.float32) for n in (130, 12))
    norm = rng.uniform(0.5, 1.5, 160).astype(np.float32)
    whole = run(cuda_core, x, weight, 3, norm=norm, shared=True)
    for first, last in ((0, 1), (5, 13), (20, 29), (1, 129)):
        part = run(cuda_core, x[first:last], weight, 3, norm=norm, shared=True)
        for name in ("logits", "normed", "bf16", "codes", "scales", "chosen", "weights"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[first:last], err_msg=name)


@pytest.mark.parametrize("rows", [2, 9])
def test_equal_logits_take_the_lowest_index(cuda_core, rows: int) -> None:
    x = np.ones((rows, 32), np.float32)
    weight = np.zeros((70, 32), np.float32)
    routed = run(cuda_core, x, weight, 4)
    np.testing.assert_array_equal(routed.chosen, [[0, 1, 2, 3]] * rows)
    np.testing.assert_array_equal(routed.weights, np.full((rows, 4), 0.25, np.float32))
    weight[[37, 5, 69, 33], 0] = [
        1,
        1,
        1,
        -0.0,
    ]  # 37, 5 and 69 are equal and above; of the rest the first, 0 and -0 alike
    np.testing.assert_array_equal(run(cuda_core, x, weight, 4).chosen, [[0, 5, 37, 69]] * rows)
    np.testing.assert_array_equal(run(cuda_core, x, weight, 2).chosen, [[5, 37]] * rows)
    weight[:, 0] = -1
    weight[[3, 68], 0] = [-0.0, 0.0]
    np.testing.assert_array_equal(run(cuda_core, x, weight, 1).chosen, [[3]] * rows)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_broken_row_has_no_weights_and_stays_alone(cuda_core, value: float, normalised: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 64)).astype(np.float32), rng.standard_normal((40, 64)).astype(np.float32)
    expected = run(cuda_core, x, weight, 4, norm=np.ones(64, np.float32), norm_topk_prob=normalised)
    x[1, 40] = value
    routed = run(cuda_core, x, weight, 4, norm=np.ones(64, np.float32), norm_topk_prob=normalised)
    assert np.isnan(routed.weights[1]).all()
    assert len(set(routed.chosen[1])) == 4 and (routed.chosen[1] >= 0).all() and (routed.chosen[1] < 40).all()
    np.testing.assert_array_equal(routed.weights[[0, 2]], expected.weights[[0, 2]])
    weight[3, 7] = np.copysign(np.nan, value)  # one broken logit, wherever the order puts it
    assert np.isnan(run(cuda_core, x[:1], weight, 4, norm_topk_prob=normalised).weights).all()


def test_the_largest_logits_do_not_overflow(cuda_core) -> None:
    x = np.full((1, 32), 1e4, np.float32)
    weight = np.zeros((3, 32), np.float32)
    weight[:, 0] = [100, -100, 100]
    routed = run(cuda_core, x, weight, 2)
    np.testing.assert_array_equal(routed.chosen, [[0, 2]])
    np.testing.assert_array_equal(routed.weights, [[0.5, 0.5]])


@pytest.mark.parametrize("tile_rows", [1, 16, 64])
@pytest.mark.parametrize("pairs,experts", [(1, 1), (7, 4), (40, 300), (256, 3), (257, 16), (2100, 5)])
def test_pairs_are_grouped_in_order(cuda_core, pairs: int, experts: int, tile_rows: int) -> None:
    rng = np.random.default_rng([pairs, experts])
    chosen = rng.integers(0, experts, pairs).astype(np.int32)
    chosen[chosen == 2] = 1  # nobody chose expert 2
    most = pairs // tile_rows + min(pairs, experts)
    placed = cuda_core.put(chosen)
    pair, place = (cuda_core.put(np.full(pairs, -1, np.int32)) for _ in range(2))
    tiles, num_tiles = cuda_core.put(np.full((most, 3), -1, np.int32)), cuda_core.put(np.full(1, -1, np.int32))
    addresses = map(cuda_core.address, (pair, place, tiles, num_tiles))
    cuda_core.kernels.moe_group(cuda_core.address(placed), pairs, experts, tile_rows, *addresses)
    pair, place, tiles, num_tiles = map(cuda_core.get, (pair, place, tiles, num_tiles))
    expected = np.argsort(chosen, kind="stable")
    np.testing.assert_array_equal(pair, expected)
    np.testing.assert_array_equal(place[expected], np.arange(pairs))
    cut, first = [], 0
    for expert, count in enumerate(np.bincount(chosen, minlength=experts)):
        for done in range(0, count, tile_rows):
            cut.append((expert, first + done, min(tile_rows, count - done)))
        first += count
    assert num_tiles[0] == len(cut) <= most
    np.testing.assert_array_equal(tiles[: len(cut)], cut)
    assert (tiles[len(cut) :] == -1).all()


def test_bad_arguments_are_named(cuda_core) -> None:
    x, weight = np.ones((1, 36), np.float32), np.ones((8, 36), np.float32)
    with pytest.raises(ValueError, match=r"moe_router: cols: expected a multiple of 32 up to 2\^20, got 36"):
        run(cuda_core, x, weight, 2)
    x, weight = np.ones((1, 32), np.float32), np.ones((8, 32), np.float32)
    for top_k in (0, 9):
        with pytest.raises(ValueError, match=f"moe_router: top_k: expected 1 to 8, got {top_k}"):
            run(cuda_core, x, weight, top_k)
    with pytest.raises(ValueError, match="moe_router: top_k: expected 1 to 16, got 17"):
        run(cuda_core, x, np.ones((32, 32), np.float32), 17)
    with pytest.raises(ValueError, match="moe_router: num_experts: expected 1 to 512, got 513"):
        run(cuda_core, x, np.ones((513, 32), np.float32), 2)
