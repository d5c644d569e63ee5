"""Choosing an implementation: preference, forcing, and saying aloud what is missing."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import pytest

from helexa_engine.errors import BackendUnavailable, InvalidRequest
from helexa_engine.ops import cuda, registry
from helexa_engine.ops.registry import Implementation, Op

HERE = "helexa_engine.ops.quant_matmul.reference"


def op(**facts) -> Op:
    return Op(
        "test_op",
        HERE,
        Implementation("wide", "cpu", "json", supports=lambda f: f["width"] > 8, needs_native=False),
        Implementation("any", "cpu", "math", needs_native=False),
    )


def test_the_first_that_can_run_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELEXA_OPS", raising=False)
    assert op().choose("cpu", width=16).__name__ == "json"
    assert op().choose("cpu", width=4).__name__ == "math"


def test_cuda_needs_kernels_and_the_emulation_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = Op("test_op", HERE, Implementation("cuda", "cuda", "json"))
    monkeypatch.setattr(cuda, "kernels", lambda: None)
    assert on_cuda.decide("cuda").is_fallback
    assert "without nvcc" in on_cuda.decide("cuda").why
    with pytest.raises(BackendUnavailable, match="nvcc"):
        cuda.require_kernels()
    monkeypatch.undo()
    with cuda.emulated(math):
        assert cuda.require_kernels() is math
        assert on_cuda.choose("cuda").__name__ == "json"
        assert cuda.torch_device("cuda").type == "cpu"
    assert cuda.torch_device("cuda").type == "cuda"


def test_a_fallback_names_what_the_device_lacks_and_no_other() -> None:
    two = Op(
        "test_op", HERE, Implementation("cuda", "cuda", "json"), Implementation("wide", "cpu", "json", lambda f: False)
    )
    assert two.decide("cpu").why.startswith("wide: it does not support")
    assert (
        Op("test_op", HERE, Implementation("cuda", "cuda", "json")).decide("cpu").why == "no implementation runs on cpu"
    )


def test_forcing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELEXA_OPS", "quantize=x, test_op=any")
    assert op().choose("cpu", width=16).__name__ == "math"
    monkeypatch.setenv("HELEXA_OPS", "test_op=reference")
    assert op().choose("cpu", width=16).__name__ == HERE
    monkeypatch.setenv("HELEXA_OPS", "test_op=wide")
    with pytest.raises(BackendUnavailable, match="test_op=wide.*width"):
        op().choose("cpu", width=4)
    monkeypatch.setenv("HELEXA_OPS", "test_op=nothing")
    with pytest.raises(BackendUnavailable, match="expected one of wide, any, reference"):
        op().choose("cpu", width=4)
    monkeypatch.setenv("HELEXA_OPS", "quant_matmull=reference")
    with pytest.raises(BackendUnavailable, match="no op quant_matmull; expected some of .*quant_matmul"):
        op().choose("cpu", width=4)
    monkeypatch.setenv("HELEXA_OPS", "test_op")
    with pytest.raises(InvalidRequest, match="HELEXA_OPS"):
        op().choose("cpu", width=4)


def test_the_slow_path_is_announced_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("HELEXA_OPS", raising=False)
    monkeypatch.setattr(registry, "native_core", lambda: None)
    lonely = Op("lonely_op", HERE, Implementation("native", "cpu", "json"))
    with caplog.at_level(logging.WARNING, "helexa.ops"):
        assert lonely.choose("cpu").__name__ == HERE
        lonely.choose("cpu")
    assert [r.getMessage() for r in caplog.records] == [
        "lonely_op: reference (native: the native core is not built): plain PyTorch, same results, about a hundred times slower"
    ]


@pytest.mark.skipif(registry.native_core() is None, reason="the native core is not built here")
def test_the_environment_reaches_the_core() -> None:
    code = "from helexa_engine.ops.registry import native_core as n; print(n().cpu_isa(), n().num_threads())"
    environment = {"HELEXA_CPU_ISA": "generic", "HELEXA_NUM_THREADS": "3", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["generic", "3"], ran.stderr
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HELEXA_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "BackendUnavailable: HELEXA_CPU_ISA=mmx" in ran.stderr.replace("helexa_engine.errors.", "")
