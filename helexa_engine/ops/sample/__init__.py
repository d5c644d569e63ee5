"""A token for each row of logits, chosen where the logits lie: what ``runtime/sampler.py`` defines, for a batch of rows.

``sample(logits, rows)``: ``logits`` [N, V] float32 and :class:`~.rows.SampleRows` -> what :func:`~.rows.read` reads. On a device nothing
of it waits for the host, and the tokens are there for the next step before anyone has read them.
"""

from __future__ import annotations

from ..registry import Implementation, Op

sample = Op(
    "sample",
    "helexa_engine.ops.sample.reference",
    Implementation("cuda", "cuda", "helexa_engine.ops.sample.cuda"),
)

__all__ = ["sample"]
