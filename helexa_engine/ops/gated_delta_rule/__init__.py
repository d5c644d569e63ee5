"""The gated delta rule with everything between the convolution and the output projection in one op: L2 norm of q and k,
gates, the recurrence over a float32 state, RMSNorm of its output and the SiLU gate.

``gated_delta_rule(qkv, z, b, a, a_coefficient, dt_bias, norm_weight, eps, recurrent_state, state_slots, cu_seqlens, *,
num_k_heads, num_v_heads, tiled) -> out``; arguments and the layout of the state as in
:func:`helexa_engine.ops.gated_delta_rule.reference.gated_delta_rule`. Chosen by ``head_k_dim`` and ``head_v_dim``.

An implementation may also have ``gated_delta_step``, which computes a ``causal_conv1d`` and this in one call, for decode steps: see
:func:`helexa_engine.ops.gated_delta_rule.cuda.gated_delta_step`. Its twin is the composition of the two twins.
"""

from __future__ import annotations

from ..registry import Facts, Implementation, Op


def _supports(facts: Facts, largest: int = 256) -> bool:
    return all(facts[name] % 16 == 0 and facts[name] <= largest for name in ("head_k_dim", "head_v_dim"))


gated_delta_rule = Op(
    "gated_delta_rule",
    "helexa_engine.ops.gated_delta_rule.reference",
    Implementation("native", "cpu", "helexa_engine.ops.gated_delta_rule.native", supports=_supports),
    Implementation(
        "cuda",
        "cuda",
        "helexa_engine.ops.gated_delta_rule.cuda",
        supports=lambda facts: _supports(facts, largest=128),
    ),
    Implementation(
        "triton",
        "cuda",
        "helexa_engine.ops.gated_delta_rule.triton",
        supports=_supports,
        needs_native=False,
        needs_package="triton",
    ),
)

__all__ = ["gated_delta_rule"]
