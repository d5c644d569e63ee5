"""No CUDA kernel spills, and each takes the registers that ``csrc/cuda/resources.json`` says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "cuda_resources.py"
_spec = importlib.util.spec_from_file_location("cuda_resources", SCRIPT)
assert _spec is not None and _spec.loader is not None
cuda_resources = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda_resources)

LOG = """
ptxas info    : Compiling entry function '_ZN6helexa4cuda12_GLOBAL__N_14normINS_5blockELi32EEEvPKT_' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 512 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6helexa4cuda12_GLOBAL__N_14normINS_5otherELi32EEEvPKT_' for 'sm_80'
    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 376 bytes cmem[0]
"""


def test_reads_what_ptxas_says() -> None:
    resources, faults = cuda_resources.read_log(LOG)
    assert resources == {"norm": {"sm_80": [30, 512]}}
    assert faults == ["norm on sm_80: 16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads"]


def test_names_what_differs() -> None:
    resources, _ = cuda_resources.read_log(LOG)
    assert cuda_resources.differences({"norms": resources}, {"norms": resources}) == []
    assert cuda_resources.differences({}, {"norms": resources}) == [
        "norms.cu: norm on sm_80: [registers, shared bytes] absent in the table, [30, 512] built"
    ]


def test_the_build_is_as_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    if not list(cuda_resources.LOGS.glob("*.ptxas.log")):
        pytest.skip("the CUDA kernels are not built: there is no nvcc")
    assert cuda_resources.main([]) == 0, capsys.readouterr().err + "\nafter a review: scripts/cuda_resources.py --write"


def test_every_kernel_is_built_for_every_architecture() -> None:
    kernels = json.loads(cuda_resources.TABLE.read_text(encoding="utf-8"))["kernels"]
    sources = {path.stem for path in cuda_resources.TABLE.parent.glob("*.cu")}
    assert kernels.keys() == sources
    for source in kernels.values():
        assert source
        for row in source.values():
            assert row.keys() == {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"}
