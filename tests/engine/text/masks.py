"""What a constraint allows, by its two ways of saying it."""

from __future__ import annotations

from typing import Any

import numpy as np


def allowed(constraint: Any, size: int) -> np.ndarray:
    """Which of ``size`` tokens may come next, for logits of that width and wider ones."""
    by_width = [_allowed(constraint, width) for width in (size, size + 9, size + 70)]
    assert all((each[:size] == by_width[0]).all() for each in by_width)
    return by_width[0]


def _allowed(constraint: Any, width: int) -> np.ndarray:
    logits = np.zeros(width, np.float32)
    constraint.apply(logits)
    mask = np.full((width + 31) // 32, 0x5A5A5A5A, np.int32)
    forced = constraint.forced_token()
    if forced is not None:
        said = np.arange(width) == forced
    elif constraint.fill_mask(mask):
        said = np.unpackbits(mask.view(np.uint8), count=width, bitorder="little").view(bool)
    else:
        assert (mask == 0x5A5A5A5A).all()
        said = np.ones(width, bool)
    np.testing.assert_array_equal(said, logits == 0)
    return said
