"""Comparing tensors with a message that says what differs and where."""

from __future__ import annotations

import torch


def assert_close(got: torch.Tensor, expected: torch.Tensor, *, atol: float, what: str = "values") -> None:
    """Shapes equal, no NaN, and the largest absolute difference at most ``atol``; 0 means equal to the bit."""
    assert got.shape == expected.shape, f"{what}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if not got.numel():
        return
    difference = (got.double() - expected.double()).abs()
    assert not difference.isnan().any(), f"{what}: NaN at {difference.isnan().nonzero()[0].tolist()}"
    worst = int(difference.argmax())
    largest = float(difference.flatten()[worst])
    assert largest <= atol, (
        f"{what}: largest difference {largest:.3g} at {list(map(int, torch.unravel_index(torch.tensor(worst), got.shape)))}: "
        f"expected {float(expected.flatten()[worst]):.9g}, got {float(got.flatten()[worst]):.9g} (allowed {atol:g})"
    )
