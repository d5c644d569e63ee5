"""The short causal convolution of a Gated DeltaNet layer: depthwise, with a state of the last inputs, then SiLU.

``causal_conv1d(x, weight, conv_state, state_slots, cu_seqlens) -> out``; arguments as in
:func:`helexa_engine.ops.causal_conv1d.reference.causal_conv1d`. Chosen by ``kernel_size``, the number of taps (4 in every
released model, and when not given).
"""

from __future__ import annotations

from ..registry import Facts, Implementation, Op


def _supports(facts: Facts) -> bool:
    return facts.get("kernel_size", 4) in range(2, 9)


causal_conv1d = Op(
    "causal_conv1d",
    "helexa_engine.ops.causal_conv1d.reference",
    Implementation("native", "cpu", "helexa_engine.ops.causal_conv1d.native", supports=_supports),
    Implementation("cuda", "cuda", "helexa_engine.ops.causal_conv1d.cuda", supports=_supports),
)

__all__ = ["causal_conv1d"]
