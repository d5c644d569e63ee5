"""What a config says about rotary frequencies, checked. No tensors: planning reads it too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UnsupportedCheckpoint


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How frequencies differ from ``theta ** -(2 i / rotary_dim)``.

    Attributes:
        kind: ``default`` (not at all), ``linear`` (all by ``factor``) or ``yarn``, which has the others.
        original: positions that the model was trained on.
        amplitude: what cos and sin are multiplied with.
        beta_fast, beta_slow: turns over ``original`` above which a pair keeps its frequency, and below which it takes ``factor``.
        truncate: whether the pairs between are whole numbers.
    """

    kind: Literal["default", "linear", "yarn"] = "default"
    factor: float = 1.0
    original: float = 0.0
    amplitude: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_config(cls, theta: float, scaling: Mapping[str, Any] | None, where: str) -> RopeScaling:
        """From HuggingFace's ``rope_scaling``: None, ``default``, ``linear`` (``factor``) or ``yarn`` (``factor``,
        ``original_max_position_embeddings``, optional ``attention_factor``, ``beta_fast``, ``beta_slow``, ``truncate``).

        Raises:
            UnsupportedCheckpoint: another kind of scaling, or a missing or bad number; ``where`` names the checkpoint.
        """
        if theta <= 1:
            raise UnsupportedCheckpoint(f"rope_theta: expected a number above 1, got {theta!r}", where)
        if scaling is None:
            return cls()
        if not isinstance(scaling, Mapping):
            raise UnsupportedCheckpoint(f"rope_scaling: expected an object, got {scaling!r}", where)
        kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
        if kind == "default":
            return cls()
        if kind == "linear":
            return cls("linear", _number(scaling, "factor", where))
        if kind != "yarn":
            raise UnsupportedCheckpoint(
                f"rope scaling {kind!r} is not supported; expected default, linear or yarn", where
            )
        factor = _number(scaling, "factor", where)
        return cls(
            "yarn",
            factor,
            _number(scaling, "original_max_position_embeddings", where),
            _number(scaling, "attention_factor", where, 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
            _number(scaling, "beta_fast", where, 32.0),
            _number(scaling, "beta_slow", where, 1.0),
            bool(scaling.get("truncate", True)),
        )


def _number(scaling: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = scaling.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-9 < value < 1e12:
        raise UnsupportedCheckpoint(f"{key}: expected a number in (1e-9, 1e12), got {value!r}", where)
    return float(value)
