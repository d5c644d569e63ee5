"""Where the CUDA kernels' tests run: everywhere under the emulation, twice over, and on a card where there is one."""

from __future__ import annotations

import pytest
import torch

from helexa_engine.testing.cuda_core import CardCore, EmulatedCore

#: Behind the first guard page with threads in order; before the second one with threads in another.
PLACES = ["emulated_in_order", "emulated_shuffled", *(["card"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=[pytest.param(p, marks=pytest.mark.gpu if p == "card" else ()) for p in PLACES])
def cuda_core(request: pytest.FixtureRequest) -> CardCore | EmulatedCore:
    if request.param == "card":
        return CardCore()
    request.getfixturevalue("simt")
    in_order = request.param == "emulated_in_order"
    return EmulatedCore(at_front=in_order, thread_order=0 if in_order else 7)
