"""The forward pass that the demo trains with, against transformers' own."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from helexa_engine.demo import hybrid  # noqa: E402

LENGTHS = (37, 100, 64, 1, 3, 115)


def test_packed_conversations_do_not_see_each_other() -> None:
    """Each segment of a packed row gets what transformers computes for it alone, wherever its borders lie in the chunks."""
    torch.manual_seed(0)
    model = hybrid.new_model().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p.ndim > 1 else 0.2))
        ids = torch.randint(0, 2000, (1, sum(LENGTHS)))
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(LENGTHS)])[None]
        packed = hybrid.hidden_states(model, ids, positions, segments)
        start = 0
        for n in LENGTHS:
            alone = model.model(input_ids=ids[:, start : start + n], use_cache=False).last_hidden_state
            assert (packed[:, start : start + n] - alone).abs().max() < 1e-4
            start += n


@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_delta_rule_and_its_gradient(strength: float) -> None:
    """Against the recurrence token by token, with strong decays and strongly correlated keys too, whose chunks must stay finite."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    torch.manual_seed(1)
    heads, width, lengths = 3, 16, (50, 14, 64)
    length = sum(lengths)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    q, v = unit(torch.randn(1, length, heads, width)) * width**-0.5, torch.randn(1, length, heads, width)
    k = unit(torch.randn(1, 1, heads, width) + 0.1 * torch.randn(1, length, heads, width))
    g, beta = -strength * torch.rand(1, length, heads), torch.rand(1, length, heads)
    inputs = [t.requires_grad_() for t in (q, k, v, g, beta)]
    got = hybrid.gated_delta_rule(*inputs, segments)
    parts, start = [], 0
    for n in lengths:
        span = slice(start, start + n)
        # transformers scales the query itself.
        out, _ = torch_recurrent_gated_delta_rule(
            q[:, span] * width**0.5, k[:, span], v[:, span], g=g[:, span], beta=beta[:, span]
        )
        parts.append(out)
        start += n
    expected = torch.cat(parts, 1)
    assert torch.allclose(got, expected, atol=1e-5)
    upstream = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)


def test_rows_suit_every_quant_type() -> None:
    model = hybrid.new_model()
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.shape[1] % 256 == 0, name
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 8e6


def test_heads_start_with_memories_of_different_lengths() -> None:
    net = hybrid.new_model().model.layers[0].linear_attn
    kept = torch.exp(-net.A_log.exp() * torch.nn.functional.softplus(net.dt_bias))
    assert torch.allclose(kept, torch.exp(-1 / torch.tensor([8.0, 32.0, 128.0, 512.0])), atol=1e-4)
