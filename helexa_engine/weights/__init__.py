"""Weights: files of every supported kind read as one :class:`~helexa_engine.weights.checkpoint.Checkpoint`."""

from __future__ import annotations
