"""Models: one file an architecture, written once for every weight format, device and cache layout."""

from __future__ import annotations
