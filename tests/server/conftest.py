"""Fixtures of the server's tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from .live import Serve, live_server


@pytest.fixture
def serve() -> Iterator[Serve]:
    """``serve(engine, **config)`` starts a server that ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda engine, **options: stack.enter_context(live_server(engine, **options))
