"""What holds for every test: nothing is written into the user's cache nor read from their settings, and torch keeps to one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before anything imports torch. Its tensors are tiny here, and a team of threads beside the core's own costs more than it gives,
# many times over on a machine that does something else too; the engine's thread has torch on one thread for the same reason.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELEXA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield
