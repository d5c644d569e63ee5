"""A recorded step makes the calls again on what stands in memory then, and knows when it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helexa_engine.ops.registry import native_core
from helexa_engine.quant import types

if native_core() is None:
    pytest.skip("the native core is not built", allow_module_level=True)

from helexa_engine.ops.quant_matmul import native
from helexa_engine.runtime.recorded_step import RecordedStep

WEIGHT = np.random.default_rng(0).standard_normal((48, 32), dtype=np.float32)
PACKED = native.pack(types.F32, WEIGHT.view(np.uint8).reshape(-1), 48, 32)


def test_a_replay_reads_its_inputs_anew_and_writes_the_same_outputs() -> None:
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))

    def function() -> tuple[torch.Tensor, ...]:
        hidden, rest = native.quant_matmul(x, [PACKED]).split_with_sizes([32, 16], 1)
        return native.quant_matmul(hidden.clone() if copies else x, [PACKED]), rest

    copies = False
    step = RecordedStep(function)
    assert step.replayable
    first = [t.clone() for t in step.result]
    x.copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(2)))
    expected = [t.clone() for t in function()]
    assert not torch.equal(expected[0], first[0])
    for got, before, want in zip(step.replay(), step.result, expected, strict=True):
        assert got is before and torch.equal(got, want)

    copies = True  # a torch operation whose result a replay would not renew
    noticed = RecordedStep(function)
    assert not noticed.replayable and noticed.computed_outside == {"aten::clone"}


def test_what_calls_no_kernel_is_not_replayable() -> None:
    assert not RecordedStep(lambda: (torch.empty(3),)).replayable


def test_a_failure_while_recording_ends_the_recording() -> None:
    def function() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            RecordedStep(function)


def test_recordings_do_not_nest() -> None:
    with pytest.raises(ValueError, match="begin: expected no recording under way"):
        RecordedStep(lambda: RecordedStep(lambda: (torch.empty(1),)).result)
    assert RecordedStep(lambda: (native.quant_matmul(torch.ones(1, 32), [PACKED]),)).computed_outside == {"aten::ones"}
