"""What the tests of several native ops start from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from helexa_engine.ops.registry import native_core

from .levels import MAIN_LEVELS


@pytest.fixture(params=MAIN_LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set level that this processor has; without the native core the test is skipped."""
    native = native_core()
    if native is None:
        pytest.skip("the native core is not built")
    before = native.cpu_isa()
    try:
        native.set_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.set_cpu_isa(before)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an op leaves unwritten is NaN."""
    empty = torch.empty

    def poison(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poison)
