"""Where what runs on CUDA is tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from helexa_engine.testing.cuda_core import emulated_cuda

#: Where what runs on CUDA is tested: everywhere under the emulation, and on a card where there is one.
CUDA_PLACES = ["emulated", *(["card"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=[pytest.param(p, marks=pytest.mark.gpu if p == "card" else ()) for p in CUDA_PLACES])
def cuda_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of the tensors that what runs on ``"cuda"`` is given; under the emulation it is the CPU."""
    if request.param == "card":
        yield torch.device("cuda")
        return
    request.getfixturevalue("simt")
    with emulated_cuda(thread_order=7):
        yield torch.device("cpu")
