"""The matrices of a sparse block, whoever packed them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Experts(NamedTuple):
    """Stacks of one size: ``gate`` and ``up`` [F, H], ``down`` [H, F], each as ``pack_experts`` made it."""

    gate: Any
    up: Any
    down: Any
