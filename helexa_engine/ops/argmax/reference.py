"""``argmax`` in plain PyTorch: the definition."""

from __future__ import annotations

import torch


def argmax(values: torch.Tensor) -> torch.Tensor:
    """Places of the rows' largest values.

    Args:
        values: [T, N] float32, N at least 1.

    Returns:
        [T] int64: the first place among equals, and the first NaN where there is one.
    """
    numbers = torch.arange(values.shape[1], device=values.device)
    is_nan = values.isnan()
    largest = values.masked_fill(is_nan, -torch.inf).amax(dim=1, keepdim=True)
    wanted = torch.where(is_nan.any(dim=1, keepdim=True), is_nan, values == largest)
    return numbers.expand_as(values).masked_fill(~wanted, values.shape[1]).amin(dim=1)
