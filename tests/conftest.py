"""What holds for every test: nothing is written into the user's cache nor read from their settings, and torch keeps to one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

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


@pytest.fixture(scope="session")
def simt() -> Any:
    """The CUDA kernels under the emulation of ``csrc/simt``; where it is not built the test is skipped."""
    from helexa_engine.testing.cuda_core import emulation

    module = emulation()
    if module is None:
        pytest.skip("the emulation is not built: scripts/build_native does")
    return module


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """``-m gpu`` selects what runs on a card: the "card" side of the kernels', ops' and models' tests. Without one there is none."""
    if "gpu" not in config.getoption("markexpr").split() or "not" in config.getoption("markexpr").split():
        return
    import torch

    if not torch.cuda.is_available():
        terminalreporter.write_line(
            "-m gpu: no CUDA device here, so no test is selected; scripts/gpu_check runs them on a card"
        )
