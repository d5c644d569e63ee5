"""The short causal convolution of a Gated DeltaNet layer: depthwise, with a state of the last inputs, then SiLU.

``causal_conv1d(x, weight, conv_state, state_slots, cu_seqlens) -> out``; arguments as in
:func:`helexa_engine.ops.causal_conv1d.reference.causal_conv1d`.
"""

from __future__ import annotations

from ..registry import Op

causal_conv1d = Op("causal_conv1d", "helexa_engine.ops.causal_conv1d.reference")

__all__ = ["causal_conv1d"]
