"""Ops: each a folder with its PyTorch twin and its fast implementations; see :mod:`helexa_engine.ops.registry`."""

from __future__ import annotations
