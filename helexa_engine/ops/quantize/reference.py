"""The twin of ``quantize``: numpy."""

from __future__ import annotations

from ...quant.quantize import quantize

__all__ = ["quantize"]
